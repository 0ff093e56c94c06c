"""Arguments of public calls, checked where they come in: what they have to be, in one message each."""

from __future__ import annotations

import math
import operator
import os
from typing import Any

import numpy as np

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.text import quoted


def checked_plan(plan: Any, name: str = "plan") -> Plan:
    """`plan`, or InputError unless it is a Plan."""
    if isinstance(plan, Plan):
        return plan
    hint = "read plan files with Plan.load" if isinstance(plan, (str, os.PathLike)) else "solvers.ddim(schedule, 20)"
    raise InputError(f"{name} is {a(plan)}; expected a Plan: {hint}")


def checked_plans(plans: Any, name: str) -> list[Plan]:
    """`plans` as a list, or InputError unless they are Plans."""
    try:
        listed = list(plans)
    except TypeError:
        raise InputError(f"{name} is {a(plans)}; expected a list of Plans") from None
    return [checked_plan(plan, f"{name}[{i}]") for i, plan in enumerate(listed)]


def checked_count(name: str, value: Any, *, least: int = 1) -> int:
    """`value` as an int, or InputError unless it is a whole number of at least `least`."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # no whole number
        number = least - 1
    if number < least:
        raise InputError(f"{name} is {quoted(value)}; expected a whole number of at least {least}")
    return number


def checked_number(name: str, value: Any, expected: str = "a number") -> float:
    """`value` as a float, or InputError unless it is a finite real number; `expected` says which numbers would do."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise InputError(f"{name} is {quoted(value)}; expected {expected}")
    return float(value)


def checked_schedule(schedule: Any) -> NoiseSchedule:
    """`schedule`, or InputError unless it is a NoiseSchedule."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    raise InputError(
        f"schedule is {a(schedule)}; expected a NoiseSchedule, such as NoiseSchedule.from_betas(betas) or "
        "NoiseSchedule.from_diffusers(scheduler)"
    )


def check_prediction(plan: Plan, schedule: NoiseSchedule) -> None:
    """Raise `InputError` if `plan` says that it is for networks that predict something else."""
    told = plan.metadata.get("prediction_type", schedule.prediction_type)
    if told != schedule.prediction_type:
        raise InputError(
            f"the plan is for networks that predict {told!r}, this model predicts {schedule.prediction_type!r}: "
            "use a plan that was made for this model"
        )


def a(value: Any) -> str:
    """What a value is, for a message: "a str 'five.safetensors'"."""
    return "None" if value is None else f"a {type(value).__name__} {quoted(value)}"
