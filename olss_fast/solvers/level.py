"""What a solver knows of one evaluation: its levels, and what the network's answer says there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from olss_fast.schedule.noise_schedule import NoiseSchedule

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Level:
    """One evaluation time: x = alpha x0 + sigma eps, lam = log(alpha / sigma), and how outputs convert to both."""

    timestep: float
    alpha: float
    sigma: float
    lam: float
    input_scale: float = 1.0
    maps: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)

    @property
    def rho(self) -> float:
        """sigma / alpha: the noise level in variance-exploding coordinates; inf where there is no signal."""
        return self.sigma / self.alpha if self.alpha > 0.0 else np.inf


CLEAN = Level(timestep=np.nan, alpha=1.0, sigma=0.0, lam=np.inf)
"""The end point of every solver: the sample, without noise."""


@dataclass(frozen=True, slots=True)
class Output:
    """The clean data and the noise by one evaluation, as coefficient vectors."""

    level: Level
    x0: Vector
    eps: Vector


def levels_of(schedule: NoiseSchedule, timesteps: Sequence[float] | Vector) -> list[Level]:
    """One Level a timestep."""
    times = np.asarray(timesteps, dtype=np.float64)
    columns = [times, *schedule.levels(times), schedule.input_scale(times), *schedule.prediction_maps(times)]
    table = np.stack(columns, axis=1).tolist()
    return [Level(t, alpha, sigma, lam, scale, (a, b, c, d)) for t, alpha, sigma, lam, scale, a, b, c, d in table]
