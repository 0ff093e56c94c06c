"""The command line on a tiny pipeline: what it writes, what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands_run import refusal, run
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from olss_fast import demo, solvers
from olss_fast.cli.demo import duration, run_demo
from olss_fast.cli.model import DEMO, arguments, load_model, pick_labels, tuned_guidance
from olss_fast.cli.options import parse_numbers
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.report.report import Report
from olss_fast.schedule.noise_schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
COMMANDS = ("demo", "tune", "sample", "compare", "inspect")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline of 3 classes and the null class 3, on 8 x 8 pixels, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        add_attention=False,
        num_class_embeds=4,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    DDIMPipeline(unet, scheduler).save_pretrained(path)
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.safetensors"
    solvers.dpm_solver_pp(SCHEDULE, steps=3, order=2).save(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    assert f"olss-fast {command}" in run(command, "--help")


def test_version_and_list_of_commands() -> None:
    assert run("--version").startswith("olss-fast 0.")
    text = run("--help")
    assert all(command in text for command in COMMANDS)


def loaded_by(code: str) -> tuple[set[str], float]:
    """Modules that `code` loads in a fresh interpreter, and the processor seconds it takes."""
    script = f"import sys, time; start = time.process_time(); {code}; took = time.process_time() - start; "
    script += "print(took, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    took, *modules = done.stdout.splitlines()[-1].split()
    return set(modules), float(took)


@pytest.mark.parametrize(
    "code", ["import olss_fast", "import olss_fast.cli.commands", "from olss_fast import Plan, Report"]
)
def test_import_loads_nothing_heavy(code: str) -> None:
    modules, seconds = loaded_by(code)
    assert not modules & {"torch", "diffusers", "triton", "matplotlib", "scipy"}
    assert seconds <= 0.3


def test_inspect_loads_no_torch(plan_file: Path) -> None:
    modules, _ = loaded_by(
        "from typer.testing import CliRunner; from olss_fast.cli.commands import app; "
        f"assert CliRunner().invoke(app, ['inspect', {str(plan_file)!r}]).exit_code == 0"
    )
    assert not modules & {"torch", "diffusers", "matplotlib"}


def test_inspect_for_people_and_for_programs(plan_file: Path) -> None:
    plan = Plan.load(plan_file)
    assert plan.describe() in run("inspect", plan_file)
    fields = json.loads(run("inspect", plan_file, "--json"))
    assert fields["nfe"] == 3
    assert fields["timesteps"] == plan.timesteps.tolist()
    assert np.array_equal(fields["rows"], plan.rows)


def test_inspect_refuses_what_is_no_plan(tmp_path: Path) -> None:
    assert "none.safetensors" in refusal("inspect", tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no plan")
    assert "text.safetensors" in refusal("inspect", tmp_path / "text.safetensors")


def test_sample_with_solver(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    where = ("--model", folder, "--out", out, "--count", 3, "--device", "cpu", "--quiet")
    text = run("sample", *where, "--solver", "dpm_solver_pp", "--steps", 3, "--order", 2, "--spacing", "logsnr")
    assert "3 images at 3 NFE" in text
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]


def test_sample_is_the_same_for_the_same_seed(folder: Path, plan_file: Path, tmp_path: Path) -> None:
    images = []
    for i, seed in enumerate((5, 5, 6)):
        out = tmp_path / str(i)
        how = ("--plan", plan_file, "--out", out, "--count", 2, "--seed", seed, "--classes", "1", "-q")
        run("sample", "--model", folder, *how, "--guidance-scale", 2, "--null-class", 3, "--device", "cpu")
        images.append((out / "grid.png").read_bytes())
    assert images[0] == images[1] != images[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --plan FILE, or --solver"),
        (["--solver", "ddim", "--plan", "x"], "either --plan FILE, or --solver"),
        (["--plan", "x", "--order", "2"], "--order belongs to --solver"),
        (["--plan", "none.safetensors"], "none.safetensors"),
        (["--solver", "ddim"], "needs steps"),
        (["--solver", "dopri", "--steps", "3"], "'dopri' is unknown; choose one of ddim"),
        (["--solver", "deis", "--steps", "3", "--eta", "1"], "'deis' has no eta"),
        (["--solver", "ddim", "--steps", "3", "--spacing", "odd"], "odd"),
        (["--solver", "ddim", "--steps", "3", "--classes", "9"], "classes 0 to 3, got [9]"),
        (["--solver", "ddim", "--steps", "3", "--classes", "a,b"], "--classes is 'a,b'"),
        (["--solver", "ddim", "--steps", "3", "-g", "2"], "--null-class"),
        (["--solver", "ddim", "--steps", "3", "--null-class", "9"], "null_class is 9"),
        (["--solver", "ddim", "--steps", "3", "--device", "abacus"], "device is 'abacus'"),
        (["--solver", "ddim", "--steps", "3", "--device", "meta"], "device is 'meta', which torch cannot use"),
        (["--solver", "ddim", "--steps", "3", "--seed", str(2**63)], "--seed"),
        (["--solver", "ddim", "--steps", "3", "--count", "1000001"], "--count"),
        (["--solver", "ddim", "--steps", "zero"], "--steps"),
        (["--solver", "ddim", "--steps", "0"], "--steps"),
    ],
)
def test_sample_refuses(words: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    assert message in refusal("sample", "--model", folder, "--out", tmp_path / "out", "--quiet", *words)


def test_a_picture_is_no_folder_to_sample_into(folder: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", folder, "--solver", "ddim", "--steps", "2", "--quiet")
    assert "five.PNG is the name of a picture; expected a folder" in refusal(*words, "--out", tmp_path / "five.PNG")
    assert not (tmp_path / "five.PNG").exists()


def test_model_folder_that_is_none(tmp_path: Path) -> None:
    assert "is no folder" in refusal("tune", "--model", tmp_path / "none", "--out", tmp_path / "out")


def test_out_that_is_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refusal("tune", "--model", folder, "--out", tmp_path / "file")


@pytest.mark.parametrize("command", ["demo", "tune", "sample", "compare"])
def test_output_folder_is_tried_before_the_model(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if command in ("demo", "tune"):
        (out / "plans").write_text("")
    else:
        out = Path("/proc")  # there, but no file can be made in it
        if not out.is_dir():
            pytest.skip("no /proc here")
    words: dict[str, list[object]] = {"demo": [], "sample": ["--solver", "ddim", "--steps", 3]}
    model = [] if command == "demo" else ["--model", tmp_path / "none"]
    assert "cannot be " in refusal(command, *model, *words.get(command, []), "--out", out, "--quiet")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_out_of_memory_is_one_message(error: Exception, plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> Plan:
        raise error

    monkeypatch.setattr(Plan, "load", load)
    assert "out of memory: lower --batch-size" in refusal("inspect", plan_file)


def test_missing_plan_is_not_asked_to_be_created(tmp_path: Path) -> None:
    message = refusal("inspect", tmp_path / "none.safetensors")
    assert "check the path" in message
    assert "create" not in message


def test_plan_for_another_prediction(folder: Path, tmp_path: Path) -> None:
    plan = solvers.ddim(NoiseSchedule.named("linear", prediction_type="v_prediction"), steps=2)
    plan.save(tmp_path / "v.safetensors")
    message = refusal("sample", "--model", folder, "--plan", tmp_path / "v.safetensors", "--out", tmp_path / "out")
    assert "'v_prediction', this model predicts 'epsilon'" in message


def test_tune_then_sample_then_compare(folder: Path, tmp_path: Path) -> None:
    model = ("--model", folder, "--null-class", 3, "--device", "cpu", "--quiet")
    cost = ("--teacher-steps", 12, "--samples", 16)
    text = run("tune", *model, *cost, "--steps", "2", "--light", "-g", 1.5, "--out", tmp_path / "tuned")
    assert "12-step teacher" in text
    plan = tmp_path / "tuned" / "plans" / "olss-2.safetensors"
    report = Report.from_json(tmp_path / "tuned" / "report.json")
    assert Plan.load(plan) == report.best(2).plan
    assert {path.name for path in (tmp_path / "tuned").glob("*.png")} == {"error.png", "path.png"}

    run("sample", *model, "--plan", plan, "--count", 1, "--out", tmp_path / "images")

    fitted = report.olss(2)
    assert fitted is not None
    fitted.plan.save(plan)
    text = run("compare", *model, *cost, "--steps", "3", "--plan", plan, "--out", tmp_path / "compare")
    assert "best analytic equals OLSS at" in text
    compared = Report.from_json(tmp_path / "compare" / "report.json")
    assert compared.nfes == (2, 3)
    assert compared.held_out == 16
    assert compared.settings["guidance_scale"] == 1.5
    assert compared.olss(2) is not None
    assert (tmp_path / "compare" / "error.png").exists()


def test_tune_toward_the_samples_of_another_model(folder: Path, tmp_path: Path) -> None:
    full = DDIMPipeline.from_pretrained(folder)
    scheduler = DDIMScheduler.from_config(full.scheduler.config, prediction_type="v_prediction")
    DDIMPipeline(full.unet, scheduler).save_pretrained(tmp_path / "full")
    words = ("tune", "--model", folder, "--null-class", 3, "--device", "cpu", "--quiet", "--steps", 2, "--light")
    few = ("--teacher-steps", 12, "--samples", 16, "--out", tmp_path / "tuned")
    text = run(*words, *few, "--teacher-model", tmp_path / "full")
    assert "12-step teacher of another network" in " ".join(text.split())
    report = Report.from_json(tmp_path / "tuned" / "report.json")
    assert report.teacher.metadata["prediction_type"] == "v_prediction"
    assert report.own_run is not None
    message = refusal("tune", "--model", folder, "--teacher-model", DEMO, "--out", tmp_path / "out")
    assert "--teacher-model makes samples of shape (1, 32, 32) in 20 classes, --model of (1, 8, 8) in 4" in message


@pytest.mark.parametrize(
    "words", [["--steps", "5,x"], ["--steps", ""], ["--steps", "0"], ["--samples", "1"], ["--samples", "1000001"]]
)
def test_compare_refuses(words: list[str], folder: Path, tmp_path: Path) -> None:
    assert words[0] in refusal("compare", "--model", folder, "--out", tmp_path / "out", *words)


def gaussian_network(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
    """The noise that the posterior mean expects in x, for data N(label / 10, 1/4)."""
    levels = [torch.from_numpy(level).float().view(-1, 1, 1, 1) for level in SCHEDULE.levels(timestep.numpy())]
    alpha, sigma, _ = levels
    mean = (class_labels / 10.0).view(-1, 1, 1, 1)
    return sigma * (x - alpha * mean) / (alpha**2 / 4.0 + sigma**2) + 0.02 * torch.sin(3.0 * x)


def test_demo_leaves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo.DemoModel(network=gaussian_network, schedule=SCHEDULE, shape=(1, 8, 8))
    monkeypatch.setattr(demo, "load", lambda device: model)
    said: list[str] = []
    result = run_demo(tmp_path / "out", steps=(2,), samples=16, progress=False, say=said.append)
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"plans/olss-2.safetensors", "report.json", "error.png", "path.png", "grid.png"}
    assert result.plans[2] == Plan.load(tmp_path / "out" / "plans" / "olss-2.safetensors")
    assert "16 samples" in said[0]
    assert "light" in said[0]
    assert result.report.table() in said


def test_numbers() -> None:
    assert parse_numbers("4,5 6", "--steps", least=1) == [4, 5, 6]
    with pytest.raises(InputError, match="--steps is '4,-5'"):
        parse_numbers("4,-5", "--steps", least=1)


def test_labels_take_turns() -> None:
    model = demo.DemoModel(network=gaussian_network, schedule=SCHEDULE)
    assert pick_labels(model, 5, [3, 7]) == [3, 7, 3, 7, 3]
    assert pick_labels(model, 21)[-2:] == [19, 0]
    how = arguments(model, [1, 2], 1.0)
    assert "unconditional" not in how
    assert arguments(model, [1, 2])["unconditional"]["class_labels"].tolist() == [20, 20]


def test_null_class_of_the_embedded_model_is_its_own() -> None:
    with pytest.raises(InputError, match="null_class is 3"):
        load_model(DEMO, null_class=3)


def test_guidance_follows_the_plans() -> None:
    plan = solvers.ddim(SCHEDULE, steps=2)
    tuned = plan.replace(metadata={"guidance_scale": "2.0"})
    assert tuned_guidance([plan]) is None
    assert tuned_guidance([plan, tuned]) == 2.0
    assert tuned_guidance([tuned], 3.0) == 3.0
    for text in ("3.0", "much"):
        with pytest.raises(InputError, match="name one"):
            tuned_guidance(
                [plan.replace(metadata={"guidance_scale": "much"}), tuned.replace(metadata={"guidance_scale": text})]
            )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (187.0, "3 min 07 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
