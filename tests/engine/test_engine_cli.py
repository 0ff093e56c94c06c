"""The commands of engine files on tiny networks: what they print and write, and how they refuse."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands_run import refusal, run
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from engines import CACHE, engine_file, tiny_engine
from typer.testing import CliRunner

import olss_fast
from olss_fast import NoiseSchedule, solvers
from olss_fast.__main__ import shown_at_once
from olss_fast.cli import model as models
from olss_fast.cli.commands import app
from olss_fast.engine import describe, machine, manifest, timing
from olss_fast.engine.timing import Timing

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """An engine file with one bit of its last byte turned."""
    data = bytearray(engine_file("guided").read_bytes())
    data[-1] ^= 1
    path = tmp_path / "damaged.olss"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("command", ["build", "validate", "bench"])
def test_help_has_examples(command: str) -> None:
    assert f"olss-fast {command}" in run(command, "--help")


# --- build -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline of 3 classes and the null class 3, on 8 x 8 pixels, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
        num_class_embeds=4,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    path = tmp_path_factory.mktemp("pipeline") / "tiny"
    DDIMPipeline(unet, scheduler).save_pretrained(path)
    return path


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLSS_FAST_CACHE", str(CACHE))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.slow
def test_build_samples_as_the_model_does(folder: Path, tmp_path: Path) -> None:
    plan = solvers.ddim(SCHEDULE, steps=4)
    plan.save(tmp_path / "four.safetensors")
    out = tmp_path / "new" / "tiny.olss"
    how = ("--null-class", 3, "-g", 2, "--batch", "1,2,3", "--device", "cpu", "--quiet", "--out", out)
    text = run("build", "--model", folder, "--plan", tmp_path / "four.safetensors", "--steps", "2", *how)
    assert describe.inspected(out) in text

    engine = olss_fast.load_engine(out)
    assert engine.manifest.plan_names == ["ddim-4", "unipc-2"]
    assert engine.plans["ddim-4"] == plan
    assert engine.plans["unipc-2"] == solvers.unipc(SCHEDULE, 2, order=3, variant="bh1")
    assert engine.manifest.guidance_scale == 2.0
    model = models.load_model(str(folder), device="cpu", null_class=3)
    noise = models.draw_noise(model, 3, seed=5)
    expected = olss_fast.sample(model.network, plan, noise, **models.arguments(model, [0, 1, 2], 2.0))
    found = engine(noise, class_labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-3, atol=1e-3)  # float32 beside float64

    again = run("build", "--model", folder, "--steps", "2,3", "--solver", "deis", *how)
    assert "was there from an earlier build" in again
    assert olss_fast.load_engine(out).manifest.plan_names == ["deis-2", "deis-3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --steps LIST of an analytic solver, or --plan FILE"),
        (["--plan", "none.safetensors", "--order", "2"], "give --steps LIST"),
        (["--plan", "none.safetensors"], "none.safetensors"),
        (["--steps", "0"], "--steps is '0'"),
        (["--steps", "2", "--solver", "dopri"], "'dopri' is unknown"),
        (["--steps", "2", "--solver", "ddim", "--order", "2"], "'ddim' has no order"),
        (["--steps", "2", "--batch", "4,1,2"], "--batch is '4,1,2': expected least,usual,most"),
        (["--steps", "2", "--batch", "1,2"], "--batch is '1,2'"),
        (["--steps", "2", "--dtype", "int8"], "--dtype is 'int8': choose one of float32"),
        (["--steps", "2", "-g", "2"], "--null-class"),
        (["--steps", "2", "--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_build_refuses(words: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    assert message in refusal("build", "--model", folder, "--out", tmp_path / "new.olss", "--quiet", *words)
    assert not (tmp_path / "new.olss").exists()


def test_build_tries_the_output_before_the_model(tmp_path: Path) -> None:
    none = ("build", "--model", tmp_path / "none", "--steps", "2", "--out")
    assert "a folder: name a file in it" in refusal(*none, tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refusal(*none, tmp_path / "file" / "new.olss")


def test_build_refuses_plans_for_another_prediction(folder: Path, tmp_path: Path) -> None:
    plan = solvers.ddim(NoiseSchedule.named("linear", prediction_type="v_prediction"), steps=2)
    plan.save(tmp_path / "v.safetensors")
    words = ("--plan", tmp_path / "v.safetensors", "--out", tmp_path / "new.olss")
    assert "'v_prediction', this model predicts 'epsilon'" in refusal("build", "--model", folder, *words)


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_for_people_and_for_programs() -> None:
    path, facts = engine_file("guided"), tiny_engine("guided").manifest.facts
    text = run("inspect", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    told = ["TinyNetwork", "float32", "labels int64[batch]", "scale 1.5", f"sha256      {digest}\n"]
    told += [facts["plans"][2]["name"], "both outputs of a guided pair apart", facts["notice"], torch.__version__]
    assert [each for each in told if each not in text] == []
    assert facts["sha256"] not in text  # the format's own checksum: nobody else prints it
    assert json.loads(run("inspect", path, "--json")) == {**facts, "sha256": digest}
    sizes = {row.split()[2]: row for row in text.splitlines() if row.startswith("size")}
    assert f"code {path.stat().st_size / 1000:.1f}"[:6] in next(iter(sizes.values()))  # nearly all of this file is code


def test_inspect_takes_the_short_way_and_the_long_one() -> None:
    path = str(engine_file("guided"))
    assert run("inspect", path) == f"{shown_at_once(['inspect', path])}\n"
    assert run("inspect", "--json", path) == f"{shown_at_once(['inspect', '--json', path])}\n"
    for words in (["inspect"], ["inspect", "--help"], ["inspect", path, "x"], ["validate", path], ["inspect", "none"]):
        assert shown_at_once(words) is None


def test_inspect_of_an_engine_loads_nothing_heavy() -> None:
    script = "import sys; from olss_fast.__main__ import main; main(); print(*sys.modules)"
    words = [sys.executable, "-c", script, "inspect", str(engine_file("guided"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert not set(done.stdout.splitlines()[-1].split()) & {"numpy", "torch", "typer", "safetensors", "logging"}


def test_inspect_of_a_pipe_that_ends_early() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "olss_fast", "inspect", str(engine_file("guided"))]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_inspect_refuses_damaged_engines(tmp_path: Path) -> None:
    path = tmp_path / "short.olss"
    path.write_bytes(engine_file("guided").read_bytes()[:-1])
    assert shown_at_once(["inspect", str(path)]) is None
    assert "no usable engine file" in refusal("inspect", path)
    assert "truncated" in refusal("inspect", path)


def test_description_of_odd_facts() -> None:
    facts = tiny_engine("guided").manifest.facts
    plans = [{"name": f"p{i}", "nfe": 1, "branches": 1, "noises": 1, "sha256": ""} for i in range(30)]
    gpu = {**facts["machine"], "device": "cuda", "capability": [9, 0], "instructions": []}
    changed = {"network": "A\x1b[31mB", "plans": plans, "fixed": {"gain": "0.5"}, "doubled": False, "machine": gpu}
    text = describe.describe(manifest.parse({**facts, **changed}), {"code/x": 999}, "")
    told = ["A\\x1b[31mB · float32 · cuda · no guidance · 30 plans", "gain=0.5", "compute capability 9.0", "code 999 B"]
    told += ["1 evaluation, 1 fresh noise, the default", "… and 10 more"]
    assert [each for each in told if each not in text] == []


# --- validate --------------------------------------------------------------------------------------------------------


def test_validate_runs_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    path = engine_file("guided")
    assert "samples" in run("validate", path, "--run")
    assert json.loads(run("validate", path, "--run", "--json")) == {"file": str(path), "usable": True, "problems": []}

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("olss_fast.engine.engine.LoadedCode", load)
    said = run("validate", path)
    for text in ("is whole and fits this machine", hashlib.sha256(path.read_bytes()).hexdigest(), "It is a program"):
        assert text in said
    assert isinstance(CliRunner().invoke(app, ["validate", str(path), "--run"]).exception, AssertionError)


def test_validate_names_every_problem(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "damaged or altered" in refusal("validate", damaged)
    answer = json.loads(run("validate", damaged, "--json", code=2))
    assert not answer["usable"]
    assert "damaged or altered" in answer["problems"][0]
    assert "'none.olss'" in refusal("validate", "none.olss", "--run")

    monkeypatch.setattr(machine, "_flags", list)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    message = refusal("validate", engine_file("guided"), "--device", "cuda:1", "--run")
    told = ("here is 2.99.0", "is to run on cuda:1: build one", "which this processor lacks: build the engine again")
    assert [each for each in told if each not in message] == []


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built_with = {**machine.versions(), "cuda": "12.8"}
    facts = {**machine.describe("cpu"), "device": "cuda", "capability": [9, 0]}
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda:2", "cuda:x"):
        (problem,) = machine.mismatches(built_with, facts, name)
        assert f"it is to run on {name}, and this machine has 2 GPUs" in problem


def test_validate_looks_beyond_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose sum is right is checked inside."""
    monkeypatch.setattr("olss_fast.engine.verifying.hash_weights", lambda blobs: "other")
    assert "the hash of its weights is other" in refusal("validate", engine_file("guided"))


