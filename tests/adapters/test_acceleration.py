"""`accelerate`: pipelines whose loop is one call give the images that they gave step by step."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny_pipelines  # noqa: E402

import olss_fast  # noqa: E402
from olss_fast.adapters.diffusers import acceleration  # noqa: E402
from olss_fast.errors import InputError, NetworkError  # noqa: E402
from olss_fast.executors import graph  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 5
TOLERANCE = 1e-5  # of the largest latent: float32 rows of at most six terms


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


class Recorded:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.replay = function


@pytest.fixture(params=["fused", "graph"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(graph, "capture", lambda function, pool, device: function() or Recorded(function))
    monkeypatch.setattr(acceleration, "require_cuda", lambda device: None)
    return request.param


def call_of(pipe: Any, **changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    prompted = "prompt" in inspect.signature(pipe.__call__).parameters
    call |= {"prompt": ["a", "b c"], "output_type": "latent"} if prompted else {"batch_size": 2, "output_type": "np"}
    return call | changes


def images(pipe: Any, **changes: Any) -> Any:
    return torch.as_tensor(pipe(**call_of(pipe, **changes)).images)


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl", "unet2d"])
def test_the_images_are_those_of_the_loop(name: str, backend: str) -> None:
    pipe = getattr(tiny_pipelines, name)()
    plan = olss_fast.capture(pipe.scheduler, STEPS)
    expected = images(pipe)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = olss_fast.accelerate(pipe, plan, backend=backend)
    inner = pipe.unet.conv_in.register_forward_hook(count)
    for _ in range(2):
        calls = 0
        assert_same(images(pipe), expected)
    inner.remove()
    assert calls == STEPS
    assert handle.stats().backend == backend
    assert handle.stats().captures == (1 if backend == "graph" else 0)
    assert handle.stats().replays == (2 * STEPS if backend == "graph" else 0)


def test_prompts_guidance_and_steps_change_without_a_capture(backend: str) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    plans = [olss_fast.capture(pipe.scheduler, steps) for steps in (3, STEPS)]
    variations: list[dict[str, Any]] = [{}, {"prompt": ["x", "y"]}, {"guidance_scale": 3.0}, {"num_inference_steps": 3}]
    expected = [images(pipe, **each) for each in variations]
    handle = olss_fast.accelerate(pipe, plans, backend=backend)
    for each, image in zip(variations, expected, strict=True):
        assert_same(images(pipe, **each), image)
    assert handle.stats().captures <= 1
    without = images(pipe, guidance_scale=1.0)  # no doubled batch: another shape
    handle.restore()
    assert_same(without, images(pipe, guidance_scale=1.0))


def test_restored(backend: str) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    scheduler, attributes = pipe.scheduler, dict(vars(pipe.unet))
    handle = olss_fast.accelerate(pipe, olss_fast.capture(scheduler, STEPS), backend=backend)
    images(pipe)
    handle.restore()
    assert pipe.scheduler is scheduler
    assert vars(pipe.unet) == attributes
    assert images(pipe, num_inference_steps=2).shape == (2, 4, 8, 8)


def test_calls_that_need_the_loop_get_it() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    plan = olss_fast.capture(pipe.scheduler, STEPS)
    ancestral = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = images(pipe, guidance_rescale=0.7)
    handle = olss_fast.accelerate(pipe, plan, backend="fused")
    assert_same(images(pipe, guidance_rescale=0.7), expected)
    handle.restore()
    pipe.scheduler = ancestral
    expected = images(pipe)
    olss_fast.accelerate(pipe, olss_fast.capture(ancestral, STEPS), backend="fused")
    assert_same(images(pipe), expected)


def test_other_pipelines_run_step_by_step_and_say_so() -> None:
    pipe = tiny_pipelines.flux()
    call = {**tiny_pipelines.embeddings(pipe), "height": 16, "width": 16, "output_type": "latent"}
    call["num_inference_steps"] = STEPS

    def run() -> Any:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    expected = run()
    plan = olss_fast.solvers.euler(olss_fast.NoiseSchedule.flow(), STEPS)
    with pytest.warns(UserWarning, match="FluxPipeline runs step by step"):
        handle = olss_fast.accelerate(pipe, plan)
    assert run().shape == expected.shape
    assert "FluxPipeline" in handle.stats().reason


def test_saved_as_a_plan_scheduler(tmp_path: Any) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    plan = olss_fast.capture(pipe.scheduler, STEPS)
    olss_fast.accelerate(pipe, plan, backend="fused")
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = olss_fast.PlanScheduler.from_pretrained(tmp_path)
    assert type(loaded) is olss_fast.PlanScheduler
    assert loaded.plans == (plan,)


def test_what_is_not_finite_is_named() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend="fused")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NetworkError, match="NaN or infinity at evaluation 0"):
        images(pipe)


@pytest.mark.parametrize(
    ("backend", "message"), [("reference", "backend is 'reference'"), ("graph", "needs a CUDA device, got cpu")]
)
def test_bad_backends(backend: str, message: str) -> None:
    pipe = tiny_pipelines.unet2d()
    with pytest.raises(InputError, match=message):
        olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend=backend)


def test_other_calls_of_the_network_are_its_own(backend: str) -> None:
    pipe = tiny_pipelines.unet2d()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = pipe.unet(x, 10).sample
        olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend=backend)
        images(pipe)
        assert torch.equal(pipe.unet(x, 10).sample, expected)


def test_a_scheduler_that_takes_the_slot_again_has_its_loop() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    own, expected = pipe.scheduler, images(pipe)
    olss_fast.accelerate(pipe, olss_fast.capture(own, STEPS), backend="fused")
    images(pipe)
    pipe.scheduler = own
    assert_same(images(pipe), expected)


def test_accelerated_twice() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    scheduler, expected = pipe.scheduler, images(pipe)
    plan = olss_fast.capture(scheduler, STEPS)
    olss_fast.accelerate(pipe, plan, backend="fused")
    handle = olss_fast.accelerate(pipe, plan, backend="fused")
    assert_same(images(pipe), expected)
    handle.restore()
    assert pipe.scheduler is scheduler


def test_a_run_that_is_cut_is_run_step_by_step() -> None:
    pipe = tiny_pipelines.sdxl()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    expected = images(pipe, denoising_end=0.6)
    olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend="fused")
    assert_same(images(pipe, denoising_end=0.6), expected)


def edited(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Half-way guidance goes off, and the latents shrink."""
    if step == 2:
        pipe._guidance_scale = 0.0
        given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        given["latents"] = 0.9 * given["latents"]
    return given


