"""Rows as increments: the same plan, in fewer digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from plan_runs import BETAS, SCHEDULE
from torch import Tensor

from olss_fast import Plan, PlanScheduler, Sampler, capture, sample, solvers
from olss_fast.executors import fused
from olss_fast.executors.increments import Increments, increments

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 10
NOISY = {"beta_start": 0.01, "beta_end": 0.02}  # alpha_S / alpha_T is beyond 1,000
SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler(clip_sample=False),
    "DDIM, noisy": diffusers.DDIMScheduler(**NOISY, clip_sample=False, set_alpha_to_one=False),
    "PNDM": diffusers.PNDMScheduler(**NOISY, set_alpha_to_one=False),
    "Euler": diffusers.EulerDiscreteScheduler(),
    "Heun": diffusers.HeunDiscreteScheduler(),
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(),
    "DPM++ 2M, SD": diffusers.DPMSolverMultistepScheduler(**BETAS),
    "UniPC": diffusers.UniPCMultistepScheduler(),
    "DEIS": diffusers.DEISMultistepScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
}


def network(x: Tensor, timestep: Any) -> Tensor:
    """Nearly the noise of data with a spread: of x it returns the more, the noisier x is."""
    time = float(torch.as_tensor(timestep).flatten()[0])
    share = time / (time + 1.0)
    return share * x + 0.1 * torch.sin(3 * x)


def run(scheduler: Any, noise: Tensor) -> Tensor:
    scheduler.set_timesteps(STEPS)
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scaled = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(scaled(x, timestep), timestep), timestep, x).prev_sample
    return x.double()


def slot(plan: Plan, original: Any, noise: Tensor) -> Tensor:
    return run(PlanScheduler(plan, original), noise)


def loop(plan: Plan, original: Any, noise: Tensor) -> Tensor:
    """Compiled on the CPU."""
    return Sampler(network, plan)(noise).double()


def operators(plan: Plan, original: Any, noise: Tensor) -> Tensor:
    """The kernels' reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "host_step", lambda state: None)
        return loop(plan, original, noise)


@pytest.mark.parametrize("ours", [slot, loop, operators])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_float32_costs_no_more_than_in_the_original(name: str, ours: Callable[[Plan, Any, Tensor], Tensor]) -> None:
    """Error to float64 at most twice the original's."""
    original = copy.deepcopy(SCHEDULERS[name])
    plan = capture(original, STEPS)
    noise = torch.linspace(-2, 2, 4 * 3 * 8 * 8, dtype=torch.float64).view(3, 4, 8, 8)
    exact = sample(network, plan, noise)

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    assert error(ours(plan, original, noise.float())) <= 2 * error(run(original, noise.float()))


def of(plan: Plan) -> Increments:
    return increments(plan.rows, plan.noise_slice.start)


PLANS = {
    "DDIM": solvers.ddim(SCHEDULE, 5),
    "UniPC": solvers.unipc(SCHEDULE, 6),
    "DDIM, stochastic": solvers.ddim(SCHEDULE, 5, eta=1.0),
    "LCM": capture(diffusers.LCMScheduler(**BETAS), 4),
}


@pytest.mark.parametrize("name", PLANS)
def test_increments_add_up_to_the_rows(name: str) -> None:
    plan = PLANS[name]
    found = of(plan)
    assert found.anchored
    row = plan.rows[0]
    for k, increment in enumerate(found.rows[1:]):
        row = increment[0] * row + np.concatenate([[0.0], increment[1:]])
        np.testing.assert_allclose(row, plan.rows[k + 1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["DDIM", "DDIM, stochastic", "LCM"])
def test_a_one_step_sampler_adds_one_output_and_one_noise(name: str) -> None:
    found = of(PLANS[name]).rows
    outputs = np.argwhere(found[1:, 1 : 1 + PLANS[name].nfe])
    assert outputs.tolist() == [[k, k] for k in range(PLANS[name].nfe)]
    assert (np.count_nonzero(found[1:, 1 + PLANS[name].nfe :], axis=1) <= 1).all()


def test_rows_that_nothing_can_be_added_to_stay_as_they_are() -> None:
    for corner in (0.0, 1e-4):  # the share of x_T in row 2
        rows = [[1, 0, 0, 0], [0.5, 1, 0, 0], [corner, 1, 1, 0], [1, 1, 1, 1]]
        plan = Plan(timesteps=[3, 2, 1], rows=rows, alphas=[0, 0.5, 0.9, 1], sigmas=[1, 0.5, 0.1, 0])
        found = of(plan)
        assert not found.anchored
        assert np.array_equal(found.rows, plan.rows)
