"""Rebuild an analytic plan from its metadata: at other timesteps, or for a start part of the way.

Image-to-image sampling begins at evaluation b with alpha image + sigma noise in place of row b. A plan for that start
has timesteps[b:] and the rows of the same solver begun there, without history, with rows[0, 0] = 1: its column x_T
stands for the first network input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Floats, Plan
from olss_fast.schedule.curves import FLOW_ALPHA_FLOOR, Curve
from olss_fast.schedule.fits import mismatch
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.table import TABLE, display_name
from olss_fast.support.text import first_few

_READERS: Mapping[str, Callable[[str], Any]] = {"order": int, "variant": str, "eta": float}


def is_analytic(plan: Plan) -> bool:
    """Whether `rederive` knows the plan's method."""
    return plan.metadata.get("method") in TABLE


def rederive(plan: Plan, schedule: NoiseSchedule, timesteps: npt.ArrayLike, *, unit_start: bool = False) -> Plan:
    """The plan's solver with its order, variant and eta, at the evaluations `timesteps`.

    `unit_start`: rows[0, 0] = 1. Solvers that evaluate some times twice (heun, pndm) are given each time once.
    InputError unless the plan is analytic, was made on `schedule`, and the solver evaluates exactly at `timesteps`;
    ScheduleError for times outside the schedule.
    """
    times = np.asarray(timesteps, dtype=np.float64)
    solver = _solver(plan, schedule)
    start = 1.0 / float(schedule.input_scale(times[0])) if unit_start else None
    nodes = times[np.append(True, np.diff(times) != 0.0)]
    again = solver(schedule, timesteps=nodes, start=start)
    if again.nfe != times.size or not np.allclose(again.timesteps, times, rtol=1e-6):
        raise InputError(
            f"{display_name(plan)} evaluates at {first_few(again.timesteps)}, and cannot begin or stop in the "
            f"middle of a step as {first_few(times)} would have it; choose another start or other timesteps"
        )
    return again


def truncate(plan: Plan, schedule: NoiseSchedule, begin: int) -> Plan:
    """The plan for a start at evaluation `begin`, in network-input units. Errors as in `rederive`.

    PNDM begun after its first step goes on with fewer answers, as iPNDM does, and does not ask a time twice again.
    """
    if plan.metadata.get("method") == "pndm" and begin > 0:
        plan = plan.replace(metadata={**plan.metadata, "method": "ipndm", "order": "4"})
    return rederive(plan, schedule, plan.timesteps[begin:], unit_start=True)


def schedule_of(plan: Plan) -> NoiseSchedule:
    """The schedule that an analytic plan was made on, as far as the plan tells: at its own timesteps.

    InputError if the metadata does not name the prediction type.
    """
    told = plan.metadata.get("prediction_type", "")
    description = plan.metadata.get("schedule", "").removesuffix(f", {told}")
    exploding = description.startswith(("VE", "EDM"))
    scales = plan.alphas[:-1] if exploding else np.ones(plan.nfe)
    levels: Floats = np.stack([plan.timesteps, plan.alphas[:-1] / scales, plan.sigmas[:-1] / scales])
    no_signal = "log-SNR -inf" in description or (description.startswith("flow") and " from " not in description)
    if no_signal and levels[1, 0] > 0.0:  # the plan begins later than its schedule, and some solvers look at that
        levels = np.concatenate([[[levels[0, 0] + 1.0], [0.0], [1.0]], levels], axis=1)
    try:
        return NoiseSchedule(
            _PlanCurve(levels[0], levels[1], levels[2], description, exploding),
            told,
            sigma_data=float(plan.metadata.get("sigma_data", 0.5)),
            unit_input=exploding and told != "edm" and bool(scales[0] < 1.0),
        )
    except ValueError as error:
        raise InputError(f"the metadata of this plan do not tell its schedule: {error}") from error


@dataclass(frozen=True, eq=False)
class _PlanCurve(Curve):
    """Signal and noise level of the states of a plan, known at its own timesteps alone."""

    timesteps: Floats
    alphas: Floats
    sigmas: Floats
    description: str
    variance_exploding: bool

    @property
    def first(self) -> float:
        return float(self.timesteps[0])

    @property
    def last(self) -> float:
        return float(self.timesteps[-1])

    end = last

    def levels(self, timestep: Floats) -> tuple[Floats, Floats, Floats]:
        distances = np.abs(self.timesteps[:, None] - np.asarray(timestep, dtype=np.float64).reshape(1, -1))
        at = distances.argmin(0).reshape(np.shape(timestep))
        lowest = np.maximum(self.alphas, FLOW_ALPHA_FLOOR)
        return self.alphas[at], self.sigmas[at], np.log(lowest / self.sigmas)[at]

    def timestep_of_lam(self, lam: Floats) -> Floats:
        raise ScheduleError("a plan tells the noise levels at its own timesteps alone; give the network's schedule")

    def describe(self) -> str:
        return self.description

    def begun_at(self, timestep: float) -> _PlanCurve:
        return self


def _solver(plan: Plan, schedule: NoiseSchedule) -> Callable[..., Plan]:
    if not is_analytic(plan):
        raise InputError(f"the method {plan.metadata.get('method')!r} is not one of {', '.join(TABLE)}")
    if problem := mismatch(plan, schedule):
        raise InputError(f"{problem}; it can only be derived again on its own schedule")
    solver = TABLE[plan.metadata["method"]].function
    takes, told = inspect.signature(solver).parameters, plan.metadata
    try:
        given = {name: read(told[name]) for name, read in _READERS.items() if name in takes and name in told}
    except ValueError as error:
        raise InputError(f"the metadata of this {told['method']} plan cannot be read: {error}") from error
    if "eta" in takes:
        given.setdefault("eta", 0.0)
    if "runge_kutta" in takes:
        given["runge_kutta"] = told.get("variant") == "runge_kutta"
    return partial(solver, **given)