@pytest.mark.parametrize("words", [["validate"], ["bench", "--quiet", "--iterations", "1"]])
def test_the_digest_that_sha256sum_prints(words: list[str]) -> None:
    path = engine_file("guided")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest.upper()):
        run(*words, path, "--sha256", right)
    assert f"its sha256 is {digest}; expected {'0' * 64}: it is another" in refusal(*words, path, "--sha256", "0" * 64)
    assert "expected 64 hexadecimal digits, as sha256sum prints them" in refusal(*words, path, "--sha256", digest[:-1])


# --- bench -----------------------------------------------------------------------------------------------------------


def test_bench_writes_every_call(tmp_path: Path) -> None:
    words = ("--steps", 3, "--batch", 4, "--iterations", 12, "--warmup", 1, "--threads", 1, "--quiet")
    files = ("--csv", tmp_path / "calls.csv", "--json", tmp_path / "calls.json")
    text = run("bench", engine_file("guided"), *words, *files)
    figures = json.loads((tmp_path / "calls.json").read_text())
    assert (figures["plan"], figures["nfe"], figures["batch"]) == ("three", 3, 4)
    assert (figures["device"], figures["threads"], figures["iterations"]) == ("cpu", 1, 12)
    assert figures["memory"] > 50e6  # torch alone takes more
    latency = figures["latency"]
    order = [latency[name] for name in ("min", "median", "p90", "p95", "p99", "max")]
    assert order == sorted(order)
    assert f"{latency['median']:.3f} ms" in text
    with (tmp_path / "calls.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["milliseconds"]) for row in rows] == [call["call"] for call in figures["calls"]]
    assert figures["throughput"] == pytest.approx(4e3 / latency["mean"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "9"], "no plan of 9 steps; it has two (2 steps)"),
        (["--plan", "none"], "no plan 'none'"),
        (["--plan", "two", "--steps", "2"], "steps and plan were both given"),
        (["--batch", "5"], "axis 0 does not fit the engine's profile: expected 1…4"),
        (["--device", "cuda"], "is to run on cuda"),
        (["--iterations", "0"], "--iterations"),
        (["--csv", "/proc/none/calls.csv"], "cannot be made"),
    ],
)
def test_bench_refuses(words: list[str], message: str) -> None:
    assert message in refusal("bench", engine_file("guided"), "--quiet", *words)


