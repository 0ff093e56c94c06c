"""A network whose exact outputs are known, what is asked of it, and efforts small enough for tests: the least there is,
one that takes every step once, and one whose fits get better step by step."""

from __future__ import annotations

import torch

import olss_fast
from olss_fast.testing import NULL_CLASS, ExactMixture
from olss_fast.tuning.study import Effort

LEAST = Effort(
    polish_iterations=1, jacobian_samples=1, jacobian_evaluations=1, path_samples=1, node_moves=(), split_up_to=0
)
LITTLE = Effort(
    polish_iterations=1, jacobian_samples=4, jacobian_evaluations=40, path_samples=4, node_moves=(2,), split_up_to=0
)
SOME = Effort(polish_iterations=2, jacobian_samples=8, path_samples=6, node_moves=(4,), split_up_to=3)

SAMPLES, SHAPE = 48, (2, 4, 4)
SCHEDULE = olss_fast.NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)


def mixture(schedule: olss_fast.NoiseSchedule = SCHEDULE) -> ExactMixture:
    means = torch.randn((24, *SHAPE), generator=torch.Generator().manual_seed(1)) * 0.5
    return ExactMixture(schedule, means, 0.2, classes=6)


def problem(samples: int = SAMPLES) -> dict[str, object]:
    generator = torch.Generator().manual_seed(2)
    return {
        "noise": torch.randn((samples, *SHAPE), generator=generator),
        "schedule": SCHEDULE,
        "conditioning": {"y": torch.arange(samples) % 6},
        "unconditional": {"y": NULL_CLASS},
        "guidance_scale": 2.0,
        "progress": False,
    }


class Counting:
    """Counts calls and stops after `left` of them, as a killed process would."""

    def __init__(self, network: ExactMixture, left: int = 10**9) -> None:
        self.network, self.left, self.calls = network, left, 0

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left, self.calls = self.left - 1, self.calls + 1
        return self.network(x, timestep, **conditioning)
