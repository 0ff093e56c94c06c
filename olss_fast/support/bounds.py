"""The one bound on network evaluations, known before anything of that size is made."""

from __future__ import annotations

import operator

from olss_fast.errors import InputError

MAX_EVALUATIONS = 2000
"""Twice the training timesteps of most networks; a plan of as many evaluations takes 32 MB and about a second."""


def check_steps(steps: object, name: str = "steps") -> int:
    """`steps` as an int; InputError unless it is a whole number of at least 1, and no more than a plan may have."""
    whole = hasattr(steps, "__index__") and not isinstance(steps, bool)
    number = operator.index(steps) if whole else 0  # type: ignore[arg-type]
    if number < 1:
        raise InputError(f"{name} is {steps!r}; expected a whole number of at least 1")
    return check_count(number, f"{name} is")


def check_count(count: int, what: str) -> int:
    """`count`, if a plan may have as many evaluations; InputError otherwise."""
    if count > MAX_EVALUATIONS:
        raise InputError(
            f"{what} {count}; a plan holds every coefficient of every pair of steps, so at most {MAX_EVALUATIONS} "
            "evaluations are taken: ask for fewer"
        )
    return count
