"""diffusers' full-loop tests for every class that can be captured: their dummy model and samples, ten steps.

In float32 a PlanScheduler is at most twice as far from the run in float64 as the scheduler itself: from the start, and
from a noised image on (their full_loop_with_noise).
"""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from scheduler_kinds import KINDS
from scheduler_runs import remember_quadratures, stepping
from torch import Tensor

from olss_fast import PlanScheduler, capture

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, LATER = 10, 8  # of which the last two are taken from a noised image
STEPS_OF = {"ConsistencyDecoderScheduler": 2}
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
COSINE_ONLY = ("UnCLIPScheduler",)
RAISED = {"beta_start": 0.01, "set_alpha_to_one": False}
ELEMENTS = 4 * 3 * 8 * 8
RAMP = torch.arange(ELEMENTS, dtype=torch.float64) / ELEMENTS
SAMPLE, NOISE = (ramp.reshape(3, 8, 8, 4).permute(3, 0, 1, 2).contiguous() for ramp in (RAMP, RAMP.flip(0)))


def model(x: Tensor, timestep: Any) -> Tensor:
    return x * (float(timestep) / (float(timestep) + 1.0))


def options(name: str) -> list[dict[str, Any]]:
    """Their configs: the usual betas, those that begin at 0.01, and the other prediction type."""
    kind = KINDS[name]
    takes = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters
    usual = {**kind.config, **{key: value for key, value in BETAS.items() if key in takes and name not in COSINE_ONLY}}
    raised = {key: value for key, value in RAISED.items() if key in takes and name not in COSINE_ONLY}
    others = [raised] * bool(raised) + [{"prediction_type": "v_prediction"}] * ("v_prediction" in kind.predictions)
    return [usual, *({**usual, **other} for other in others if not name.startswith("KDPM2"))]  # slow to make


CASES = [(name, config) for name in KINDS for config in options(name)]


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(str(each) for key, each in value.items() if key not in BETAS)


class Draws(torch.overrides.TorchFunctionMode):
    """Every Gaussian draw in float32, so that runs in both precisions get the same noises."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") == torch.float64:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        return func(*args, **kwargs)


def full_loop(scheduler: Any, name: str, dtype: torch.dtype, *, noised: bool) -> Tensor:
    """The sample, in float64."""
    scheduler, steps = copy.deepcopy(scheduler), STEPS_OF.get(name, STEPS)
    scheduler.set_timesteps(steps, **KINDS[name].arguments)
    whole = scheduler.timesteps[:-1] if name in ("SCMScheduler", "DDPMWuerstchenScheduler") else scheduler.timesteps
    begin = LATER * getattr(scheduler, "order", 1) if noised else 0
    takes = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": torch.Generator().manual_seed(0)} if takes else {}
    step = stepping(scheduler, whole, arguments)
    if isinstance(scheduler, PlanScheduler):

        def step(output: Tensor, index: int, state: Tensor) -> Tensor:
            return scheduler.step(output, whole[index], state, **arguments).prev_sample  # type: ignore[no-any-return]

    if noised:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        add = scheduler.add_noise if hasattr(scheduler, "add_noise") else scheduler.scale_noise
        state = add(SAMPLE.to(dtype), noise=NOISE.to(dtype), **{_timestep_name(add): whole[begin : begin + 1]})
    else:
        state = SAMPLE.to(dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    with Draws() if takes else nullcontext():
        for index in range(begin, len(whole)):
            scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)(state, whole[index])
            state = step(model(scaled, whole[index]), index, state)
    assert state.dtype == dtype
    return state.double()


def _timestep_name(add: Any) -> str:
    return next(name for name in inspect.signature(add).parameters if name.startswith("timestep"))


@pytest.mark.parametrize(("name", "config"), CASES, ids=case_id)
def test_full_loops(name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    remember_quadratures(monkeypatch)
    own = getattr(diffusers.schedulers, name)(**config)
    ours = PlanScheduler(capture(own, STEPS_OF.get(name, STEPS), **KINDS[name].arguments))
    noises = hasattr(own, "add_noise") or hasattr(own, "scale_noise")
    for noised in (False, True) if noises and name not in STEPS_OF else (False,):
        truth = full_loop(ours, name, torch.float64, noised=noised)
        found, usual = (
            float((full_loop(scheduler, name, torch.float32, noised=noised) - truth).abs().mean())
            for scheduler in (ours, own)
        )
        assert found <= 2.0 * usual, noised
