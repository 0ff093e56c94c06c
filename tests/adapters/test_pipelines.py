"""PlanScheduler in whole pipelines: a captured plan gives what the original scheduler gives.

The pipelines are tiny and random (tests/helpers/pipelines/tiny_pipelines.py). Both run in float32 and differ by
rounding alone: 1e-5 of the largest value, which for these untrained networks is up to 50.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

import olss_fast
from olss_fast import PlanScheduler, capture
from olss_fast.solvers.rederive import truncate

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
STEPS = 5
IMAGE = torch.rand(1, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))
MASK = (IMAGE[:, :1] > 0.5).float()
SIDES = {"height": tiny.SIZE, "width": tiny.SIZE}
BLEND = {"image": IMAGE, "mask_image": MASK, **SIDES}

SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "DPM++2M": diffusers.DPMSolverMultistepScheduler(**tiny.BETAS),
    "Euler": diffusers.EulerDiscreteScheduler(**tiny.BETAS),
    "Heun": diffusers.HeunDiscreteScheduler(**tiny.BETAS),
    "UniPC": diffusers.UniPCMultistepScheduler(**tiny.BETAS),
    "PNDM": diffusers.PNDMScheduler(**tiny.BETAS, skip_prk_steps=True),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**tiny.BETAS),
}
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text to image": (tiny.stable_diffusion, SIDES),
    "image to image": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline),
        {"image": IMAGE, "strength": 0.7},
    ),
    "inpainting, 9 channels": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline, in_channels=9),
        BLEND,
    ),
    "inpainting, 4 channels": (lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline), BLEND),
    "inpainting, partial strength": (
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline),
        {**BLEND, "strength": 0.7},
    ),
    "ControlNet": (tiny.controlnet, {"image": IMAGE}),
    "SDXL": (tiny.sdxl, SIDES),
    "SDXL image to image": (
        lambda: tiny.sdxl(diffusers.StableDiffusionXLImg2ImgPipeline),
        {"image": IMAGE, "strength": 0.7},
    ),
    "AnimateDiff": (tiny.animatediff, {**SIDES, "num_frames": 3}),
}


def sample(pipe: Any, scheduler: Any, **call: Any) -> torch.Tensor:
    pipe.scheduler = scheduler
    call = {"output_type": "latent", "num_inference_steps": STEPS} | call
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(5), **call)[0])


def assert_same(pipe: Any, original: Any, plan: Any = None, **call: Any) -> None:
    expected = sample(pipe, copy.deepcopy(original), **call)
    ours = PlanScheduler.from_pipe(pipe, capture(original, STEPS) if plan is None else plan)
    found = sample(pipe, ours, **call)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", PIPELINES)
def test_stable_diffusion_family(name: str, scheduler: str) -> None:
    make, call = PIPELINES[name]
    assert_same(make(), SCHEDULERS[scheduler], prompt="a cat", guidance_scale=5.0, **call)


@pytest.mark.parametrize("pipeline", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_pixel_pipelines(pipeline: Any) -> None:
    pipe = tiny.unet2d(pipeline)
    original = pipe.scheduler if pipeline is diffusers.DDIMPipeline else diffusers.DDPMScheduler(clip_sample=False)
    assert_same(pipe, original, output_type="np")


def test_eta_of_ddim_pipelines() -> None:
    """DDIMPipeline hands eta on: it must be what the plan was captured with."""
    pipe = tiny.unet2d()
    plan = capture(pipe.scheduler, STEPS, step_arguments={"eta": 0.7})
    assert_same(pipe, pipe.scheduler, plan, eta=0.7, output_type="np")
    with pytest.raises(olss_fast.errors.InputError, match="eta"):
        sample(pipe, PlanScheduler.from_pipe(pipe, plan), eta=0.3, output_type="np")


def test_eta_of_stable_diffusion_pipelines() -> None:
    """They pass eta=0.0 to every step that takes one; TCD's own default is 0.3, which a capture without eta has."""
    pipe, tcd = tiny.stable_diffusion(), diffusers.TCDScheduler(**tiny.BETAS)
    call = {"prompt": "a cat", "guidance_scale": 5.0, **SIDES}
    assert_same(pipe, tcd, capture(tcd, STEPS, step_arguments={"eta": 0.0}), **call)
    assert_same(pipe, tcd, capture(tcd, STEPS), eta=0.3, **call)
    with pytest.raises(olss_fast.errors.InputError, match=r"step_arguments=\{'eta': 0\.0\}"):
        sample(pipe, PlanScheduler.from_pipe(pipe, capture(tcd, STEPS)), **call)
    ddim = SCHEDULERS["DDIM"]
    plan = capture(ddim, STEPS, step_arguments={"eta": 1.0})
    assert_same(pipe, ddim, plan, eta=1.0, **call)
    with pytest.raises(olss_fast.errors.InputError, match=r"captured with eta=1\.0"):
        sample(pipe, PlanScheduler.from_pipe(pipe, plan), **call)


