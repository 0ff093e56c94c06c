"""Dense output: the states and outputs of a plan's run at any times, not only where it asked the network.

The run of a solver of probability-flow ODEs is known at its evaluations i, as combinations of its basis
[x_T | f_0 .. f_{S-1}]. In between, the x0 prediction is the cubic through the two evaluations on either side, and the
state an exponential integral of such a cubic from the evaluation before (`exponential`), plus the share of what is
missing to the state of the evaluation after, so that it meets both. Beyond the last evaluation cubics are
extrapolated. The error is of fourth order in the distance of the evaluations, below that of the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import Node, Space, correction, fit_weights, lagrange_rule, transfer
from olss_fast.solvers.tape import Level, Vector, levels_of

SAME = 1e-9  # lam, within which two times are one
START = 1e-3  # alpha / (alpha + sigma), within which two starts are one


@dataclass(frozen=True)
class Dense:
    """Rows over a plan's basis (columns 1 + S): `inputs` (G, 1 + S) form the network inputs at G times, `outputs`
    (G, 1 + S) the raw outputs there."""

    inputs: Vector
    outputs: Vector


def is_dense(plan: Plan, schedule: NoiseSchedule) -> bool:
    """Whether `dense` knows the plan's run on all of the schedule: it begins at the noise end, draws no noise, and the
    noise falls from each evaluation to the next (Heun and PNDM ask some times twice)."""
    if plan.branches != 1 or plan.noises:
        return False
    try:
        lams = schedule.lam([schedule.first, *plan.timesteps])
    except ScheduleError:
        return False
    return abs(lams[0] - lams[1]) <= SAME and bool(np.all(np.diff(lams[1:]) > SAME))


def dense(plan: Plan, schedule: NoiseSchedule, times: npt.ArrayLike, wanted: NoiseSchedule | None = None) -> Dense:
    """The plan's run at `times` (G,), timesteps of `schedule` from the plan's first one on. InputError otherwise.

    With a schedule `wanted` the times are its own, and so are the scale of the inputs and what the outputs predict:
    states of equal alpha / sigma differ in their scale only.
    """
    if not is_dense(plan, schedule):
        raise InputError("this plan asks at some noise levels twice, draws noise or begins late; its run is not known")
    norms, levels = _unit_levels(schedule, plan.timesteps)
    scales, targets = _unit_levels(wanted or schedule, np.asarray(times, dtype=np.float64))
    units = np.eye(plan.columns)[1:]
    states = plan.rows[:-1] / norms
    values = [level.maps[0] * states[i] + level.maps[1] * units[i] for i, level in enumerate(levels)]
    run = _Run(levels, states, values)
    found = [run.at(level) for level in targets]
    outputs = [(x0 - level.maps[0] * state) / level.maps[1] for level, (state, x0) in zip(targets, found, strict=True)]
    return Dense(scales * np.stack([state for state, _ in found]), np.stack(outputs))


def _unit_levels(schedule: NoiseSchedule, times: Vector) -> tuple[Vector, list[Level]]:
    """The levels of states x / n, n^2 = alpha^2 + sigma^2, and the factors (G, 1) from these to network inputs."""
    levels = levels_of(schedule, times)
    norms = [float(np.hypot(level.alpha, level.sigma)) for level in levels]
    unit = [
        replace(level, alpha=level.alpha / n, sigma=level.sigma / n, maps=(level.maps[0] * n, *level.maps[1:]))
        for n, level in zip(norms, levels, strict=True)
    ]
    return np.array([[n * level.input_scale] for n, level in zip(norms, levels, strict=True)]), unit


@dataclass(frozen=True)
class _Run:
    levels: list[Level]
    states: Vector
    values: list[Vector]

    def at(self, target: Level) -> tuple[Vector, Vector]:
        """State and x0 prediction at `target`."""
        lams = [level.lam for level in self.levels]
        i = int(np.searchsorted(lams, target.lam + SAME, side="right")) - 1
        if i < 0 and not begins_by(self.levels[0], target):
            raise InputError(f"timestep {target.timestep:g} lies before the plan's first, {self.levels[0].timestep:g}")
        i = max(i, 0)
        if target.lam - lams[i] <= SAME:
            return self.states[i], self.values[i]
        nodes: list[Node] = [(self.levels[j], self.values[j]) for j in (i, i + 1, i - 1, i + 2) if 0 <= j < len(lams)]
        state = self._integral(i, target, nodes)
        if i + 1 < len(lams):
            after = self.levels[i + 1]
            share = (target.lam - lams[i]) / (after.lam - lams[i])
            state = state + share * (self.states[i + 1] - self._integral(i, after, nodes))
        return state, _interpolated(target, nodes)

    def _integral(self, i: int, target: Level, nodes: list[Node]) -> Vector:
        step = transfer(self.states[i], self.values[i], self.levels[i], target)
        return np.asarray(step + correction(target, nodes, lagrange_rule, Space.DATA))


def begins_by(first: Level, target: Level) -> bool:
    """Whether a run that begins at `first` has begun when the noise is as low as at `target`."""
    return _signal(first) < _signal(target) + START


def _interpolated(target: Level, nodes: list[Node]) -> Vector:
    """The value at `target` of the polynomial in alpha / (alpha + sigma) through the nodes."""
    (source, value), others = nodes[0], nodes[1:]
    if not others:
        return value
    h = _signal(target) - _signal(source)
    weights = fit_weights([(_signal(level) - _signal(source)) / h for level, _ in others], np.ones(len(others)))
    return np.asarray(value + weights @ np.stack([v - value for _, v in others]))


def _signal(level: Level) -> float:
    """alpha / (alpha + sigma): x0 predictions are smooth in it at both ends, where lam is infinite."""
    return level.alpha / (level.alpha + level.sigma)
