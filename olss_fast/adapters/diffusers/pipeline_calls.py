"""The calls of a pipeline: its arguments, its guidance scales, and calls for the prompts of a text file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from olss_fast.errors import InputError
from olss_fast.support.files import read_bounded

Call = Mapping[str, Any]
LARGEST_PROMPTS = 2**24  # bytes

STEADY: Mapping[str, tuple[Any, ...]] = {
    "control_guidance_start": (None, 0, [0.0]),
    "control_guidance_end": (None, 1, [1.0]),
    "denoising_start": (None,),
    "denoising_end": (None,),
    "callback_on_step_end": (None,),
    "skip_guidance_layers": (None,),
}
"""Arguments that make steps differ, with their neutral values."""


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
    """InputError for arguments that make the network or the end of the run depend on the step index."""
    for argument, usual in STEADY.items():
        if argument in call and call[argument] not in usual:
            raise InputError(
                f"{name} has {argument}={call[argument]!r}, by which the steps of a run differ: tuning asks the "
                "pipeline at any time in any order. Leave it out"
            )


def takes(pipe: Any, name: str) -> bool:
    """True if the pipeline has a named argument `name`; **kwargs are for deprecated ones in diffusers."""
    return name in inspect.signature(pipe.__call__).parameters


def _check_takes(pipe: Any, name: str, *, given_as: str) -> None:
    if not takes(pipe, name):
        raise InputError(f"{type(pipe).__name__} takes no {name}: leave {given_as} out")


def argument(pipe: Any, call: Call, name: str) -> Any:
    """The pipeline's value of `name`: the call's, or its own default; None if it has no such argument."""
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return call.get(name, default)


def guidance_scales_of(pipe: Any, calls: Sequence[Call]) -> tuple[float, ...]:
    """The guidance scales of all calls, ascending; empty if the pipeline has none."""
    scales = [argument(pipe, call, "guidance_scale") for call in calls]
    return tuple(sorted({float(scale) for scale in scales if _is_number(scale)}))


def with_guidance(pipe: Any, calls: Sequence[Call], scales: Sequence[float]) -> list[Call]:
    """The calls with `scales` in turn."""
    _check_takes(pipe, "guidance_scale", given_as="guidance_scales")
    try:
        numbers = list(scales)
    except TypeError:
        numbers = []
    if not numbers or not all(_is_number(scale) and 0.0 < float(scale) < np.inf for scale in numbers):
        raise InputError(
            f"guidance_scales is {scales!r}: expected a list of positive numbers, such as [5.0, 7.5, 10.0]"
        )
    return [{**call, "guidance_scale": float(numbers[i % len(numbers)])} for i, call in enumerate(calls)]


def _is_number(value: Any) -> bool:
    """Python's, NumPy's and tensors' single numbers."""
    if isinstance(value, (bool, np.bool_)):
        return False
    return isinstance(value, (int, float, np.number)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, one prompt each, without empty lines and lines that begin with #."""
    try:
        # "sig": editors of Windows begin a file with a mark.
        text = read_bounded(Path(path), LARGEST_PROMPTS, error=InputError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise InputError(f"{path} holds no prompts: expected one a line (lines that begin with # are comments)")
    return prompts


def prompt_calls(
    pipe: Any,
    prompts: Sequence[str],
    samples: int,
    *,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Calls for `samples` images, `batch_size` (1) per call: prompts in turn, each image with its own seed."""
    _check_takes(pipe, "prompt", given_as="prompts")
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    for name in guidance:
        _check_takes(pipe, name, given_as=name)
    size = batch_size or 1
    calls = []
    for first in range(0, samples, size):
        numbers = range(first, min(first + size, samples))
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in numbers]
        calls.append({"prompt": [prompts[i % len(prompts)] for i in numbers], "generator": generators, **guidance})
    return calls


def pipeline_images(pipe: Any, calls: Sequence[dict[str, Any]], steps: int) -> NDArray[np.float32]:
    """(P, C, H, W) images in [-1, 1] of all calls, at `num_inference_steps` = `steps`."""
    parts = [pipe(**call, num_inference_steps=steps, output_type="np").images for call in calls]
    images = np.concatenate(parts).astype(np.float32)  # (P, H, W, C) in [0, 1]
    return np.asarray(2.0 * images.transpose(0, 3, 1, 2) - 1.0, dtype=np.float32)
