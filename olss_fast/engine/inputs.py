"""Checks of a call's inputs against those an engine was built for. Compiled code checks nothing itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from olss_fast.compiling.arguments import flatten, is_fixed_as
from olss_fast.engine.manifest import Input, Manifest
from olss_fast.errors import InputError
from olss_fast.executors.draws import initial_noise, unit_noise
from olss_fast.network import Streams, sums_to_finite
from olss_fast.support.text import quoted


def given_noise(
    noise: Tensor | None, shape: Sequence[int] | None, streams: Streams | None, manifest: Manifest, device: torch.device
) -> Tensor:
    """The noise of a call, given or drawn. InputError: rank, sizes, dtype, device, memory order, values. Synchronises
    with the device."""
    usual, dtype = manifest.profile.opt, getattr(torch, manifest.dtype)
    noise = initial_noise(noise, shape, streams, usual=usual, dtype=dtype, device=device)
    if not isinstance(noise, Tensor):
        raise InputError(f"noise is a {type(noise).__name__}; expected a tensor of {manifest.profile}")
    manifest.profile.check(noise.shape)
    _check_kind("noise", noise, manifest.dtype, device)
    if not noise.is_contiguous():
        raise InputError(f"noise has the strides {noise.stride()}, it is not contiguous; call .contiguous() first")
    if not sums_to_finite(noise) and not bool(torch.isfinite(noise).all()):
        raise InputError("the noise holds NaN or infinity")
    return noise


def usual_noise(manifest: Manifest, device: torch.device, batch: int | None = None) -> Tensor:
    """The same unit noise every time, at the profile's `opt`, or of so many samples. InputError outside the profile."""
    shape = (batch or manifest.profile.opt[0], *manifest.profile.opt[1:])
    manifest.profile.check(shape)
    return unit_noise(shape, torch.Generator().manual_seed(0), device).to(getattr(torch, manifest.dtype))


def network_inputs(
    manifest: Manifest,
    samples: int,
    device: torch.device,
    conditioning: Mapping[str, Any],
    unconditional: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The tensors after x and time by flat name, in the code's order; if doubled, for both halves, unconditional first.

    unconditional: by flat name.

    Raises InputError: missing or unknown names, a wrong shape, dtype or device; halves that differ in an argument that
    is not per sample.
    """
    flat = flatten(conditioning)
    for name, value in sorted(manifest.facts["fixed"].items()):
        if name not in flat:
            continue
        if "." in name and is_fixed_as(value, flat[name]):  # comes along with what it lies in
            del flat[name]
            continue
        raise InputError(f"conditioning: {name} was baked in when this engine was built, as {value}; leave it out")
    given = tensors_of(manifest.inputs, flat, samples, device, "conditioning")
    if not manifest.doubled:
        if unconditional:
            cure = "build it with unconditional={...}" if manifest.inputs else "its network takes no arguments"
            raise InputError(f"unconditional was given, but this engine is built without guidance: {cure}")
        return {name: each.contiguous() for name, each in given.items()}
    without = tensors_of(manifest.inputs, unconditional, samples, device, "unconditional", one_row=True)
    return {each.name: _joined(each, without[each.name], given[each.name]) for each in manifest.inputs}


def tensors_of(
    inputs: Sequence[Input],
    flat: Mapping[str, Any],
    samples: int,
    device: torch.device,
    what: str,
    *,
    one_row: bool = False,
) -> dict[str, Tensor]:
    """One tensor per input, by name, in the input's shape at this number of samples. A number is used for every sample,
    and with `one_row` so is a tensor of one row."""
    names = [each.name for each in inputs]
    missing, extra = sorted(set(names) - set(flat)), sorted(set(flat) - set(names))
    if missing or extra:
        found = [f"{', '.join(missing)} is missing"] if missing else []
        found += [f"{quoted(', '.join(extra))} is unknown"] if extra else []
        takes = ", ".join(names) or "none"
        raise InputError(f"{what}: {' and '.join(found)}; this engine takes the arguments: {takes}")
    return {
        each.name: _tensor(each, flat[each.name], samples, device, f"{what}[{each.name!r}]", one_row) for each in inputs
    }


def _tensor(expected: Input, value: Any, samples: int, device: torch.device, what: str, one_row: bool) -> Tensor:
    shape = (samples, *expected.shape[1:]) if expected.per_sample else expected.shape
    sizes = tuple(int(size) for size in shape)
    if isinstance(value, (bool, int, float)):
        number, dtype = _number(value, expected.dtype, what), getattr(torch, expected.dtype)
        return torch.full(sizes, number, dtype=dtype, device=device)
    if not isinstance(value, Tensor):
        raise InputError(f"{what} is a {type(value).__name__}; expected a {expected.dtype} tensor of shape {sizes}")
    _check_kind(what, value, expected.dtype, device)
    if one_row and expected.per_sample and value.shape == (1, *sizes[1:]):
        return value.expand(sizes)
    if tuple(value.shape) != sizes:
        raise InputError(f"{what} has shape {tuple(value.shape)}; expected {sizes}")
    return value


def _number(value: float, dtype: str, what: str) -> float:
    kind: torch.dtype = getattr(torch, dtype)
    if kind.is_floating_point:
        if abs(value) > torch.finfo(kind).max and not math.isinf(value):
            raise InputError(f"{what} is {quoted(value)}, which does not fit {dtype}")
        return float(value)
    least, most = (0, 1) if kind == torch.bool else (torch.iinfo(kind).min, torch.iinfo(kind).max)
    if not least <= value <= most or value != int(value):
        raise InputError(f"{what} is {quoted(value)}, which does not fit {dtype}")
    return int(value)


def _joined(expected: Input, without: Tensor, given: Tensor) -> Tensor:
    if expected.per_sample:
        return torch.cat([without, given])
    if not torch.equal(without, given):
        raise InputError(
            f"conditioning and unconditional differ in {expected.name!r}, which belongs to no sample, and the network "
            "is asked about both at once: give both the same"
        )
    return given.contiguous()


def _check_kind(what: str, tensor: Tensor, dtype: str, device: torch.device) -> None:
    if tensor.dtype != getattr(torch, dtype):
        raise InputError(f"{what} is {tensor.dtype}; this engine takes {dtype}: convert it, or build another engine")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise InputError(f"{what} has the layout {tensor.layout}; expected an ordinary tensor: call .to_dense() first")
    if tensor.device != device:
        raise InputError(f"{what} lies on {tensor.device}; this engine runs on {device}: move it there")
