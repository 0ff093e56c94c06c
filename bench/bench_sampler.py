"""The sampling loop on the CPU, around a network that costs nothing: `pytest bench/bench_sampler.py -s`.

Ours are `Sampler` (float32, one pass a step) and `sample` (float64, the specification). They are compared with a loop
of the same plan as one would write it by hand, and `Sampler` also with the loop of a diffusers pipeline around the
DPMSolverMultistepScheduler that the plan was captured from. All must agree before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from olss_fast import Plan, Sampler, capture, sample

STEPS = 10
BY_HAND, OF_DIFFUSERS = "a loop by hand", "diffusers DPM++ 2M"
SHAPE = (1, 4, 64, 64)
SCHEDULER = diffusers.DPMSolverMultistepScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
)
Versus = Callable[..., Any]
Loop = Callable[[], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' log(0) at the clean end


def network(x: Tensor, timestep: Tensor) -> Tensor:
    return 0.5 * x


def by_hand(plan: Plan, noise: Tensor) -> Tensor:
    """rows · basis, float32: a history of outputs, and one product of a row with it a step."""
    rows = torch.tensor(plan.rows, dtype=torch.float32)
    times = torch.tensor(plan.timesteps, dtype=torch.float32)
    basis = torch.empty((plan.columns, noise.numel()))
    basis[0] = noise.flatten()
    for i in range(plan.nfe):
        x = (rows[i, : i + 1] @ basis[: i + 1]).view_as(noise)
        basis[i + 1] = network(x, times[i]).flatten()
    return (rows[plan.nfe] @ basis).view_as(noise)


def of_diffusers(noise: Tensor) -> Tensor:
    """A pipeline's loop."""
    SCHEDULER.set_timesteps(STEPS)
    x = noise * SCHEDULER.init_noise_sigma
    for timestep in SCHEDULER.timesteps:
        output = network(SCHEDULER.scale_model_input(x, timestep), timestep)
        x = SCHEDULER.step(output, timestep, x, return_dict=False)[0]
    return x


def counted(loop: Callable[[Any], Tensor]) -> int:
    """Network calls of one run."""
    calls: list[int] = []

    def counting(x: Tensor, timestep: Tensor) -> Tensor:
        calls.append(1)
        return network(x, timestep)

    loop(counting)
    return len(calls)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return capture(SCHEDULER, STEPS)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def references(plan: Plan, noise: Tensor) -> dict[str, Loop]:
    return {BY_HAND: lambda: by_hand(plan, noise), OF_DIFFUSERS: lambda: of_diffusers(noise)}


def check(ours: Loop, reference: Loop) -> None:
    torch.testing.assert_close(ours(), reference(), rtol=1e-4, atol=1e-4)  # float32, recurrent in diffusers


@pytest.mark.parametrize("against", [BY_HAND, OF_DIFFUSERS])
@torch.no_grad()
def bench_fused(versus: Versus, plan: Plan, noise: Tensor, references: dict[str, Loop], against: str) -> None:
    sampler = Sampler(network, plan, shape=SHAPE, device="cpu")
    check(lambda: sampler(noise), references[against])
    calls = counted(lambda each: Sampler(each, plan, device="cpu")(noise))
    versus(lambda: sampler(noise), references[against], name=against, counts={"evaluations": calls})


@torch.no_grad()
def bench_reference(versus: Versus, plan: Plan, noise: Tensor, references: dict[str, Loop]) -> None:
    by_hand = references[BY_HAND]
    check(lambda: sample(network, plan, noise), by_hand)
    calls = counted(lambda each: sample(each, plan, noise))
    versus(lambda: sample(network, plan, noise), by_hand, name=BY_HAND, counts={"evaluations": calls})
