"""Analytic solvers: functions that take a NoiseSchedule and return a Plan.

    dpm_solver_pp(schedule, steps=10, order=2)                        times from a spacing ("trailing")
    dpm_solver_pp(schedule, steps=10, order=2, spacing="logsnr")
    dpm_solver_pp(schedule, timesteps=[999, 700, 350, 120, 20])       any strictly falling times

`steps` is the number of network evaluations (NFE) of every solver, and `plan.nfe` of what it returns. Every solver ends
at the clean sample (no noise) and takes `start`, the amplitude of the initial noise in the first state (default
sqrt(alpha^2 + sigma^2)). `timesteps` are the evaluation times; heun and pndm ask some of them twice.

All raise InputError for impossible arguments, and ScheduleError for times or spacings that the schedule lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from olss_fast.plan.plan import Plan
from olss_fast.solvers.ddim import ddim, euler, euler_ancestral
from olss_fast.solvers.deis import deis
from olss_fast.solvers.dpm_solver import dpm_solver
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp
from olss_fast.solvers.heun import heun
from olss_fast.solvers.pndm import ipndm, pndm
from olss_fast.solvers.table import TABLE, candidates, display_name
from olss_fast.solvers.unipc import unipc

__all__ = [
    "SOLVERS",
    "candidates",
    "ddim",
    "deis",
    "display_name",
    "dpm_solver",
    "dpm_solver_pp",
    "euler",
    "euler_ancestral",
    "heun",
    "ipndm",
    "pndm",
    "unipc",
]

SOLVERS: Mapping[str, Callable[..., Plan]] = MappingProxyType({name: row.function for name, row in TABLE.items()})
"""Every solver by the name that `plan.metadata["method"]` has."""
