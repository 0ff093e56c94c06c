"""Every deterministic analytic plan at one number of evaluations, and the names of plans for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from olss_fast._bounds import check_steps
from olss_fast.errors import InputError, ScheduleError
from olss_fast.noise_schedule import SPACINGS, NoiseSchedule
from olss_fast.plan import Plan
from olss_fast.solvers.ddim import ddim
from olss_fast.solvers.deis import deis
from olss_fast.solvers.dpm_solver import dpm_solver
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp
from olss_fast.solvers.heun import heun
from olss_fast.solvers.pndm import ipndm, pndm
from olss_fast.solvers.unipc import unipc

DETERMINISTIC: tuple[tuple[Callable[..., Plan], dict[str, Any]], ...] = (
    (ddim, {}),  # also euler, and every multistep solver of order 1
    (dpm_solver_pp, {"order": 2}),
    (dpm_solver_pp, {"order": 3}),
    (dpm_solver_pp, {"order": 3, "variant": "exact"}),
    *((unipc, {"order": order, "variant": variant}) for order in (1, 2, 3) for variant in ("bh2", "bh1")),
    (deis, {"order": 2}),
    (deis, {"order": 3}),
    *((ipndm, {"order": order}) for order in (2, 3, 4)),
    (pndm, {}),
    (heun, {}),
    *((dpm_solver, {"order": order, "space": space}) for space in ("noise", "data") for order in (2, 3)),
)
"""Solvers and settings that `candidates` tries. Earlier ones give their name to plans that coincide."""


def candidates(schedule: NoiseSchedule, nfe: int) -> list[Plan]:
    """Every analytic solver x order x spacing at exactly `nfe` evaluations, without repetitions (first name wins).

    Combinations that cannot have `nfe` evaluations are left out; InputError or ScheduleError if that is all of them.
    """
    check_steps(nfe)
    plans: dict[Plan, None] = {}
    problem: Exception | None = None
    for solver, settings in DETERMINISTIC:
        for spacing in SPACINGS:
            try:
                plans.setdefault(solver(schedule, nfe, spacing=spacing, **settings))
            except (InputError, ScheduleError) as error:
                problem = error
    if not plans and problem is not None:
        raise problem
    return list(plans)


_TITLES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler ancestral",
    "heun": "Heun",
    "dpm_solver": "DPM-Solver-{order}",
    "dpm_solver_pp_single": "DPM-Solver++ {order}S",
    "dpm_solver_pp": "DPM-Solver++ {order}M",
    "unipc": "UniPC-{order}",
    "deis": "DEIS-{order}",
    "pndm": "PNDM",
    "ipndm": "iPNDM-{order}",
}
_USUAL_VARIANTS = ("midpoint", "runge_kutta")  # go without saying


def display_name(plan: Plan) -> str:
    """What to call a plan in tables: "DPM-Solver++ 2M (logsnr)". A captured plan has its own title,
    unknown methods go by their own name."""
    facts = plan.metadata
    if "title" in facts:
        return facts["title"]
    method, variant = facts.get("method", "plan"), facts.get("variant", "midpoint")
    title = _TITLES[method].format(order=facts.get("order", "?")) if method in _TITLES else method
    if variant == "plms":
        title = "PLMS"
    elif variant not in _USUAL_VARIANTS:
        title += f" {variant}"
    notes = [f"eta {facts['eta']}"] if "eta" in facts and method == "ddim" else []
    notes += [facts["spacing"]] if "spacing" in facts else []
    return f"{title} ({', '.join(notes)})" if notes else title
