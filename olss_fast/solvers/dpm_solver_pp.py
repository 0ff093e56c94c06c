"""DPM-Solver++, multistep: exponential integration of the x0 prediction (Lu et al. 2022, algorithm 2).

With m(u) the polynomial through the last answers (u = 0 now, u = 1 at the next time, D_n = n-th coefficient) and
I_n = int_0^h e^(v - h) (v / h)^n dv:

    x_t = (sigma_t / sigma_s) x_s + alpha_t (I_0 m_0 + c_1 D_1 + c_2 D_2)

| variant | order 2 | order 3 |
|---|---|---|
| midpoint (published) | c_1 = I_0 / 2 | c_1 = I_1, c_2 = I_2 / 2 |
| exact | c_1 = I_1 | c_1 = I_1, c_2 = I_2 |

The published third order counts the curvature half, which leaves it of order 2; "exact" is of order 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import (
    Rule,
    Space,
    falling_orders,
    fit_weights,
    lagrange_rule,
    midpoint_rule,
    moments,
    multistep,
)
from olss_fast.solvers.tape import Tape, Vector, check_choice, evaluation_levels


def dpm_solver_pp(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    variant: str = "midpoint",
    start: float | None = None,
) -> Plan:
    """DPM-Solver++ multistep, `order` 1, 2 (2M) or 3 (3M); `variant` "midpoint" (published) or "exact"."""
    check_choice("order", order, (1, 2, 3))
    check_choice("variant", variant, tuple(_RULES))
    levels, spacing_name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), start=start)
    sample = multistep(tape, levels, falling_orders(len(levels), order), _RULES[variant], Space.DATA)
    return tape.plan(sample, method="dpm_solver_pp", order=order, spacing=spacing_name, variant=variant)


def _published_rule(h: float, ratios: Sequence[float], space: Space) -> Vector:
    if len(ratios) == 1:
        return midpoint_rule(h, ratios, space)
    return fit_weights(ratios, moments(h, space, 3)[1:] * np.array([1.0, 0.5]))


_RULES: dict[str, Rule] = {"midpoint": _published_rule, "exact": lagrange_rule}
