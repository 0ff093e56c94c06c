"""Checks of the arguments of public calls, with one message each."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from olss_fast.errors import InputError
from olss_fast.support.text import quoted

MAX_EVALUATIONS = 2000
"""Twice the training timesteps of most networks; a plan of this length takes 32 MB and about a second."""


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
    """`value` as a float, or InputError unless it is a finite real number; `expected` completes the message."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise InputError(f"{name} is {quoted(value)}; expected {expected}")
    return float(value)


def check_steps(steps: object, name: str = "steps") -> int:
    """`steps` as an int; InputError unless it is a whole number of at least 1, and no more than a plan may have."""
    return check_count(checked_count(name, steps), f"{name} is")


def check_count(count: int, what: str) -> int:
    """`count`, if a plan may have as many evaluations; InputError otherwise."""
    if count > MAX_EVALUATIONS:
        raise InputError(
            f"{what} {count}; a plan holds every coefficient of every pair of steps, so at most {MAX_EVALUATIONS} "
            "evaluations are taken: ask for fewer"
        )
    return count
