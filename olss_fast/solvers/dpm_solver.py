"""DPM-Solver-2 and -3, singlestep (Lu et al. 2022, algorithms 1 and 2); on request on x0, DPM-Solver++ 2S and 3S.

Evaluations come in groups of `order`. Within a group, all steps leave from its first time s with the answers found in
the group so far at ratios 0 = r_0 < r_1 < r_2 < 1 of the whole step. With I_n = int_0^h kernel (u / h)^n du, h to the
target of that step, and D_j = (v_j - v_0) / r_j:

| variant | second answer | third answer |
|---|---|---|
| midpoint (published) | I_0 / 2 D_1 | I_1 D_2 (of order 3 where r_2 = 2/3, as on times uniform in log-SNR) |
| exact | I_1 D_1 | polynomial through all three |

The last evaluation always stands alone (order 1, on to the clean sample), and where the rest is no multiple of `order`,
one shorter group precedes it; so every number of evaluations is possible. All times are evaluation times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import Node, Rule, Space, correction, lagrange_rule, midpoint_rule, moments, transfer
from olss_fast.solvers.tape import Level, Tape, Vector, check_choice, evaluation_levels

_SPACES = {"noise": Space.NOISE, "data": Space.DATA}


def dpm_solver(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    variant: str = "midpoint",
    space: str = "noise",
    start: float | None = None,
) -> Plan:
    """Singlestep DPM-Solver, `order` 2 or 3; `space` "noise" (eps, DPM-Solver) or "data" (x0, DPM-Solver++)."""
    check_choice("order", order, (2, 3))
    check_choice("variant", variant, tuple(_RULES))
    check_choice("space", space, tuple(_SPACES))
    levels, spacing_name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), start=start)
    sample = _singlestep(tape, levels, group_orders(len(levels), order), _RULES[variant], _SPACES[space])
    method = "dpm_solver" if space == "noise" else "dpm_solver_pp_single"
    return tape.plan(sample, method=method, order=order, spacing=spacing_name, variant=variant)


def group_orders(steps: int, order: int) -> list[int]:
    """Order of every step: 1, 2, .. order in each group, the last alone: 1 2 3 1 2 3 1 2 1 for 9 steps of order 3."""
    groups, rest = divmod(steps - 1, order)
    group = list(range(1, order + 1))
    return group * groups + group[:rest] + [1]


def _singlestep(tape: Tape, levels: Sequence[Level], orders: Sequence[int], rule: Rule, space: Space) -> Vector:
    state = base = tape.start(levels[0])
    for (level, target), order in zip(tape.path(levels), orders, strict=True):
        output = tape.evaluate(state, level)
        if order == 1:
            base, first, later = state, output, list[Node]()
        else:
            later = [(level, space.of(output)), *later]
        nodes = [(first.level, space.of(first)), *later]
        state = transfer(base, first.x0, first.level, target) + correction(target, nodes, rule, space)
    return state


def _published_rule(h: float, ratios: Sequence[float], space: Space) -> Vector:
    if len(ratios) == 1:
        return midpoint_rule(h, ratios, space)
    return np.array([moments(h, space, 2)[1] / ratios[0], 0.0])


_RULES: dict[str, Rule] = {"midpoint": _published_rule, "exact": lagrange_rule}
