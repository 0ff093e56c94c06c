"""Runs of a PlanScheduler and what they must give: rows · basis in float64, with a network that nobody could guess."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from olss_fast import NoiseSchedule, Plan, PlanScheduler

diffusers.logging.set_verbosity_error()

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
DDIM = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
DPM = diffusers.DPMSolverMultistepScheduler(**BETAS)
ANCESTRAL = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
SHAPE = (2, 4, 6, 5)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: Tensor, timestep: Any) -> Tensor:
    """Neither a plan nor a scheduler could guess it: mixes pixels, bends, and looks at the time."""
    return torch.sin(x.roll(1, -1) + float(timestep) / 300.0).to(x.dtype)


def reference(plan: Plan, start: Tensor, noises: list[Tensor] | None = None) -> Tensor:
    """rows · basis in float64; `start` stands for x_T."""
    basis = [start.double()] + [torch.zeros_like(start, dtype=torch.float64)] * plan.nfe + (noises or [])

    def row(k: int) -> Tensor:
        return sum(float(weight) * column for weight, column in zip(plan.rows[k], basis, strict=False))

    for k, timestep in enumerate(plan.timesteps):
        basis[1 + k] = network(row(k), timestep)
    return row(plan.nfe)


def run(scheduler: PlanScheduler, start: Tensor, *, begin: int = 0, **step: Any) -> Tensor:
    """A pipeline's loop from timesteps[begin:]."""
    sample = start
    for timestep in scheduler.timesteps[begin:]:
        output = network(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(output, timestep, sample, return_dict=False, **step)[0]
    return sample


def sampled(scheduler: PlanScheduler, steps: int, start: Tensor = NOISE) -> Tensor:
    scheduler.set_timesteps(steps)
    return run(scheduler, start * scheduler.init_noise_sigma)


def learned(plan: Plan, **metadata: str) -> Plan:
    return plan.replace(metadata={"method": "olss", "prediction_type": "epsilon", **metadata})
