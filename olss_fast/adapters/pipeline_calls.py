"""The calls of a pipeline: what it takes, its guidance scales, and a digest by which a recording knows them again."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from olss_fast.errors import InputError
from olss_fast.teacher import content

Call = Mapping[str, Any]


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
        unknown = [name for name in call if not takes(pipe, name)]
        if unknown:
            raise InputError(f"calls[{i}] has {unknown[0]!r}, which {type(pipe).__name__} does not take")
    return list(calls)


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
    scales = {argument(pipe, call, "guidance_scale") for call in calls}
    return tuple(sorted(float(scale) for scale in scales if isinstance(scale, (int, float))))


def with_guidance(pipe: Any, calls: Sequence[Call], scales: Sequence[float]) -> list[Call]:
    """The calls with `scales` in turn."""
    if not takes(pipe, "guidance_scale"):
        raise InputError(f"{type(pipe).__name__} takes no guidance_scale: leave guidance_scales out")
    bad = [s for s in scales if isinstance(s, bool) or not isinstance(s, (int, float, np.floating)) or not s > 0]
    if bad or not scales:
        raise InputError(f"guidance_scales are {list(scales)}: expected positive numbers, such as [5.0, 7.5, 10.0]")
    return [{**call, "guidance_scale": float(scales[i % len(scales)])} for i, call in enumerate(calls)]


def digest(pipe: Any, calls: Sequence[Call]) -> str:
    """SHA-256 over the pipeline's class and everything in its calls: texts, numbers, tensors, images, generators."""
    parts = [type(pipe).__name__.encode()]
    for call in calls:
        parts += [name.encode() + content(_plain(call[name])) for name in sorted(call)]
    return hashlib.sha256(b"\x00".join(parts)).hexdigest()


def _plain(value: Any) -> Any:
    """Images as arrays, generators as their states."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    array = hasattr(value, "__array__") or hasattr(value, "__array_interface__")  # pictures have only the latter
    if array and not isinstance(value, torch.Tensor):
        return torch.as_tensor(np.array(value))
    return value
