"""Analytic solvers: functions that return a Plan."""

from olss_fast.solvers.ddim import ddim, euler, euler_ancestral
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp

__all__ = ["ddim", "dpm_solver_pp", "euler", "euler_ancestral"]
