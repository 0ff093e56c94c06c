"""Heun's method, the trapezoidal rule with an Euler predictor (Karras et al. 2022, algorithm 1). Order 2.

In straight coordinates the probability flow is dy = k du: y = x / c, u = sigma / c with
- c = alpha: k = eps (variance preserving and exploding, k-diffusion's coordinates);
- c = alpha + sigma: k = eps - x0 (flow matching, and schedules that start without signal).
A step from s to t is Euler's (which is `transfer`) plus c_t (u_t - u_s) (k_t - k_s) / 2.

Two evaluations a step, one in the last, which is Euler's: N times take S = 2 N - 1 evaluations. For even S the first
step, where the answer hardly changes, is Euler's too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import transfer
from olss_fast.solvers.tape import CLEAN, Level, Output, Tape, Vector, evaluation_levels
from olss_fast.support.arguments import check_steps


def heun(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> Plan:
    """Heun. `steps` counts evaluations; `timesteps` are the N nodes between steps, for 2 N - 1 evaluations."""
    nodes = None if steps is None else check_steps(steps) // 2 + 1
    levels, spacing_name = evaluation_levels(schedule, nodes, timesteps, spacing)
    nfe = 2 * len(levels) - 1 if steps is None else steps
    tape = Tape(schedule, nfe, start=start)
    sample = _trapezoids(tape, levels, euler_steps=2 * len(levels) - 1 - nfe)
    return tape.plan(sample, method="heun", order=2, spacing=spacing_name)


def _trapezoids(tape: Tape, levels: Sequence[Level], euler_steps: int) -> Vector:
    straight = tape.straight_coordinates
    state = tape.start(levels[0])
    for i, (level, target) in enumerate(tape.path(levels)):
        here = tape.evaluate(state, level)
        state = transfer(state, here.x0, level, target)
        if target is not CLEAN and i >= euler_steps:
            there = tape.evaluate(state, target)
            state = state + 0.5 * _stride(level, target, straight) * (_slope(there, straight) - _slope(here, straight))
    return state


def _slope(output: Output, straight: bool) -> Vector:
    return output.eps - output.x0 if straight else output.eps


def _stride(source: Level, target: Level, straight: bool) -> float:
    """c_t (u_t - u_s)."""
    if not straight:
        return target.sigma - target.alpha * source.rho
    return target.sigma - (target.alpha + target.sigma) * source.sigma / (source.alpha + source.sigma)
