"""Tuning whole pipelines: the report is what the pipeline then does, and a killed run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny_pipelines  # noqa: E402
from PIL import Image  # noqa: E402
from small_tunings import LEAST  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import olss_fast  # noqa: E402
from olss_fast.adapters.diffusers import pipeline_calls, pipeline_tuning  # noqa: E402
from olss_fast.adapters.diffusers.pipeline_network import open_pipeline  # noqa: E402
from olss_fast.cli import commands  # noqa: E402
from olss_fast.errors import InputError, StoreError  # noqa: E402
from olss_fast.report.report import Report  # noqa: E402
from olss_fast.sampling.sampling import sample  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TEACHER, PROMPTS = 8, "abcdefgh"


def settings(**changes: Any) -> dict[str, Any]:
    return {"steps": [2], "teacher_steps": TEACHER, "effort": LEAST, "progress": False, **changes}


def calls_of(prompts: str = PROMPTS, **arguments: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "generator": torch.Generator().manual_seed(i), **arguments}
        for i, prompt in enumerate(prompts)
    ]


def fresh(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same calls with generators of their own."""
    return [{**call, "generator": torch.Generator().set_state(call["generator"].get_state())} for call in calls]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def tuned(pipe: Any) -> Any:
    return olss_fast.tune_pipeline(pipe, calls_of(guidance_scale=4.0), **settings())


def latents(pipe: Any, scheduler: Any, call: dict[str, Any], steps: int) -> Any:
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        return pipe(**call, num_inference_steps=steps, output_type="latent").images
    finally:
        pipe.scheduler = original


def test_the_report_is_what_the_pipeline_does(pipe: Any, tuned: Any) -> None:
    """Errors of the report = RMSE between the latents of the pipeline with the plan and with the teacher's plan."""
    held_out = calls_of(guidance_scale=4.0)[-tuned.report.held_out :]
    best = tuned.report.best(2)
    assert best.plan == tuned.plans[2]
    for call, error in zip(held_out, best.errors, strict=True):
        (one,) = fresh([call])
        (two,) = fresh([call])
        few = latents(pipe, olss_fast.PlanScheduler.from_pipe(pipe, tuned.plans[2]), one, 2)
        many = latents(pipe, olss_fast.PlanScheduler.from_pipe(pipe, tuned.report.teacher), two, TEACHER)
        assert float((few - many).square().mean().sqrt()) == pytest.approx(error, rel=1e-3, abs=1e-5)  # float32 loops


