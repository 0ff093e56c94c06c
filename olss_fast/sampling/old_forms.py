"""Calls written for older versions: (plan, network) where it is now (network, plan), `example=` for `conditioning=`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from olss_fast.plan.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")


def takes_old_forms(function: Callable[P, R]) -> Callable[P, R]:
    """`function(network, plan, …, conditioning=…)`, which also takes the old forms, with a DeprecationWarning.

    The warning points to the caller; the signature is that of the new form.
    """
    at = list(inspect.signature(function).parameters).index("network")  # 1 in a method

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> R:
        given, old = list(args), []
        if isinstance(next(iter(given[at:]), None), Plan):
            plan = given.pop(at)
            if len(given) > at:
                given.insert(at + 1, plan)
            else:
                kwargs["plan"] = plan
            old.append("the network before the plan")
        if "example" in kwargs:
            kwargs["conditioning"] = kwargs.pop("example")
            old.append("conditioning= in place of example=")
        if old:
            warnings.warn(f"{function.__qualname__} takes {' and '.join(old)}", DeprecationWarning, stacklevel=2)
        return function(*given, **kwargs)

    return cast(Callable[P, R], either)
