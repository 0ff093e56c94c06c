"""The table of analytic solvers. Which plans are compared, and what they are called, follows from it.

A new solver is a file with its function, and a row here (docs/adding.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import SPACINGS, NoiseSchedule
from olss_fast.solvers.ddim import ddim, euler, euler_ancestral
from olss_fast.solvers.deis import deis
from olss_fast.solvers.dpm_solver import dpm_solver
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp
from olss_fast.solvers.heun import heun
from olss_fast.solvers.pndm import ipndm, pndm
from olss_fast.solvers.unipc import unipc
from olss_fast.support.arguments import check_steps


@dataclass(frozen=True)
class Solver:
    """One solver, known as `plan.metadata["method"]`.

    function  writes the plan; its order, variant and eta stand in the plan's metadata
    family    name of all its plans together
    title     name of one of them; {order} is that of the plan
    tried     the settings that `candidates` tries on each of `spacings`: none for solvers that draw fresh noise, and
              for those whose plans another row has too
    """

    function: Callable[..., Plan]
    family: str
    title: str = ""
    tried: tuple[Mapping[str, Any], ...] = ()
    spacings: tuple[str, ...] = SPACINGS


def _orders(*orders: int, **settings: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple({"order": order, **settings} for order in orders)


TABLE: dict[str, Solver] = {
    "ddim": Solver(ddim, "DDIM", tried=({},)),
    "euler": Solver(euler, "Euler"),  # the same plans as DDIM
    "euler_ancestral": Solver(euler_ancestral, "Euler ancestral"),
    "dpm_solver_pp": Solver(
        dpm_solver_pp, "DPM-Solver++", "DPM-Solver++ {order}M", _orders(2, 3) + _orders(3, variant="exact")
    ),
    "unipc": Solver(
        unipc,
        "UniPC",
        "UniPC-{order}",
        tuple({"order": order, "variant": variant} for order in (1, 2, 3) for variant in ("bh2", "bh1")),
    ),
    "deis": Solver(deis, "DEIS", "DEIS-{order}", _orders(2, 3)),
    "ipndm": Solver(ipndm, "iPNDM", "iPNDM-{order}", _orders(2, 3, 4)),
    "pndm": Solver(pndm, "PNDM", tried=({},)),
    "heun": Solver(heun, "Heun", tried=({},)),
    "dpm_solver": Solver(dpm_solver, "DPM-Solver", "DPM-Solver-{order}", _orders(2, 3)),
    "dpm_solver_pp_single": Solver(
        partial(dpm_solver, space="data"), "DPM-Solver++ single-step", "DPM-Solver++ {order}S", _orders(2, 3)
    ),
}
"""By method. Of plans that coincide, `candidates` takes the earlier row's."""

_USUAL_VARIANTS = ("midpoint", "runge_kutta")  # go without saying


def candidates(schedule: NoiseSchedule, nfe: int) -> list[Plan]:
    """Every analytic solver x order x spacing at exactly `nfe` evaluations, without repetitions (first name wins).

    Combinations that cannot have `nfe` evaluations are left out; InputError or ScheduleError if that is all of them.
    """
    check_steps(nfe)
    plans: dict[Plan, None] = {}
    problem: Exception | None = None
    for solver in TABLE.values():
        for settings in solver.tried:
            for spacing in solver.spacings:
                try:
                    plans.setdefault(solver.function(schedule, nfe, spacing=spacing, **settings))
                except (InputError, ScheduleError) as error:
                    problem = error
    if not plans and problem is not None:
        raise problem
    return list(plans)


def display_name(plan: Plan) -> str:
    """The name of a plan in tables: "DPM-Solver++ 2M (logsnr)". A captured plan has its own title; an unknown method
    goes by its own name."""
    facts = plan.metadata
    if "title" in facts:
        return facts["title"]
    method, variant = facts.get("method", "plan"), facts.get("variant", "midpoint")
    solver = TABLE.get(method)
    title = (solver.title or solver.family).format(order=facts.get("order", "?")) if solver else method
    if variant == "plms":
        title = "PLMS"
    elif variant not in _USUAL_VARIANTS:
        title += f" {variant}"
    notes = [f"eta {facts['eta']}"] if "eta" in facts and method == "ddim" else []
    notes += [facts["spacing"]] if "spacing" in facts else []
    return f"{title} ({', '.join(notes)})" if notes else title


def family_name(plan: Plan) -> str:
    """The name of a plan's solver, whatever the order, variant and spacing."""
    method = plan.metadata.get("method", "")
    if method == "captured":
        return "diffusers' schedulers"
    return TABLE[method].family if method in TABLE else method or display_name(plan)
