"""The further arguments of `step`. A plan's coefficients hold for one value of each, eta, s_churn and the like.

A captured plan expects the value it was captured with: `step_arguments`, else the default in the signature of the
scheduler's own class. So pipe(eta=0.0) with a plan of a TCDScheduler, whose default is 0.3, does not go unnoticed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Generator, Tensor

from olss_fast.capturing.facts import captured_facts, name_of, scheduler_class
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.support.text import quoted

NEUTRAL = {"s_noise": 1.0, "s_tmax": math.inf}
"""Neutral values, besides None, 0 and False, for a plan without expected arguments."""
ORDER = ("generator", "return_dict")  # by position, if no scheduler's own order is known
SOMETIMES = frozenset({"eta"})  # which pipelines pass if the signature of `step` has it
OURS = {"generator", "return_dict", "prev_timestep"}  # which PlanScheduler.step checks itself


@dataclass(frozen=True)
class StepArguments:
    """The expected values of the plan called `name`, by argument; others must be neutral.

    order: the arguments of `step` after the sample, in the captured scheduler's order. dropped: those that pipelines
    pass only to schedulers that have them, which the captured one does not.
    """

    name: str
    expected: Mapping[str, Any]
    order: tuple[str, ...]
    dropped: frozenset[str] = frozenset()

    def named(self, positional: Sequence[Any]) -> dict[str, Any]:
        """Positional arguments by name. InputError for too many."""
        if len(positional) > len(self.order):
            raise InputError(
                f"step was given {len(positional)} arguments after the sample; {self.name} takes "
                f"{', '.join(self.order)}: give them by name"
            )
        pairs = zip(self.order, positional, strict=False)
        return {"generator" if _is_generator(value) else argument: value for argument, value in pairs}

    def check(self, asked: Mapping[str, Any]) -> None:
        """InputError for a value other than expected. None is ignored."""
        for argument, value in asked.items():
            if isinstance(value, (Tensor, np.ndarray)):
                raise InputError(
                    f"step was asked for {argument} of shape {tuple(value.shape)}, values for parts of the sample, and "
                    f"{self.name} has one coefficient for all of it at a step. Run this pipeline with its own scheduler"
                )
            if value is not None and argument not in self.dropped and not self._is_met(argument, value):
                raise InputError(
                    f"step was asked for {argument}={quoted(value)}, and {self.name} {self._has(argument)}; its "
                    f"coefficients are fixed. Call the pipeline with what it has, or "
                    f"capture(scheduler, steps, step_arguments={{{argument!r}: {quoted(value)}}})"
                )

    def _is_met(self, argument: str, value: Any) -> bool:
        if self.expected.get(argument) is None:
            return not value or bool(value == NEUTRAL.get(argument))
        return bool(value == self.expected[argument])

    def _has(self, argument: str) -> str:
        if self.expected.get(argument) is None:
            return f"has no {argument}"
        return f"was captured with {argument}={quoted(self.expected[argument])}"


def step_arguments_of(plan: Plan) -> StepArguments:
    """The step arguments of a plan. InputError for a captured plan with unreadable metadata."""
    if (facts := captured_facts(plan)) is None:
        return StepArguments(name_of(plan), {}, ORDER)
    optional = _optional(facts.class_name)
    defaults = {name: value for name, value in optional.items() if name not in OURS}
    dropped = SOMETIMES - optional.keys() if optional else frozenset[str]()
    return StepArguments(name_of(plan), {**defaults, **facts.step_arguments}, (*optional,) or ORDER, dropped)


@cache
def _optional(class_name: str) -> Mapping[str, Any]:
    """The further arguments of the class's `step`, with defaults; none for a class that diffusers does not have."""
    kind = scheduler_class(class_name)
    parameters = [] if kind is None else list(inspect.signature(kind.step).parameters.values())
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _is_generator(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(each, Generator) for each in several)
