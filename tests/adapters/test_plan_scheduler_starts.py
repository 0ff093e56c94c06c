"""PlanScheduler where a run begins part of the way; noise added."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from plan_runs import BETAS, DDIM, DPM, NOISE, SCHEDULE, learned, network, reference, run

from olss_fast import NoiseSchedule, PlanScheduler, capture, solvers
from olss_fast.errors import InputError
from olss_fast.solvers.rederive import rederive, truncate
from olss_fast.solvers.table import TABLE

pytestmark = pytest.mark.filterwarnings("ignore")


# --- where a run begins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["set_begin_index", "view", "number", "CPU tensor"])
def test_the_start_is_found(how: str) -> None:
    scheduler = PlanScheduler(capture(DPM, 6))
    scheduler.set_timesteps(6)
    if how == "set_begin_index":
        scheduler.set_begin_index(2)
        assert scheduler.begin_index == 2
    expected = reference(capture(DPM, 6, begin=2), NOISE)
    sample = NOISE
    for k, timestep in enumerate(scheduler.timesteps[2:]):
        told = {"number": timestep.item(), "CPU tensor": timestep.clone(), "view": timestep}.get(how, 0)
        sample = scheduler.step(network(sample, timestep), told, sample).prev_sample
        assert scheduler.step_index == 3 + k
    torch.testing.assert_close(sample, expected, rtol=1e-10, atol=1e-10)


def test_the_start_of_order_two() -> None:
    """Timesteps 0, 1, 1, 2, 2, …: by value a repeated one means its second place, where a step begins."""
    heun = diffusers.HeunDiscreteScheduler(**BETAS)
    scheduler = PlanScheduler(capture(heun, 5))
    scheduler.set_timesteps(5)
    heun.set_timesteps(5)
    heun.set_begin_index(4)
    expected = run(heun, NOISE, begin=4)
    sample = NOISE
    for timestep in scheduler.timesteps[4:].tolist():
        output = network(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(output, timestep, sample).prev_sample
    torch.testing.assert_close(sample, expected, rtol=1e-6, atol=1e-6)  # the original's tables are float32


@pytest.mark.parametrize(
    ("solver", "settings"), [(row.function, settings) for row in TABLE.values() for settings in row.tried]
)
def test_truncated_analytic_plans(solver: Any, settings: dict[str, Any]) -> None:
    """Derived from metadata alone, a whole plan comes out the same, and every truncation starts at its own level."""
    plan = solver(SCHEDULE, 9, **settings)
    assert rederive(plan, SCHEDULE, plan.timesteps) == plan
    asked_twice = plan.timesteps[:-1] == plan.timesteps[1:]  # the first answer at such a time completes a step
    for begin in range(1, 9):
        if begin < 8 and asked_twice[begin]:
            with pytest.raises(InputError, match="in the middle of a step"):
                truncate(plan, SCHEDULE, begin)
            continue
        part = truncate(plan, SCHEDULE, begin)
        np.testing.assert_array_equal(part.timesteps, plan.timesteps[begin:])
        np.testing.assert_allclose(part.alphas, plan.alphas[begin:], atol=1e-14)
        assert part.rows[0, 0] == 1.0
        assert np.abs(part.point_mass_residual()[1:]).max() < 1e-10


def test_truncation_of_stochastic_and_scaled_plans() -> None:
    schedule = NoiseSchedule.edm()
    for plan in (solvers.ddim(schedule, 6, eta=0.5), solvers.euler_ancestral(schedule, 6)):
        part = truncate(plan, schedule, 2)
        assert (part.noises, part.rows[0, 0]) == (3, pytest.approx(1.0, abs=1e-15))
        assert part.metadata["eta"] == plan.metadata["eta"]


def test_truncation_needs_the_schedule_of_the_plan_itself() -> None:
    plan = solvers.ddim(SCHEDULE, 5)
    scheduler = PlanScheduler(plan)  # without the network's scheduler: the plan's own levels do
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    assert scheduler.timesteps.tolist() == plan.timesteps.tolist()
    linear = {**diffusers.DDIMScheduler(beta_schedule="linear").config, "_class_name": "DDIMScheduler"}
    other = PlanScheduler(solvers.ddim(SCHEDULE, 5), linear)
    other.set_timesteps(5)
    with pytest.raises(InputError, match="made for schedule"):
        other.set_begin_index(2)


def test_learned_plans_begin_where_they_were_fitted() -> None:
    part = truncate(solvers.ddim(SCHEDULE, 8), SCHEDULE, 5)
    scheduler = PlanScheduler(learned(part, num_inference_steps="8", begin="5"), DDIM)
    scheduler.set_timesteps(8)
    assert len(scheduler.timesteps) == 8
    assert torch.all(scheduler.timesteps.diff() < 0)
    assert scheduler.timesteps[0] == 999
    torch.testing.assert_close(run(scheduler, NOISE, begin=5), reference(part, NOISE))
    scheduler.set_timesteps(8)
    for wrong in (0, 4):
        with pytest.raises(InputError, match=r"fitted for the last 3 of 8 steps, but this run takes .*tune_pipeline"):
            scheduler.set_begin_index(wrong)
    whole = PlanScheduler(learned(solvers.ddim(SCHEDULE, 8)))
    whole.set_timesteps(8)
    with pytest.raises(InputError, match="tune_pipeline"):
        whole.step(NOISE, whole.timesteps[3], NOISE)


@pytest.mark.parametrize("begin", [-1, 5, 2.0, "a"])
def test_impossible_starts(begin: Any) -> None:
    scheduler = PlanScheduler(capture(DPM, 5))
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="cannot begin at index"):
        scheduler.set_begin_index(begin)


# --- noise added ------------------------------------------------------------------------------------------------------


def test_add_noise() -> None:
    """The plan's own levels at its times, the training schedule's between them; a batch of timesteps."""
    plan = solvers.ddim(SCHEDULE, 5)
    scheduler = PlanScheduler(plan, DDIM)
    scheduler.set_timesteps(5)
    image, noise = NOISE.float(), NOISE.flip(0).float()
    times = torch.tensor([int(plan.timesteps[2]), 37])
    expected = DDIM.add_noise(image, noise, times)
    torch.testing.assert_close(scheduler.add_noise(image, noise, times), expected, rtol=1e-5, atol=1e-5)
    for one in (37, torch.tensor(37), torch.tensor([37])):
        torch.testing.assert_close(scheduler.add_noise(image, noise, one)[1], expected[1], rtol=1e-5, atol=1e-5)
    half = scheduler.scale_noise(image.half(), times, noise.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)
    alone = PlanScheduler(plan)
    alone.set_timesteps(5)
    torch.testing.assert_close(alone.add_noise(image, noise, times[:1])[0], expected[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="timestep"):
        alone.add_noise(image, noise, times)
    with pytest.raises(InputError, match="set_timesteps"):
        PlanScheduler(plan).add_noise(image, noise, times)