def test_what_acts_between_steps_runs_step_by_step_and_says_so_once() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    edit = {"callback_on_step_end": edited, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plan = olss_fast.capture(pipe.scheduler, STEPS)
    expected, plain = images(pipe, **edit), images(pipe)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    handle = olss_fast.accelerate(pipe, plan, backend="fused")
    with pytest.warns(UserWarning, match="runs step by step: callback_on_step_end"):
        assert_same(images(pipe, **edit), expected)
    assert handle.stats().backend == "fused"
    with pytest.warns(UserWarning, match="guidance_rescale"):
        images(pipe, guidance_rescale=0.5)
    reason = handle.stats().reason
    assert "callback_on_step_end" in reason
    assert "guidance_rescale" in reason
    assert reason.count("runs step by step") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(images(pipe, **edit), expected)
        assert_same(images(pipe), plain)


def test_arguments_that_nobody_knows_run_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By position too; what is given its default is no reason."""
    pipe = tiny_pipelines.unet2d()
    monkeypatch.setattr(acceleration, "STEADY", acceleration.STEADY - {"batch_size"})
    plan = olss_fast.capture(pipe.scheduler, STEPS)
    expected = images(pipe)
    handle = olss_fast.accelerate(pipe, plan, backend="fused")
    images(pipe, batch_size=1)
    assert handle.stats().reason == ""
    assert handle.stats().bytes > 0
    call = call_of(pipe)
    assert_same(torch.as_tensor(pipe(call.pop("batch_size"), **call).images), expected)
    assert "batch_size" in handle.stats().reason


def test_a_scheduler_whose_steps_somebody_watches() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend="fused")
    seen, step = [], pipe.scheduler.step

    def watched(*args: Any, **how: Any) -> Any:
        seen.append(args[1])
        return step(*args, **how)

    pipe.scheduler.step = watched
    images(pipe)
    assert len(seen) == STEPS


def sibling(pipe: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Another pipeline made of the same parts, and what it has to be given."""
    if name == "inpainting":
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., :8] = 1
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        given = {"image": image, "mask_image": mask, "strength": 1.0, "height": 16, "width": 16, "prompt": "a"}
        return tiny_pipelines.quiet(diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe)), given
    if name == "text to image":
        return tiny_pipelines.quiet(diffusers.StableDiffusionPipeline.from_pipe(pipe)), {"guidance_scale": 2.0}
    net = tiny_pipelines.controlnet().controlnet
    made = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net)
    return tiny_pipelines.quiet(made), {"image": torch.ones(1, 3, 16, 16), "height": 16, "width": 16}


@pytest.mark.parametrize("name", ["inpainting", "text to image", "ControlNet"])
def test_other_pipelines_of_the_same_parts_have_their_own_loop(name: str) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    other, given = sibling(pipe, name)
    expected, own = images(other, **given), images(pipe)
    olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend="fused")
    images(pipe)
    other, given = sibling(pipe, name)
    assert_same(images(other, **given), expected)
    assert_same(images(pipe), own)


def test_threads_share_an_accelerated_pipeline() -> None:
    """With scales and numbers of steps of their own, beside a sibling that inpaints. Tokenizers take no threads."""
    pipe = tiny_pipelines.stable_diffusion()
    plans = [olss_fast.capture(pipe.scheduler, steps) for steps in (3, STEPS)]
    prompt = dict(
        zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a", "cpu", 1, True), strict=True)
    )
    olss_fast.accelerate(pipe, plans, backend="fused")
    other, given = sibling(pipe, "inpainting")
    given |= {"prompt": None, **prompt}
    work: list[Callable[[], Any]] = [
        lambda: images(pipe, prompt=None, **prompt),
        lambda: images(pipe, prompt=None, **prompt, guidance_scale=2.0, num_inference_steps=3),
        lambda: images(other, **given),
    ]
    alone = [each() for each in work]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: work[i % 3](), range(24)))
    assert [i for i, each in enumerate(found) if not torch.equal(each, alone[i % 3])] == []


def test_a_copy_is_accelerated_by_itself() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    handle = olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend="fused")
    expected = images(pipe)
    again = copy.deepcopy(pipe)
    handle.restore()
    assert_same(images(again), expected)
    assert vars(again)["_acceleration"].stats().bytes > 0
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_what_is_read_after_a_call() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    olss_fast.accelerate(pipe, olss_fast.capture(pipe.scheduler, STEPS), backend="fused")
    images(pipe, guidance_scale=3.0)
    assert pipe.guidance_scale == 3.0
    assert pipe.num_timesteps == STEPS
    own = copy.deepcopy(pipe.scheduler)
    own.set_timesteps(STEPS)
    assert torch.equal(pipe.scheduler.timesteps, own.timesteps)
    assert pipe.scheduler.num_inference_steps == STEPS
