"""Pipelines that look behind the interface of their scheduler: what a plan cannot give them is refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import every_pipeline
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from asking_pipeline import MU, STEPS, Asking

import olss_fast
from olss_fast import PlanScheduler, capture
from olss_fast.adapters.diffusers.pipeline_network import open_pipeline
from olss_fast.errors import InputError

FLOW = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
DDIM = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False)


def asking(plan: olss_fast.Plan, scheduler: Any) -> Asking:
    pipe = Asking(scheduler)
    pipe.scheduler = PlanScheduler.from_pipe(pipe, plan)
    return pipe


def test_a_pipeline_that_asks_for_the_class_takes_the_same_way() -> None:
    own = Asking(FLOW).shifted()
    pipe = asking(capture(FLOW, STEPS, mu=MU), FLOW)
    torch.testing.assert_close(pipe.shifted(), own, rtol=1e-6, atol=0.0)
    assert not isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)  # to everybody else
    assert pipe.scheduler.__class__ is PlanScheduler


def test_other_sigmas_without_the_shift() -> None:
    """As the captured scheduler, which refuses to set them: they would be taken with the shift of another image."""
    ours = PlanScheduler(capture(FLOW, STEPS, mu=MU), FLOW)
    with pytest.raises(InputError, match="without mu"):
        ours.set_timesteps(sigmas=np.linspace(1.0, 0.01, STEPS))


@pytest.mark.parametrize("name", ["betas", "final_alpha_cumprod", "_get_variance"])
def test_what_a_plan_has_not_is_an_error_in_a_pipeline(name: str) -> None:
    pipe = asking(capture(DDIM, STEPS), DDIM)
    for look in (pipe.has, pipe.reads):
        with pytest.raises(InputError, match=rf"Asking reads scheduler\.{name}: DDIMScheduler has it"):
            look(name)
    assert not hasattr(pipe.scheduler, name)


def test_what_no_scheduler_has_can_be_asked_for() -> None:
    pipe = asking(capture(DDIM, STEPS), DDIM)
    assert not pipe.has("scale_everything")
    assert pipe.has("scale_model_input")
    with pytest.raises(AttributeError):
        pipe.reads("scale_everything")


@pytest.mark.parametrize("put", [PlanScheduler.from_pipe, olss_fast.accelerate])
def test_pipelines_of_pipelines(put: Any) -> None:
    """The slot of the outer one is not used: the error says which is."""
    outer, inner = Asking(DDIM), Asking(DDIM)
    outer.decoder_pipe = inner
    with pytest.raises(InputError, match=r"pipe\.decoder_pipe\.scheduler = PlanScheduler\.from_pipe"):
        put(outer, capture(DDIM, STEPS))
    put(inner, capture(DDIM, STEPS))


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
@pytest.mark.parametrize("scheduler", [DDIM, diffusers.HeunDiscreteScheduler(**tiny.BETAS)])
def test_a_strength_that_leaves_no_step(kind: str, scheduler: Any) -> None:
    """diffusers' own schedulers decode a batch of no images there."""
    pipe = tiny.stable_diffusion(getattr(diffusers, kind))
    pipe.scheduler = scheduler
    pipe.scheduler = PlanScheduler.from_pipe(pipe, capture(scheduler, STEPS))
    image = torch.rand(1, 3, tiny.SIZE, tiny.SIZE)
    call = {"image": image, "strength": 0.04, "num_inference_steps": STEPS, "output_type": "latent"}
    if "Inpaint" in kind:
        call |= {"mask_image": (image[:, :1] > 0.5).float(), "height": tiny.SIZE, "width": tiny.SIZE}
    with pytest.raises(InputError, match="Raise strength"):
        pipe("a cat", **call)


def opened(name: str) -> Any:
    """A pipeline of the table of all, opened as `tune_pipeline` opens it; the number of its evaluations."""
    pipe, call = every_pipeline.build(name)
    own = {key: every_pipeline.argument(value) for key, value in call.items() if key != "num_inference_steps"}
    before = dict(vars(pipe))
    try:
        with open_pipeline(pipe, [own], teacher_steps=6) as network:
            return network.evaluations
    finally:
        assert vars(pipe) == before


def test_tuning_refuses_a_pipeline_that_computes_with_its_schedulers_sigmas() -> None:
    with pytest.raises(InputError, match="something else in its own loop than from outside"):
        opened("StableDiffusionLatentUpscalePipeline")


def test_tuning_takes_a_pipeline_that_asks_for_the_class() -> None:
    """Once to begin, once again, two in its own loop, and the second of these from outside."""
    assert opened("BriaPipeline") == 5


def test_times_of_tokens_are_refused() -> None:
    ours = PlanScheduler(capture(DDIM, STEPS))
    ours.set_timesteps(STEPS)
    x = torch.zeros(1, 3)
    with pytest.raises(InputError, match=r"per_token_timesteps of shape \(1, 3\).*its own scheduler"):
        ours.step(x, ours.timesteps[0], x, per_token_timesteps=torch.zeros(1, 3))
