"""DDIM, and Euler's method, which is the same thing in other coordinates.

    x_t = alpha_t x0 + sqrt(sigma_t^2 - s^2) eps + s z
    s = eta sigma_t sqrt(1 - (rho_t / rho_s)^2),    rho = sigma / alpha

Song et al., "Denoising diffusion implicit models", 2021, eq. 12 and 16, written so that it holds for every schedule.
eta = 0 is the Euler step of d(x/alpha) = eps d(rho) and of the flow dx = (eps - x0) d(sigma), eta = 1 ancestral Euler.
"""

from __future__ import annotations

import math

import numpy.typing as npt

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.exponential import transfer
from olss_fast.solvers.tape import CLEAN, Level, Output, Tape, Vector, evaluation_levels
from olss_fast.support.arguments import checked_number


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    eta: float = 0.0,
    start: float | None = None,
) -> Plan:
    """DDIM. `eta` in [0, 1] adds S-1 noise columns; 0 is deterministic. Order 1."""
    if not 0.0 <= checked_number("eta", eta, "a number from 0 to 1") <= 1.0:
        raise InputError(f"eta is {eta!r}; expected a number from 0 (deterministic) to 1 (ancestral)")
    levels, spacing_name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), noises=len(levels) - 1 if eta else 0, start=start)
    state = tape.start(levels[0])
    for level, target in tape.path(levels):
        output = tape.evaluate(state, level)
        if eta and target is not CLEAN:
            state = _noisy(tape, output, target, eta)
        else:
            state = transfer(state, output.x0, level, target)
    return tape.plan(state, method="ddim", order=1, spacing=spacing_name, eta=eta or None)


def euler(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> Plan:
    """Euler's method on the probability flow ODE. Order 1; the same plan as `ddim`.

    diffusers' EulerDiscreteScheduler with linspace or trailing spacing starts from the noise part alone:
    `start=schedule.sigma(first timestep)`.
    """
    return _named("euler", ddim(schedule, steps, spacing=spacing, timesteps=timesteps, start=start))


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    eta: float = 1.0,
    start: float | None = None,
) -> Plan:
    """Euler with fresh noise after every step but the last: S-1 noise columns. `eta` in [0, 1]."""
    plan = ddim(schedule, steps, spacing=spacing, timesteps=timesteps, eta=eta, start=start)
    return _named("euler_ancestral", plan)


def _named(method: str, plan: Plan) -> Plan:
    return plan.replace(metadata={**plan.metadata, "method": method})


def _noisy(tape: Tape, output: Output, target: Level, eta: float) -> Vector:
    fresh = eta * target.sigma * math.sqrt(1.0 - (target.rho / output.level.rho) ** 2)
    kept = math.sqrt(target.sigma**2 - fresh**2)
    return target.alpha * output.x0 + kept * output.eps + fresh * tape.noise()
