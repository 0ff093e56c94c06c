"""UniPC: a predictor and, once the next answer is known, a corrector at no further evaluation (Zhao et al. 2023).

Both integrate the x0 prediction exactly through their nodes; the corrector has the new answer (ratio 1) as one more.
A single further node takes the shorter weight B(h) / 2 of the paper instead, the only place where B shows:

    bh1: B = h        bh2: B = 1 - e^(-h)

The network is asked at predicted states; corrected ones are where the next step leaves from. Orders rise from 1 at the
start and fall to 1 at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import (
    Node,
    Rule,
    Space,
    correction,
    fit_weights,
    lagrange_rule,
    midpoint_rule,
    transfer,
)
from olss_fast.solvers.tape import CLEAN, Level, Tape, Vector, check_choice, evaluation_levels


def unipc(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    variant: str = "bh2",
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> Plan:
    """UniPC-`order`, 1 to 3; `variant` "bh1" or "bh2". The last step is not corrected (it needs one answer more)."""
    check_choice("order", order, (1, 2, 3))
    check_choice("variant", variant, tuple(_RULES))
    levels, spacing_name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), start=start)
    sample = predict_and_correct(tape, [*levels, CLEAN], order, _RULES[variant])
    return tape.plan(sample, method="unipc", order=order, spacing=spacing_name, variant=variant)


def predict_and_correct(tape: Tape, levels: Sequence[Level], order: int, rule: Rule) -> Vector:
    """The run from levels[0] to levels[-1], where the network is not asked any more."""
    state = predicted = tape.start(levels[0])
    nodes: list[Node] = []
    used = 0  # order of the step that led here
    for i, (level, target) in enumerate(pairwise(levels)):
        new: Node = (level, tape.evaluate(predicted, level).x0)
        if nodes:
            state = _step(state, level, [nodes[0], new, *nodes[1:used]], rule)
        nodes = [new, *nodes]
        used = min(order, i + 1, len(levels) - 1 - i)
        predicted = _step(state, target, nodes[:used], rule)
    return predicted


def _step(state: Vector, target: Level, nodes: Sequence[Node], rule: Rule) -> Vector:
    source, x0 = nodes[0]
    return transfer(state, x0, source, target) + correction(target, nodes, rule, Space.DATA)


def _bh1_rule(h: float, ratios: Sequence[float], space: Space) -> Vector:
    if len(ratios) == 1:
        return fit_weights(ratios, np.array([0.5 * h]))
    return lagrange_rule(h, ratios, space)


_RULES: dict[str, Rule] = {"bh1": _bh1_rule, "bh2": midpoint_rule}
