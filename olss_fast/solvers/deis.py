"""DEIS: exponential Adams-Bashforth on the noise prediction (Zhang & Chen 2023, rho-AB with polynomials in log rho).

    x_t / alpha_t = x_s / alpha_s + int_{rho_s}^{rho_t} p(log rho) d rho,     rho = sigma / alpha

p is the polynomial through the last `order` answers eps. As log rho = -lam, this is the noise-space integral of
`exponential` with exact weights.
"""

from __future__ import annotations

import numpy.typing as npt

from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import Space, falling_orders, lagrange_rule, multistep
from olss_fast.solvers.tape import Tape, check_choice, evaluation_levels


def deis(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 3,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> Plan:
    """DEIS, `order` 1, 2 or 3."""
    check_choice("order", order, (1, 2, 3))
    levels, spacing_name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), start=start)
    sample = multistep(tape, levels, falling_orders(len(levels), order), lagrange_rule, Space.NOISE)
    return tape.plan(sample, method="deis", order=order, spacing=spacing_name)
