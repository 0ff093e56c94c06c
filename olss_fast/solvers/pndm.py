"""PNDM / PLMS and iPNDM: DDIM's transfer with an Adams-Bashforth average of the noise predictions.

    x_t = alpha_t (x_s - sigma_s e) / alpha_s + sigma_t e,     e = sum_j a_j eps_{s-j}

with the classical coefficients a of equally spaced times (Liu et al., PNDM, 2022, section 3.2-3.3; Zhang & Chen,
iPNDM, 2023, appendix: orders 1, 2, .. as history grows). On the point mass, and in the first step, this is DDIM.
The transfer is exact for constant eps only, so the order of convergence is 2 at most, whatever the average is. As
published, the last step, on to the clean sample, averages too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy.typing as npt

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import SIGNAL_RATIO_LIMIT, transfer
from olss_fast.solvers.tape import CLEAN, Level, Output, Tape, Vector, check_choice, evaluation_levels, levels_of
from olss_fast.support.arguments import check_steps

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the last 1, 2, 3 and 4 answers, newest first."""

_RUNGE_KUTTA_NODES = 4  # three Runge-Kutta steps need four nodes


def ipndm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 4,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> Plan:
    """iPNDM, `order` 1 to 4; the first steps use as many answers as there are."""
    check_choice("order", order, (1, 2, 3, 4))
    levels, spacing_name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), start=start)
    sample = _adams_bashforth(tape, tape.start(levels[0]), levels, [], order)
    return tape.plan(sample, method="ipndm", order=order, spacing=spacing_name)


def pndm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    runge_kutta: bool = False,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> Plan:
    """PNDM of order 4. `steps` counts evaluations; `timesteps` are the N nodes between steps.

    The first step is a trapezoid that asks the second node twice, N + 1 evaluations ("PLMS", the default), or the
    first three are Runge-Kutta steps of 4 evaluations, N + 9 in all. InputError for impossible counts.
    """
    extra = 9 if runge_kutta else 1
    levels, spacing_name = evaluation_levels(schedule, _nodes(steps, extra), timesteps, spacing)
    if runge_kutta and len(levels) < _RUNGE_KUTTA_NODES:
        raise InputError(f"{len(levels)} timesteps; PNDM with Runge-Kutta starts needs at least {_RUNGE_KUTTA_NODES}")
    tape = Tape(schedule, len(levels) + (extra if len(levels) > 1 else 0), start=start)
    sample = _runge_kutta_start(tape, schedule, levels) if runge_kutta else _trapezoid_start(tape, levels)
    return tape.plan(
        sample, method="pndm", order=4, spacing=spacing_name, variant="runge_kutta" if runge_kutta else "plms"
    )


def _nodes(steps: int | None, extra: int) -> int | None:
    if steps is None or (extra == 1 and check_steps(steps) == 1):
        return steps
    least = 3 if extra == 1 else extra + _RUNGE_KUTTA_NODES
    if check_steps(steps) < least:
        raise InputError(
            f"PNDM cannot take {steps} evaluations; expected {'1, or ' if extra == 1 else ''}at least {least}"
        )
    return steps - extra


def _averaged(
    state: Vector, first: Output, target: Level, outputs: Sequence[Output], weights: Sequence[float]
) -> Vector:
    """The transfer from `first.level` with e = sum weights * eps. Where there is no signal to divide by, e = eps_s."""
    source = first.level
    plain = transfer(state, first.x0, source, target)
    if target.alpha > SIGNAL_RATIO_LIMIT * source.alpha:
        return plain
    excess = sum(w * (output.eps - first.eps) for w, output in zip(weights, outputs, strict=True))
    return plain + (target.sigma - target.alpha * source.rho) * excess


def _adams_bashforth(
    tape: Tape, state: Vector, levels: Sequence[Level], history: Sequence[Output], order: int
) -> Vector:
    """From `state` at levels[0] on to the clean sample; `history` holds earlier answers, newest first."""
    outputs = list(history)
    for level, target in tape.path(levels):
        outputs = [tape.evaluate(state, level), *outputs][:order]
        state = _averaged(state, outputs[0], target, outputs, ADAMS_BASHFORTH[len(outputs) - 1])
    return state


def _trapezoid_start(tape: Tape, levels: Sequence[Level]) -> Vector:
    state = tape.start(levels[0])
    first = tape.evaluate(state, levels[0])
    if len(levels) == 1:
        return transfer(state, first.x0, levels[0], CLEAN)
    guess = tape.evaluate(transfer(state, first.x0, levels[0], levels[1]), levels[1])
    state = _averaged(state, first, levels[1], [first, guess], (0.5, 0.5))
    return _adams_bashforth(tape, state, levels[1:], [first], len(ADAMS_BASHFORTH))


def _runge_kutta_start(tape: Tape, schedule: NoiseSchedule, levels: Sequence[Level]) -> Vector:
    state = tape.start(levels[0])
    history: list[Output] = []
    for source, target in pairwise(levels[:_RUNGE_KUTTA_NODES]):
        middle = levels_of(schedule, [0.5 * (source.timestep + target.timestep)])[0]
        slopes = [tape.evaluate(state, source)]
        for stop in (middle, middle, target):
            slopes.append(tape.evaluate(_averaged(state, slopes[0], stop, slopes[-1:], (1.0,)), stop))
        state = _averaged(state, slopes[0], target, slopes, (1 / 6, 1 / 3, 1 / 3, 1 / 6))
        history = [slopes[0], *history]
    return _adams_bashforth(tape, state, levels[3:], history, len(ADAMS_BASHFORTH))