def test_eta_of_an_accelerated_pipeline() -> None:
    """One call for the whole loop holds to the arguments of the capture as well."""
    pipe = tiny.stable_diffusion()
    olss_fast.accelerate(pipe, capture(diffusers.TCDScheduler(**tiny.BETAS), 2, step_arguments={"eta": 0.0}))
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent", **SIDES}
    assert pipe(**call)[0].isfinite().all()
    with pytest.raises(olss_fast.errors.InputError, match=r"captured with eta=0\.0"):
        pipe(eta=0.3, **call)


@pytest.mark.parametrize("image", [None, IMAGE])
def test_latent_consistency_models(image: Any) -> None:
    """Their pipelines unpack two values of a step, and decode the second in the end."""
    parts = tiny.stable_diffusion().components | {"unet": tiny.conditional_unet(time_cond_proj_dim=8)}
    lcm = diffusers.LCMScheduler(**tiny.BETAS, clip_sample=False)
    if image is None:
        pipe = tiny.quiet(diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))
        call, steps = SIDES, {"original_inference_steps": 20}
    else:
        pipe = tiny.quiet(diffusers.LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False))
        call, steps = {"image": image, "strength": 0.6}, {"original_inference_steps": 30, "strength": 0.6}
    plan = capture(lcm, 4, **steps)
    original = {"original_inference_steps": steps["original_inference_steps"]}
    assert_same(pipe, lcm, plan, prompt="a cat", num_inference_steps=4, **original, **call)


FLOW_PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SD3": (tiny.sd3, {}),
    "SD3 image to image": (
        lambda: tiny.sd3(diffusers.StableDiffusion3Img2ImgPipeline),
        {"image": IMAGE, "strength": 0.7},
    ),
    "Flux": (tiny.flux, {}),
    "Flux image to image": (lambda: tiny.flux(diffusers.FluxImg2ImgPipeline), {"image": IMAGE, "strength": 0.7}),
    "Wan": (tiny.wan, {"num_frames": 5}),
}


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_flow_matching(name: str) -> None:
    """Flow pipelines pass `sigmas` and `mu` of their own, for which the plan is captured again."""
    make, call = FLOW_PIPELINES[name]
    pipe = make()
    plan = capture(pipe.scheduler, STEPS, **({"mu": 0.8} if "Flux" in name else {}))
    assert_same(pipe, pipe.scheduler, plan, **tiny.embeddings(pipe), **SIDES, **call)


@pytest.mark.parametrize("model", ["SD3", "Flux"])
def test_learned_and_analytic_plans_keep_their_times_in_flow_pipelines(model: str) -> None:
    """Their times are absolute: the plain sigmas and any mu are accepted; other sigmas are not."""
    pipe = {"SD3": tiny.sd3, "Flux": tiny.flux}[model]()
    plan = olss_fast.solvers.dpm_solver_pp(olss_fast.NoiseSchedule.flow(2.0), STEPS)
    ours = PlanScheduler.from_pipe(pipe, plan.replace(metadata={**plan.metadata, "method": "olss"}))
    assert sample(pipe, ours, **tiny.embeddings(pipe), **SIDES).isfinite().all()
    np.testing.assert_allclose(ours.timesteps, plan.timesteps, rtol=1e-6)
    with pytest.raises(olss_fast.errors.InputError, match="sigmas"):
        sample(pipe, ours, **tiny.embeddings(pipe), **SIDES, sigmas=[1.0, 0.9, 0.8, 0.5, 0.2])


