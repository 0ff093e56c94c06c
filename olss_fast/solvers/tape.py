"""The tape: a solver written as formulas runs on it once and leaves a Plan.

Every quantity a linear solver handles is a combination of [x_T | f_0 .. f_{S-1} | z_1 .. z_Z]; on the tape it *is* the
vector of its coefficients. `Tape.evaluate` notes the network input and answers with the conversions of a fresh unit
vector; so the solver's own arithmetic, in float64, assembles the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule, checked_schedule
from olss_fast.support.arguments import check_count, checked_number

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


class Tape:
    """Records one run of a solver with `nfe` evaluations and `noises` fresh noises.

    `start` is the amplitude of x_T in the first state; by default `schedule.start_amplitude`, the spread of the state
    for data of unit variance (1 for variance-preserving schedules).
    """

    def __init__(self, schedule: NoiseSchedule, nfe: int, *, noises: int = 0, start: float | None = None) -> None:
        expected = "a positive amplitude of the initial noise, or None"
        if start is not None and checked_number("start", start, expected) <= 0.0:
            raise InputError(f"start is {start!r}; expected {expected}")
        check_count(nfe, "the number of evaluations is")
        self._schedule = schedule
        self._start = start
        self._first_noise = 1 + nfe
        self._identity = np.eye(1 + nfe + noises)
        self._noises_used = 0
        self._rows: list[Vector] = []
        self._levels: list[Level] = []

    @property
    def straight_coordinates(self) -> bool:
        """Whether x / (alpha + sigma) is the state to integrate, because the schedule starts without signal."""
        return bool(self._schedule.alpha(self._schedule.first) == 0.0)

    def start(self, level: Level) -> Vector:
        """The first state: scaled initial noise."""
        amplitude = self._schedule.start_amplitude(level.timestep) if self._start is None else self._start
        return np.asarray(amplitude * self._identity[0])

    def path(self, levels: Sequence[Level]) -> Iterator[tuple[Level, Level]]:
        """Each level with the next, the last with the clean sample."""
        return pairwise([*levels, CLEAN])

    def evaluate(self, state: Vector, level: Level) -> Output:
        """Asks the network at `state`: notes the row of its input, returns x0 and eps of its raw output."""
        self._rows.append(level.input_scale * state)
        self._levels.append(level)
        f = self._identity[len(self._rows)]
        a, b, c, d = level.maps
        return Output(level, a * state + b * f, c * state + d * f)

    def noise(self) -> Vector:
        """The next fresh unit noise."""
        self._noises_used += 1
        return np.asarray(self._identity[self._first_noise + self._noises_used - 1])

    def plan(self, sample: Vector, **metadata: object) -> Plan:
        """The plan whose last row is `sample`; `metadata` says method, order, spacing (None is left out)."""
        scales = np.array([level.input_scale for level in self._levels] + [1.0])
        ends = [*self._levels, CLEAN]
        return Plan(
            timesteps=np.array([level.timestep for level in self._levels]),
            rows=np.stack([*self._rows, sample]),
            alphas=scales * [level.alpha for level in ends],
            sigmas=scales * [level.sigma for level in ends],
            metadata=self._schedule.metadata() | {k: str(v) for k, v in metadata.items() if v is not None},
        )


def evaluation_levels(
    schedule: NoiseSchedule, steps: int | None, timesteps: npt.ArrayLike | None, spacing: str
) -> tuple[list[Level], str | None]:
    """The levels that a solver visits, and the name of their spacing (None for times that were given).

    InputError unless exactly one of `steps` and `timesteps` is given and given times are one row of finite numbers
    with strictly falling noise; ScheduleError for times outside the schedule.
    """
    checked_schedule(schedule)
    if (steps is None) == (timesteps is None):
        raise InputError(f"got steps={steps!r} and timesteps={timesteps!r}; pass exactly one of them")
    if steps is not None:
        return levels_of(schedule, schedule.timesteps(steps, spacing)), spacing
    return levels_of(schedule, _checked_times(schedule, timesteps)), None


def _checked_times(schedule: NoiseSchedule, timesteps: npt.ArrayLike | None) -> Vector:
    try:
        times = np.array(timesteps, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"timesteps cannot be read as numbers: {error}; pass a list or an array") from error
    check_count(times.size, "timesteps has length")
    if times.ndim != 1 or times.size == 0 or not np.all(np.isfinite(times)):
        raise InputError(f"timesteps has shape {times.shape}; expected one row of at least one finite number")
    lams = schedule.lam(times)
    if np.any(np.diff(lams) <= 0.0):  # lam rises exactly where the noise falls, whatever the unit of the timestep
        i = int(np.argmax(np.diff(lams) <= 0.0))
        raise InputError(
            f"timesteps {i} and {i + 1} are {float(times[i])!r} and {float(times[i + 1])!r}; expected falling noise"
        )
    check_whole(schedule, times)
    return times


def check_whole(schedule: NoiseSchedule, times: Vector, what: str = "timesteps") -> None:
    """InputError if the schedule wants whole timesteps and these are not."""
    odd = times[times != np.round(times)]
    if schedule.whole_times and odd.size:
        raise InputError(f"{what} hold {odd[0]:g}, but the schedule has whole_times: give whole timesteps")


def check_choice(what: str, value: object, choices: tuple[object, ...]) -> None:
    """InputError unless `value` is one of `choices`."""
    if isinstance(value, bool) or value not in choices:
        raise InputError(f"{what} is {value!r}; choose one of {', '.join(map(str, choices))}")
