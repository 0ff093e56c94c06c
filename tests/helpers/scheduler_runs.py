"""Diffusers schedulers driven as pipelines drive them, on random tensors with a fixed "network"."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from olss_fast.capturing.capturing import capture
from olss_fast.plan.plan import Plan

IN_FLOAT32 = 1e-6
IN_FLOAT64 = 1e-10

CASTS_TO_FLOAT32 = {
    "DPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosScheduler",
    "LTXEulerAncestralRFScheduler", "SCMScheduler",
}  # fmt: skip
"""Classes that round a float64 sample (SCM: only the noise) to float32 themselves, where 1e-10 cannot be met."""

OWN_ROUNDING = {
    "DDPMWuerstchenScheduler": 2e-6,  # epsilon / alpha with alpha = 0.006 at the first step
    "DEISMultistepScheduler": 6e-5,  # flow, 2 steps: differences of logarithms of nearly equal sigmas
    "FlowMatchHeunDiscreteScheduler": 4e-5,  # 2 steps: (x - x0) / sigma at sigma = 0.001
    "HeunDiscreteScheduler": 4e-5,  # 2 steps: the same at sigma = 0.01
    "KDPM2AncestralDiscreteScheduler": 6e-5,  # the same
    "TCDScheduler": 2e-6,  # as DDPMWuerstchen
}
"""Bounds in float32 of classes that lose digits by their own arithmetic, about twice what was found.

In float64 the same runs agree to IN_FLOAT64; of those that cast to float32, `capture` checks it to 1e-9 with the casts
undone."""

SHAPE = (2, 3, 4, 5)
DRAWS_FLOAT32 = {
    "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler", "SCMScheduler",
}  # fmt: skip
"""Schedulers that draw their noise in float32, whatever the dtype of the sample."""


def check_plan(
    scheduler: Any, steps: int | None, *, bound: float | None = None, begin: int = 0, step: Any = None, **arguments: Any
) -> Plan:
    """Asserts that the captured plan equals the scheduler in float32 and in float64; `bound` is for float32."""
    name = type(scheduler).__name__
    plan = capture(scheduler, steps, begin=begin, step_arguments=step, **arguments)
    settings = {"noises": plan.noises, "step": step, "begin": begin, **arguments}
    with np.errstate(all="ignore"):
        single, double = (drive(scheduler, steps, dtype, **settings) for dtype in (torch.float32, torch.float64))
    bound = bound or OWN_ROUNDING.get(name, IN_FLOAT32)
    assert deviation(single, plan.rows) <= bound, f"{name}, {steps} steps, float32"
    assert deviation(double, plan.rows) <= (bound if name in CASTS_TO_FLOAT32 else IN_FLOAT64), f"{name}, {steps} steps"
    return plan


def remember_quadratures(monkeypatch: pytest.MonkeyPatch) -> None:
    """LMS integrates every coefficient by quadrature, in every run; with this, each is computed once."""
    original, known = diffusers.LMSDiscreteScheduler.get_lms_coefficient, {}

    def remembered(self: Any, order: int, t: int, current_order: int) -> float:
        key = (order, t, current_order, self.sigmas.numpy().tobytes())
        if key not in known:
            known[key] = original(self, order, t, current_order)
        return known[key]

    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "get_lms_coefficient", remembered)


@dataclass
class Run:
    """Network inputs and the sample, and the states they were scaled from, (S+1, elements); the basis of the plan."""

    inputs: np.ndarray
    states: np.ndarray
    basis: np.ndarray


def drive(
    scheduler: Any,
    steps: int | None,
    dtype: torch.dtype,
    *,
    noises: int = 0,
    begin: int = 0,
    step: Any = None,
    **arguments: Any,
) -> Run:
    """The ordinary loop of a pipeline, with a seeded generator where `step` takes one.

    With `begin`, the loop of image-to-image pipelines, whose first network input is the first basis tensor.
    """
    scheduler = copy.deepcopy(scheduler)
    counts = {} if steps is None else {"num_inference_steps": steps}
    scheduler.set_timesteps(**counts, **arguments)
    timesteps = scheduler.timesteps
    if type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        timesteps = timesteps[:-1]  # as their pipelines do
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    random = np.random.default_rng(3)
    start, *outputs = (torch.from_numpy(random.standard_normal(SHAPE)).to(dtype) for _ in range(1 + len(timesteps)))
    generator = torch.Generator().manual_seed(7)
    takes_one = "generator" in inspect.signature(scheduler.step).parameters
    advance = stepping(scheduler, timesteps, {**(step or {}), **({"generator": generator} if takes_one else {})})
    scaled = getattr(scheduler, "scale_model_input", lambda state, _: state)
    state = start * (getattr(scheduler, "init_noise_sigma", 1.0) if not begin else 1.0)
    if begin:
        state = start * (start / scaled(start, timesteps[begin])).mean()
    states, inputs = [state], []
    for i in range(begin, len(timesteps)):
        inputs.append(scaled(states[-1], timesteps[i]))
        states.append(advance(outputs[i - begin], i, states[-1]))
    outputs = outputs[: len(inputs)]
    drawn = _noises(noises, torch.float32 if type(scheduler).__name__ in DRAWS_FLOAT32 else dtype)
    return Run(_flat([*inputs, states[-1]]), _flat(states), _flat([start, *outputs, *drawn]))


def stepping(scheduler: Any, timesteps: Any, arguments: dict[str, Any]) -> Callable[..., Any]:
    """step(output, index, state), with what the pipelines of some schedulers hand over besides."""
    name, memory = type(scheduler).__name__, [None]

    def advance(output: Any, index: int, state: Any) -> Any:
        timestep, extra = timesteps[index], {}
        if name == "CogVideoXDPMScheduler":
            back = None if memory[0] is None else timesteps[index - 1]
            state, memory[0] = scheduler.step(output, memory[0], timestep, back, state, **arguments, return_dict=False)
            return state
        if name == "DDPMWuerstchenScheduler":
            timestep = timestep.expand(len(state))
        if name == "UnCLIPScheduler":
            extra = {"prev_timestep": timesteps[index + 1] if index + 1 < len(timesteps) else None}
        return scheduler.step(output, timestep, state, **extra, **arguments, return_dict=False)[0]

    return advance


def deviation(run: Run, rows: np.ndarray) -> float:
    """Largest error of rows · basis, in units of the scheduler's state, relative to the largest state so far.

    A scheduler rounds its *state*: where that starts at sigma = 80, float32 leaves 5e-6 on it, whatever the size of the
    network input (the state times c_in) or of the sample that it later becomes.
    """
    size = np.abs(run.states).max(axis=1)
    scale = size / np.abs(run.inputs).max(axis=1)  # of the state against the input
    error = scale * np.abs(rows @ run.basis - run.inputs).max(axis=1)
    return float((error / np.maximum.accumulate(size)).max())


def _noises(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def _flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.stack([tensor.double() for tensor in tensors]).reshape(len(tensors), -1).numpy()
