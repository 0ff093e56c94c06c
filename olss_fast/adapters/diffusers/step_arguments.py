"""What pipelines hand to `step` besides output and sample: where a timestep stands in the run, and further arguments.

A plan's coefficients hold for one value of each argument, eta, s_churn and the like.

A captured plan expects the value it was captured with: `step_arguments`, else the default in the signature of the
scheduler's own class. So pipe(eta=0.0) cannot pass unnoticed over a plan of a TCDScheduler, whose default is 0.3.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from olss_fast.capturing.facts import captured_facts, name_of, scheduler_class
from olss_fast.errors import InputError
from olss_fast.plan.plan import Floats, Plan
from olss_fast.support.text import quoted

NEUTRAL = {"s_noise": 1.0, "s_tmax": math.inf}
"""Values, other than None, 0 and False, that ask for nothing of a plan that expects nothing."""
ORDER = ("generator", "return_dict")  # by position, where no scheduler's own order is known
SOMETIMES = frozenset({"eta"})  # which pipelines hand over where the signature of `step` has it
OURS = {"generator", "return_dict", "prev_timestep"}  # which PlanScheduler.step looks at itself


@dataclass(frozen=True)
class StepArguments:
    """What the plan called `name` expects, by argument; of all others it takes neutral values.

    order: the arguments of `step` after the sample, as the captured scheduler has them. dropped: those that pipelines
    hand to schedulers that have them, and keep from the captured one, which has not.
    """

    name: str
    expected: Mapping[str, Any]
    order: tuple[str, ...]
    dropped: frozenset[str] = frozenset()

    def named(self, positional: Sequence[Any]) -> dict[str, Any]:
        """Arguments given by position, by name. InputError for more than there are."""
        if len(positional) > len(self.order):
            raise InputError(
                f"step was given {len(positional)} arguments after the sample; {self.name} takes "
                f"{', '.join(self.order)}: give them by name"
            )
        pairs = zip(self.order, positional, strict=False)
        return {"generator" if _is_generator(value) else argument: value for argument, value in pairs}

    def check(self, asked: Mapping[str, Any]) -> None:
        """InputError for a value that asks for something else. None asks for nothing."""
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
    """InputError for a captured plan whose facts cannot be read."""
    if (facts := captured_facts(plan)) is None:
        return StepArguments(name_of(plan), {}, ORDER)
    optional = _optional(facts.class_name)
    defaults = {name: value for name, value in optional.items() if name not in OURS}
    dropped = SOMETIMES - optional.keys() if optional else frozenset[str]()
    return StepArguments(name_of(plan), {**defaults, **facts.step_arguments}, (*optional,) or ORDER, dropped)


@cache
def _optional(class_name: str) -> Mapping[str, Any]:
    """What the class's `step` takes besides, with its defaults; nothing for a class that diffusers does not have."""
    kind = scheduler_class(class_name)
    parameters = [] if kind is None else list(inspect.signature(kind.step).parameters.values())
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _is_generator(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(each, Generator) for each in several)


HALF = (torch.float16, torch.bfloat16)


def first_index(timestep: Any, timesteps: Tensor, values: Floats) -> int:
    """The place of a run's first timestep in `timesteps`, whose numbers are `values`; 0 where it cannot be known.

    Of equal timesteps the second is meant, as in diffusers: the first belongs to the step before (Heun). InputError for
    a number, or a tensor on the CPU, that is none of them.
    """
    found = places(timestep, timesteps, values)
    if found is None:
        return 0
    if not found:
        shown = ", ".join(f"{value:g}" for value in values[:4]) + (", …" if len(values) > 4 else "")
        raise InputError(
            f"the first timestep of this run is {quoted(timestep)}, and the plan has {shown}; hand step the entries of "
            "`timesteps`, or say with set_begin_index where the run begins"
        )
    return found[min(1, len(found) - 1)]


def places(timestep: Any, timesteps: Tensor, values: Floats) -> list[int] | None:
    """All places of a timestep; None where looking would wait for a device or stop a compiler.

    A view of `timesteps` says its place by its offset. Numbers and CPU tensors are compared in float32, or in the
    dtype of the tensor where that rounds more. InputError for what is no number.
    """
    if torch.compiler.is_compiling():
        return None
    grid = values.astype(np.float32)
    if isinstance(timestep, Tensor) and timestep.numel():
        if timestep._base is timesteps:
            return [int(timestep.storage_offset())]
        if timestep.device.type != "cpu":
            return None
        if timestep.dtype in HALF:
            grid = torch.from_numpy(grid).to(timestep.dtype).float().numpy()
        timestep = timestep.flatten()[0].item()
    try:
        number = np.float32(timestep)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or np.ndim(number):
        raise InputError(f"the timestep of a step is {quoted(timestep)}; expected a number or a tensor of one")
    return [int(i) for i in np.flatnonzero(number == (np.trunc(grid) if isinstance(timestep, Integral) else grid))]
