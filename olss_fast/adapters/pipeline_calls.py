"""The calls of a pipeline: what it takes, and its guidance scales."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from olss_fast.errors import InputError

Call = Mapping[str, Any]

STEADY: Mapping[str, tuple[Any, ...]] = {
    "control_guidance_start": (None, 0, [0.0]),
    "control_guidance_end": (None, 1, [1.0]),
    "denoising_start": (None,),
    "denoising_end": (None,),
    "callback_on_step_end": (None,),
    "skip_guidance_layers": (None,),
}
"""Arguments that make steps differ, with the values at which they do not."""


def check_calls(pipe: Any, calls: Any) -> list[Call]:
    """`calls` as a list; `InputError` unless they are mappings of arguments, at least one, for a diffusers pipeline."""
    if not callable(pipe) or not hasattr(pipe, "scheduler") or not hasattr(pipe.scheduler, "config"):
        raise InputError(f"{type(pipe).__name__} is no pipeline with a scheduler: expected one of diffusers")
    if isinstance(calls, Mapping) or not isinstance(calls, Sequence) or not calls:
        raise InputError(
            f"calls is {calls!r}: expected a list of keyword dictionaries, such as [{{'prompt': 'a red fox'}}, ...]"
        )
    for i, call in enumerate(calls):
        if not isinstance(call, Mapping) or not all(isinstance(key, str) for key in call):
            raise InputError(f"calls[{i}] is {call!r}: expected the keyword arguments of one call, as a dictionary")
        _check_steady(call, f"calls[{i}]")
        unknown = [name for name in call if not takes(pipe, name)]
        if unknown:
            raise InputError(f"calls[{i}] has {unknown[0]!r}, which {type(pipe).__name__} does not take")
    return list(calls)


def _check_steady(call: Call, name: str) -> None:
    """InputError for arguments by which a step's network or end depends on its number, which tuning cannot see."""
    for argument, usual in STEADY.items():
        if argument in call and call[argument] not in usual:
            raise InputError(
                f"{name} has {argument}={call[argument]!r}, by which the steps of a run differ: tuning asks the "
                "pipeline at any time in any order. Leave it out"
            )


def takes(pipe: Any, name: str) -> bool:
    """Whether the pipeline names the argument `name`; what goes by **kwargs is deprecated in diffusers."""
    return name in inspect.signature(pipe.__call__).parameters


def argument(pipe: Any, call: Call, name: str) -> Any:
    """What the pipeline gets for `name`: the call's value, or its own default; None if it has no such argument."""
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return call.get(name, default)


def guidance_scales_of(pipe: Any, calls: Sequence[Call]) -> tuple[float, ...]:
    """The guidance scales of all calls, ascending; empty if the pipeline has none."""
    scales = [argument(pipe, call, "guidance_scale") for call in calls]
    return tuple(sorted({float(scale) for scale in scales if _is_number(scale)}))


def with_guidance(pipe: Any, calls: Sequence[Call], scales: Sequence[float]) -> list[Call]:
    """The calls with `scales` in turn."""
    if not takes(pipe, "guidance_scale"):
        raise InputError(f"{type(pipe).__name__} takes no guidance_scale: leave guidance_scales out")
    try:
        numbers = list(scales)
    except TypeError:
        numbers = []
    if not numbers or not all(_is_number(scale) and 0.0 < float(scale) < np.inf for scale in numbers):
        raise InputError(
            f"guidance_scales is {scales!r}: expected a list of positive numbers, such as [5.0, 7.5, 10.0]"
        )
    scales = numbers
    return [{**call, "guidance_scale": float(scales[i % len(scales)])} for i, call in enumerate(calls)]


def _is_number(value: Any) -> bool:
    """Python's, NumPy's and tensors' single numbers."""
    if isinstance(value, (bool, np.bool_)):
        return False
    return isinstance(value, (int, float, np.number)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