def test_analytic_plan_in_image_to_image() -> None:
    """The analytic plan begun part of the way equals diffusers' scheduler there."""
    pipe = tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)
    original = SCHEDULERS["DDIM"].from_config(SCHEDULERS["DDIM"].config, set_alpha_to_one=True)
    schedule = olss_fast.NoiseSchedule.from_diffusers(original)
    plan = olss_fast.solvers.ddim(schedule, STEPS, spacing="leading")
    # diffusers ends on the first training timestep with alpha 1, as plans do, but keeps its levels in float32
    expected = sample(pipe, original, prompt="a cat", image=IMAGE, strength=0.7)
    found = sample(pipe, PlanScheduler.from_pipe(pipe, plan), prompt="a cat", image=IMAGE, strength=0.7)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_batch_with_a_generator_for_each_image() -> None:
    pipe = tiny.stable_diffusion()
    original = SCHEDULERS["Euler ancestral"]

    def batch(scheduler: Any) -> torch.Tensor:
        pipe.scheduler = scheduler
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        call = {"num_inference_steps": STEPS, "output_type": "latent", **SIDES}
        return pipe(["a cat", "a dog"], generator=generators, **call).images

    expected = batch(copy.deepcopy(original))
    found = batch(PlanScheduler.from_pipe(pipe, capture(original, STEPS)))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", ["DDIM", "Heun"])
def test_split_denoising_over_two_pipelines(name: str) -> None:
    """SDXL's base hands its latents on part of the way, after Heun's first evaluation of a step: `denoising_end`, then
    `denoising_start`. Either part may run the plan or the scheduler itself."""
    base, refiner = tiny.sdxl(), tiny.sdxl(diffusers.StableDiffusionXLImg2ImgPipeline)
    original = SCHEDULERS[name]
    plan = PlanScheduler(capture(original, STEPS), original)
    halves = [
        sample(base, copy.deepcopy(scheduler), prompt="a cat", denoising_end=0.6, **SIDES)
        for scheduler in (original, plan)
    ]
    expected, *found = (
        sample(refiner, copy.deepcopy(scheduler), prompt="a cat", image=half, denoising_start=0.6)
        for half in halves
        for scheduler in (original, plan)
    )
    for latents in found:
        assert (latents - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_callback_that_edits_the_latents() -> None:
    """DDIM goes on from the edited sample, and so does its plan: in place and as a new tensor."""

    def in_place(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            values["latents"].mul_(0.5)
        return values

    def anew(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.5} if i in (0, 3) else values

    for callback in (in_place, anew):
        pipe = tiny.stable_diffusion()
        assert_same(pipe, SCHEDULERS["DDIM"], prompt="a cat", callback_on_step_end=callback, **SIDES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """As near to the float32 run as the original scheduler is in half precision, which rounds every state."""
    pipe = tiny.stable_diffusion()
    original = SCHEDULERS["DPM++2M"]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    call = {"prompt": "a cat", **SIDES}
    exact = sample(pipe, copy.deepcopy(original), latents=latents.float(), **call)
    pipe.to(dtype)
    half = sample(pipe, copy.deepcopy(original), latents=latents, **call)
    found = sample(pipe, PlanScheduler.from_pipe(pipe, capture(original, STEPS)), latents=latents, **call)
    assert found.dtype == half.dtype == dtype
    assert (found - exact).norm() <= 2 * (half - exact).norm()


def test_saving_a_whole_pipeline(tmp_path: Any) -> None:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = PlanScheduler.from_pipe(pipe, [capture(SCHEDULERS["UniPC"], steps) for steps in (3, STEPS)])
    pipe.save_pretrained(tmp_path)
    again = tiny.quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert type(again) is type(pipe)
    assert isinstance(again.scheduler, PlanScheduler)
    assert again.scheduler.plans == pipe.scheduler.plans
    expected = sample(pipe, pipe.scheduler, prompt="a cat", **SIDES)
    assert torch.equal(sample(again, again.scheduler, prompt="a cat", **SIDES), expected)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_learned_plan_for_one_strength(strength: float) -> None:
    """A plan for a start part of the way serves that strength; another is refused, and says how to get one."""
    pipe = tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)
    schedule = olss_fast.NoiseSchedule.from_diffusers(pipe.scheduler)
    part = truncate(olss_fast.solvers.ddim(schedule, 10, spacing="leading"), schedule, 7)
    facts = {**part.metadata, "method": "olss", "num_inference_steps": "10", "begin": "7"}
    ours = PlanScheduler.from_pipe(pipe, part.replace(metadata=facts))
    call = {"prompt": "a cat", "image": IMAGE, "num_inference_steps": 10}
    expected = capture(diffusers.DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True), 10)
    if strength == 0.9:
        with pytest.raises(olss_fast.errors.InputError, match="tune_pipeline"):
            sample(pipe, ours, strength=strength, **call)
        return
    reference = sample(pipe, PlanScheduler.from_pipe(pipe, expected), strength=strength, **call)
    found = sample(pipe, ours, strength=strength, **call)
    assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()  # float32 levels of the captured one
    assert torch.all(ours.timesteps.diff() < 0)