@pytest.mark.parametrize("name", ["unet2d", "flux", "sd3"])
def test_pipelines_that_do_not_scale_their_noise(name: str) -> None:
    """They hand unit noise to the network whatever the plan's first row says, so that row stays as it is."""
    pipe = getattr(tiny_pipelines, name)()
    calls: list[dict[str, Any]] = [{"generator": torch.Generator().manual_seed(i)} for i in range(8)]
    if name != "unet2d":
        extra = {**tiny_pipelines.embeddings(pipe), "output_type": "latent", "height": 16, "width": 16}
        calls = [{**call, **extra} for call in calls]
    result = olss_fast.tune_pipeline(pipe, fresh(calls), **settings(effort=olss_fast.Effort.light()))
    assert result.plans[2].rows[0, 0] == pytest.approx(1.0)
    assert all(each.plan.rows[0, 0] == pytest.approx(1.0) for each in result.report.candidates)
    outputs, original = [], pipe.scheduler
    for plan, steps in ((result.plans[2], 2), (result.report.teacher, TEACHER)):
        pipe.scheduler = original
        pipe.scheduler = olss_fast.PlanScheduler.from_pipe(pipe, plan)
        seen: list[Any] = []
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *a, _step=step, _seen=seen, **k: _seen.append(_step(*a, **k)) or _seen[-1]
        pipe(**fresh(calls[-1:])[0], num_inference_steps=steps)
        last = seen[-1]
        outputs.append(last[0] if isinstance(last, tuple) else last.prev_sample)
    error = float((outputs[0] - outputs[1]).square().mean().sqrt())
    assert error == pytest.approx(result.report.best(2).errors[-1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("name", "strength"), [("sd3", 0.7), ("flux", 0.33)])
def test_image_to_image_of_flow_models(name: str, strength: float) -> None:
    """They round the share of the steps in a way of their own; the plan answers to the number that they make of it."""
    kind = {"sd3": "StableDiffusion3Img2ImgPipeline", "flux": "FluxImg2ImgPipeline"}[name]
    pipe = getattr(tiny_pipelines, name)(getattr(diffusers, kind))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    call = {**tiny_pipelines.embeddings(pipe), "image": picture, "strength": strength, "height": 16, "width": 16}
    result = olss_fast.tune_pipeline(pipe, [dict(call) for _ in range(8)], **settings())
    plan = result.plans[2]
    original = pipe.scheduler
    for each in (plan, result.report.teacher):
        pipe.scheduler = original
        pipe.scheduler = olss_fast.PlanScheduler.from_pipe(pipe, each)
        steps = int(each.metadata.get("num_inference_steps", each.nfe))
        assert torch.isfinite(pipe(**call, num_inference_steps=steps, output_type="latent").images).all()


def test_guidance_may_be_any_number(pipe: Any) -> None:
    calls = calls_of(guidance_scale=np.float32(4.0))
    calls[0]["guidance_scale"] = torch.tensor(4.0)
    result = olss_fast.tune_pipeline(pipe, calls, **settings())
    assert result.plans[2].metadata["guidance_scale"] == "4.0"
    assert len(result.report.guidance) == 3


def test_a_rival_that_cannot_be_made_is_none(pipe: Any) -> None:
    original = pipe.scheduler
    pipe.scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")  # which DPM-Solver++ refuses with an error
    try:
        result = olss_fast.tune_pipeline(pipe, calls_of(), **settings())
    finally:
        pipe.scheduler = original
    assert 2 in result.plans


def test_the_plans_say_what_they_are_for(tuned: Any) -> None:
    facts = tuned.plans[2].metadata
    assert facts["pipeline"] == "StableDiffusionPipeline"
    assert float(facts["guidance_scale"]) == 4.0
    assert tuned.report.best(2).accepted
    assert tuned.report.best(2).mean <= tuned.report.best(2, "analytic").mean


def test_captured_schedulers_are_rivals(pipe: Any, tuned: Any) -> None:
    rivals = [each for each in tuned.report.candidates if each.plan.metadata["method"] == "captured"]
    names = " ".join(each.name for each in rivals)
    assert "DPMSolverMultistepScheduler" in names
    assert "DEISMultistepScheduler" in names
    assert "EDM" not in names  # another preconditioning: not this network's
    assert "Ancestral" not in names  # fresh noise
    assert all(each.nfe == 2 for each in rivals)


def test_guidance_around_the_tuned_scale_is_measured(tuned: Any, tmp_path: Path) -> None:
    rows = tuned.report.guidance
    assert [row.scale for row in rows] == pytest.approx([2.667, 4.0, 5.333])
    assert all(row.nfe == 2 and row.tuned > 0 and row.analytic > 0 for row in rows)
    assert "guidance scales" in tuned.report.table()
    assert Report.from_json(tuned.report.to_json(tmp_path / "report.json")).guidance == rows


def test_tuning_across_guidance_scales(pipe: Any) -> None:
    result = olss_fast.tune_pipeline(pipe, calls_of(), guidance_scales=[3.0, 6.0], **settings())
    assert result.plans[2].metadata["guidance_scale"] == "3.0 to 6.0"
    assert [row.scale for row in result.report.guidance] == pytest.approx([2.0, 3.0, 6.0, 8.0])


def test_whole_timesteps_only() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler.register_to_config(use_karras_sigmas=True)  # relatives that take it ask at fractions
    report = olss_fast.tune_pipeline(pipe, calls_of(guidance_scale=4.0), whole_times=True, **settings()).report
    assert not any(np.any(each.plan.timesteps % 1.0) for each in report.candidates)


@pytest.mark.slow
def test_a_killed_run_resumes(pipe: Any, tmp_path: Path) -> None:
    calls, count, left = calls_of(guidance_scale=4.0), 0, 200  # stops in the middle of the fits, the teacher recorded

    def counted(module: Any, arguments: Any) -> None:
        nonlocal count, left
        count, left = count + 1, left - 1
        if left == 0:
            raise KeyboardInterrupt

    hook = pipe.unet.register_forward_pre_hook(counted)
    before = dict(vars(pipe))
    try:
        with pytest.raises(KeyboardInterrupt):
            olss_fast.tune_pipeline(pipe, calls, store=tmp_path, **settings())
        assert list(vars(pipe).items()) == list(before.items())
        count = 0
        resumed = olss_fast.tune_pipeline(pipe, calls, store=tmp_path, **settings())
        first, count = count, 0
        again = olss_fast.tune_pipeline(pipe, calls, store=tmp_path, **settings())
        whole, count = count, 0
        straight = olss_fast.tune_pipeline(pipe, calls, **settings())
    finally:
        hook.remove()
    assert resumed.plans == again.plans == straight.plans
    assert again.report.guidance == straight.report.guidance
    assert whole < first < count  # each run made fewer evaluations of the network than one that starts from nothing
    openings, scales = len(calls) + 1, len(straight.report.guidance)
    judged = straight.report.held_out
    # Beginning the calls costs an evaluation each; a probe asks up to four samples at three times, the first for free.
    assert whole <= openings + 4 * 3 + scales * (judged + 1 + judged * 3)


def test_another_network_or_other_calls_are_refused(tmp_path: Path) -> None:
    pipe = tiny_pipelines.unet2d()
    calls = [{"batch_size": 1, "generator": torch.Generator().manual_seed(i)} for i in range(8)]
    olss_fast.tune_pipeline(pipe, calls, store=tmp_path, **settings())
    weight = pipe.unet.conv_out.bias
    with torch.no_grad():
        weight[0] += 1e-6  # too little for any answer
    with pytest.raises(StoreError, match=r"differs in 'network\.unet\.conv_out\.bias'"):
        olss_fast.tune_pipeline(pipe, calls, store=tmp_path, **settings())
    with torch.no_grad():
        weight[0] -= 1e-6
    calls[3]["generator"] = torch.Generator().manual_seed(33)
    with pytest.raises(StoreError, match="another recording"):
        olss_fast.tune_pipeline(pipe, calls, store=tmp_path, **settings())


def test_image_to_image_plans_are_for_their_strength(pipe: Any) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    calls = calls_of(image=picture, strength=0.5, guidance_scale=4.0)
    result = olss_fast.tune_pipeline(image_to_image, calls, **settings())
    plan, report = result.plans[2], result.report
    assert plan.rows[0, 0] == 1.0
    assert (plan.metadata["num_inference_steps"], plan.metadata["begin"]) == ("4", "2")  # int(4 x 0.5) = 2 steps
    (call,) = fresh([calls[-1]])
    (other,) = fresh([calls[-1]])
    few = latents(image_to_image, olss_fast.PlanScheduler.from_pipe(image_to_image, plan), call, 4)
    with open_pipeline(image_to_image, [other], teacher_steps=TEACHER) as network:
        expected = sample(network, plan, network.start, conditioning={"sample": torch.arange(1)})
        target = sample(network, report.teacher, network.start, conditioning={"sample": torch.arange(1)})
    torch.testing.assert_close(few, expected, rtol=1e-4, atol=1e-5)
    error = float((few - target).square().mean().sqrt())
    assert error == pytest.approx(report.best(2).errors[-1], rel=1e-3, abs=1e-5)
    with pytest.raises(olss_fast.errors.OlssError, match="tune_pipeline"):
        latents(image_to_image, olss_fast.PlanScheduler.from_pipe(image_to_image, plan), {**call, "strength": 0.75}, 4)


def test_a_flow_pipeline(tmp_path: Path) -> None:
    flux = tiny_pipelines.flux()
    call = {**tiny_pipelines.embeddings(flux), "height": 16, "width": 16, "guidance_scale": 3.5}
    result = olss_fast.tune_pipeline(flux, [dict(call) for _ in range(8)], **settings())
    assert result.report.best(2).mean <= result.report.best(2, "analytic").mean
    flux.scheduler = olss_fast.PlanScheduler.from_pipe(flux, result.plans[2])
    assert torch.isfinite(flux(**call, num_inference_steps=2, output_type="latent").images).all()


def test_comparing_with_plans_of_ones_own(pipe: Any, tuned: Any) -> None:
    report = pipeline_tuning.compare_pipeline(
        pipe, calls_of(guidance_scale=4.0)[-2:], [2], plans=tuned.plans.values(), teacher_steps=TEACHER, progress=False
    )
    assert report.olss(2) is not None
    assert report.olss(2).errors == pytest.approx(tuned.report.best(2).errors[-2:], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [9]}, "between 1 and the 8 times"),
        ({"guidance_scales": []}, r"guidance_scales is \[\]"),
        ({"guidance_scales": [-1.0]}, "expected a list of positive numbers"),
        ({"guidance_scales": [float("inf")]}, "expected a list of positive numbers"),
        ({"guidance_scales": 5}, "guidance_scales is 5"),
        ({"effort": "light"}, "effort is 'light'; expected an Effort"),
        ({"store": 5}, "store is 5; expected a folder"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"held_out": 8}, "are too few"),
    ],
)
def test_unusable_settings(pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        olss_fast.tune_pipeline(pipe, calls_of(), **settings(**changes))


def test_guidance_scales_need_a_guided_pipeline() -> None:
    with pytest.raises(InputError, match="takes no guidance_scale"):
        olss_fast.tune_pipeline(tiny_pipelines.unet2d(), [{}] * 8, guidance_scales=[2.0], **settings())


class LabelPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """The embedded model, guided, as a pipeline of somebody's own."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, label: int, guidance_scale: float = 1.5, latents: Any = None, num_inference_steps: int = 50
    ) -> Any:
        labels = torch.tensor([olss_fast.demo.CLASSES, label])
        self.scheduler.set_timesteps(num_inference_steps)
        x = latents * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(x, t)
            u, c = self.unet(torch.cat([scaled, scaled]), t.expand(2), class_labels=labels).chunk(2)
            x = self.scheduler.step(torch.lerp(u, c, guidance_scale), t, x, return_dict=False)[0]
        return x


@pytest.mark.slow
def test_a_pipeline_is_tuned_as_its_network_is() -> None:
    """The same noise and labels, through a scheduler slot and directly: the same fits and errors."""
    model = olss_fast.demo.load("cpu")
    labels = list(range(8))
    noise = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
    direct = olss_fast.tune(
        model.network,
        noise=noise,
        schedule=model.schedule,
        conditioning={"class_labels": torch.tensor(labels)},
        unconditional={"class_labels": torch.full((8,), olss_fast.demo.CLASSES)},
        guidance_scale=1.5,
        **settings(),
    )
    betas = 1.0 - model.schedule.alpha(np.arange(1000)) ** 2 / np.append(1.0, model.schedule.alpha(np.arange(999)) ** 2)
    scheduler = diffusers.DDIMScheduler(
        trained_betas=betas, prediction_type=model.schedule.prediction_type, clip_sample=False
    )
    pipe = LabelPipeline(model.network, scheduler)
    through = olss_fast.tune_pipeline(
        pipe, [{"label": label, "latents": noise[i : i + 1]} for i, label in enumerate(labels)], **settings()
    )
    for kind in ("olss-unpolished", "olss-uniform", "analytic"):  # the polish of a pipeline's plan leaves row 0 alone
        # one at a time and in a batch, and betas that went through float32: the same to a part in a thousand
        assert through.report.best(2, kind).mean == pytest.approx(direct.report.best(2, kind).mean, rel=1e-3)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(path)
    (path / "prompts.txt").write_text("# animals\na fox\n\n  a hen\n", encoding="utf-8-sig")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(commands.app, [str(each) for each in arguments])


def test_tune_compare_and_sample_from_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(olss_fast.Effort, "light", staticmethod(lambda: LEAST))
    model = ["--model", folder, "--prompts", folder / "prompts.txt", "--quiet"]
    teacher, full = ["--teacher-steps", TEACHER], ["--light", "--teacher-model", folder]
    result = run("tune", *model, *teacher, *full, "--steps", 2, "--samples", 8, "--out", tmp_path / "tuned")
    assert "8-step teacher of another network" in result.output
    plan = tmp_path / "tuned" / "plans" / "olss-2.safetensors"
    result = run("compare", *model, *teacher, "--steps", 2, "--samples", 2, "--plan", plan, "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert "OLSS" in result.output
    result = run("sample", *model, "--plan", plan, "--count", 3, "--out", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "images").glob("0*.png")) == [f"0000{i}.png" for i in range(3)]
    result = run("sample", *model, "--solver", "unipc", "--steps", 2, "--count", 1, "--out", tmp_path / "images")
    assert result.exit_code == 0, result.output


def test_prompts_of_a_file(folder: Path) -> None:
    assert pipeline_calls.read_prompts(folder / "prompts.txt") == ["a fox", "a hen"]


def test_bad_input_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n# nothing\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    prompts = folder / "prompts.txt"
    cases = [
        (["--model", folder], "--prompts FILE"),
        (["--model", folder, "--prompts", tmp_path / "absent.txt"], "absent.txt"),
        (["--model", folder, "--prompts", empty], "holds no prompts"),
        (["--model", folder, "--prompts", binary], "not UTF-8"),
        (["--model", "demo", "--prompts", prompts], "the demo takes no prompts"),
        (["--model", folder, "--prompts", prompts, "--null-class", 3], "--null-class is for class-conditional models"),
        (["--model", folder, "--prompts", prompts, "--guidance-scale", "nan"], "--guidance-scale is nan"),
        (
            ["--model", folder, "--prompts", prompts, "--guidance-scale", 3, "--guidance-range", "4,5"],
            "give one of them",
        ),
        (["--model", tmp_path, "--prompts", prompts], "model_index.json"),
        (["--model", folder, "--prompts", prompts, "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--model", folder, "--prompts", prompts, "--guidance-range", "5,x"], "--guidance-range is '5,x'"),
        (["--model", "demo", "--guidance-range", "5"], "--guidance-range belongs to --prompts"),
    ]
    for arguments, message in cases:
        result = run("tune", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split()), result.output