@pytest.mark.parametrize("kind", ["guided", "plain"])
def test_bare_network_calls_are_those_of_a_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls of the network, with inputs of the same shapes, dtypes and times."""
    engine = olss_fast.load_engine(engine_file(kind))
    call, network = timing.calls_of(engine, engine.chosen_plan(3), 2)
    asked: list[list[object]] = []
    inner = engine.network

    def recording(*tensors: torch.Tensor) -> torch.Tensor:
        asked.append([(each.shape, each.dtype) for each in tensors] + tensors[1].tolist())
        return inner(*tensors)

    monkeypatch.setattr(engine, "network", recording)
    call()
    of_call = asked.copy()
    asked.clear()
    network()
    assert of_call == asked
    assert len(asked) == 3


def test_figures_of_a_timing() -> None:
    calls = tuple(0.001 * i for i in range(1, 101))
    found = Timing("p", 5, 2, "cpu", 1, 0.5, 0.25, None, calls, tuple(each / 1.5 for each in calls))
    assert found.latency == pytest.approx(
        {"min": 1, "mean": 50.5, "median": 50.5, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    )
    assert found.overhead == pytest.approx(0.5)
    assert found.throughput == pytest.approx(200 / 5.05)
    rows = list(found.rows())
    assert ("overhead", "50.00% of the network calls") in rows
    assert all(name != "memory" for name, _ in rows)  # where the system does not tell
