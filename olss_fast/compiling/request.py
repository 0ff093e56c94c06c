"""The arguments of `build`, all checked before minutes are spent on compiling."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olss_fast.compiling.arguments import FlatNetwork, fixed_value, flatten
from olss_fast.compiling.quiet import shortened
from olss_fast.compiling.shapes import BATCH, DTYPES, Profile, name_of
from olss_fast.errors import InputError, NetworkError, OlssError
from olss_fast.executors.draws import unit_noise
from olss_fast.network import Conditioning, Denoiser, checked_arguments, network_device, network_dtype, require_finite
from olss_fast.plan.plan import Plan
from olss_fast.sampling.sampling import check_plan_fits
from olss_fast.support.device import pick_device
from olss_fast.support.tree import mapped

RESERVED = {"noise", "seed", "shape", "steps", "plan", "guidance_scale", "unconditional", "generator"}
"""Arguments of an engine's call, which the network's own are passed beside."""


@dataclass(frozen=True)
class Request:
    """The checked arguments. tensors: the example's, by name; `unconditional` likewise, with one row each."""

    flat: FlatNetwork
    profile: Profile
    tensors: dict[str, Tensor]
    unconditional: dict[str, Tensor]
    fixed: dict[str, str]
    doubled: bool
    guidance_scale: float
    dtype: torch.dtype
    device: torch.device
    times: tuple[float, ...]

    @property
    def per_sample(self) -> list[bool]:
        """`is_per_sample` of each tensor."""
        return [is_per_sample(each, self.profile) for each in self.tensors.values()]

    @property
    def shapes(self) -> dict[str, list[int | str]]:
        """Of the tensors, with BATCH in place of the number of samples."""
        named = zip(self.tensors.items(), self.per_sample, strict=True)
        return {name: [BATCH, *each.shape[1:]] if own else [*each.shape] for (name, each), own in named}

    def inputs(self, least: int = 1, *, time: float | None = None, shape: Sequence[int] | None = None) -> list[Tensor]:
        """x, time and the example's tensors at `shape` (default: `opt`), with at least `least` steps in each dynamic
        axis, since one is a special case for torch.export. time defaults to the first timestep of the first plan."""
        sizes = list(self.profile.opt if shape is None else shape)
        for axis in self.profile.dynamic:
            sizes[axis] = max(sizes[axis], least * self.profile.multiple[axis])
        batch = sizes[0] * (1 + self.doubled)
        x = _noise((batch, *sizes[1:]), self.device, self.dtype)
        times = torch.full((batch,), self.times[0] if time is None else time, dtype=torch.float32, device=self.device)
        rest = [
            _repeated(each, batch) if own else each
            for each, own in zip(self.tensors.values(), self.per_sample, strict=True)
        ]
        return [x, times, *rest]


def checked_request(
    network: nn.Module,
    plans: Mapping[str, Plan],
    profile: Profile,
    conditioning: Conditioning | None,
    unconditional: Conditioning | None,
    guidance_scale: float | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    reserved: Set[str] = RESERVED,
) -> Request:
    """The arguments as a Request. reserved: names that the network's arguments may not have. Raises as `build`."""
    if not isinstance(network, nn.Module) or network.training:
        what = "in training mode" if isinstance(network, nn.Module) else f"a {type(network).__name__}"
        raise InputError(f"network is {what}; expected a torch.nn.Module in evaluation mode: wrap it, or call .eval()")
    first = next(iter(plans.values()))
    scale = _scale(first, unconditional, guidance_scale)
    device = pick_device(network_device([network]) or "cpu" if device is None else device)
    given = mapped(lambda leaf: _on_device(leaf, device), checked_arguments(conditioning, "conditioning"))
    if unusable := sorted(name for name in given if name in reserved or not name.isidentifier()):
        raise InputError(
            f"the network has an argument {unusable[0]!r}; expected Python names other than "
            f"{', '.join(sorted(reserved))}: wrap the network"
        )
    dtype = _dtype(network, dtype)
    noise = _noise(profile.opt, device, dtype)
    denoiser = Denoiser(network, noise, conditioning=given, unconditional=unconditional, guidance_scale=scale)
    for each in plans.values():
        check_plan_fits(each, denoiser)
    flat, without = flatten(given), {} if unconditional is None else flatten(denoiser.without)
    _check_baked_in(flat, without)
    tensors = {name: each for name, each in flat.items() if isinstance(each, Tensor)}
    request = Request(
        flat=FlatNetwork(_prepared(network, dtype, device), given),
        profile=profile,
        tensors=tensors,
        unconditional={
            name: _one_row(name, without[name].to(device), is_per_sample(each, profile))
            for name, each in tensors.items()
            if name in without
        },
        fixed={name: fixed_value(each) for name, each in flat.items() if not isinstance(each, Tensor)},
        doubled=unconditional is not None,
        guidance_scale=scale,
        dtype=dtype,
        device=device,
        times=tuple(map(float, first.timesteps)),
    )
    _check_callable(request)
    _check_shared(request)
    return request


def _check_baked_in(given: Mapping[str, Any], without: Mapping[str, Any]) -> None:
    """InputError if the halves differ in a value that is not a tensor in both."""
    for name in sorted(set(given) & set(without)):
        one, other = given[name], without[name]
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            continue
        if isinstance(one, Tensor) or isinstance(other, Tensor) or not _equal(one, other):
            raise InputError(
                f"conditioning and unconditional differ in {name!r}, which is not a tensor in both: it is baked in; "
                "give a tensor that broadcasts to the other"
            )


def _equal(one: Any, other: Any) -> bool:
    arrays = isinstance(one, np.ndarray) or isinstance(other, np.ndarray)  # of text, say: others are tensors by now
    return np.array_equal(one, other) if arrays else bool(one == other)


def _check_shared(request: Request) -> None:
    """InputError if the halves differ in a tensor that is one for the whole batch."""
    for name, sizes in request.shapes.items():
        row = request.unconditional.get(name)
        if row is not None and sizes[:1] != [BATCH] and not torch.equal(row, request.tensors[name]):
            raise InputError(
                f"conditioning and unconditional differ in {name!r}, whose first size is not that of the samples, "
                f"{request.profile.opt[0]}: one doubled batch cannot hold both"
            )


def _check_callable(request: Request) -> None:
    """Tries a call before minutes are spent on compiling, also to find out if the network writes to its input.

    Raises NetworkError if it cannot be called.
    """
    inputs = request.inputs()
    x = inputs[0].clone()
    try:
        with torch.no_grad():
            output = request.flat(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as cause:
        if isinstance(cause, (OlssError, torch.OutOfMemoryError)):
            raise
        raise NetworkError(
            f"the network cannot be called with noise of shape {request.profile.opt} and this example: "
            f"{shortened(cause)}; arguments that belong to the samples begin with as many rows as this noise"
        ) from cause
    request.flat.lends_x = torch.equal(inputs[0], x)
    require_finite(output[None], step=0, first_sample=0)


def _noise(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same unit noise every time."""
    return unit_noise(shape, torch.Generator().manual_seed(0), device).to(dtype)


def named_plans(plan: Any) -> dict[str, Plan]:
    """Plans by name; those without one are named by their method and NFE. InputError for unusable names."""
    if isinstance(plan, Mapping):
        named = dict(plan)
    else:
        named = {}
        for each in [plan] if isinstance(plan, Plan) else list(plan) if isinstance(plan, Sequence) else []:
            base = _plan_name(each)
            copies = sum(re.fullmatch(re.escape(base) + r"(\.\d+)?", name) is not None for name in named)
            named[base if copies == 0 else f"{base}.{copies + 1}"] = each
    if not named or not all(isinstance(each, Plan) for each in named.values()):
        raise InputError(f"plan is {plan!r}; expected a Plan, several, or several by name")
    if not all(isinstance(name, str) and re.fullmatch(r"[\w .,+()-]{1,100}", name) for name in named):
        raise InputError(f"the plans are named {list(named)}; expected letters, digits, spaces and . , + - _ ( )")
    return named


def _plan_name(plan: Any) -> str:
    if not isinstance(plan, Plan):
        raise InputError(f"plan holds a {type(plan).__name__}; expected Plans")
    return re.sub(r"[^\w.+-]+", "-", f"{plan.metadata.get('method', 'plan')}-{plan.nfe}")[:80]


def _scale(plan: Plan, unconditional: Conditioning | None, guidance_scale: float | None) -> float:
    if guidance_scale is not None:
        return guidance_scale
    return float(plan.metadata.get("guidance_scale", 1.0)) if unconditional is not None else 1.0


def _dtype(network: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    chosen = network_dtype(network, torch.float32) if dtype is None else dtype
    if not isinstance(chosen, torch.dtype) or name_of(chosen) not in DTYPES:
        raise InputError(f"dtype is {chosen!r}; expected one of {', '.join(f'torch.{each}' for each in DTYPES)}")
    return chosen


def _prepared(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network itself, or a copy if its dtype or device differs."""
    tensors = [*network.parameters(), *network.buffers()]
    fits = all(each.device == device and (not each.is_floating_point() or each.dtype == dtype) for each in tensors)
    return network if fits else copy.deepcopy(network).to(device=device, dtype=dtype)


def _on_device(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device).contiguous() if isinstance(leaf, Tensor) else leaf


def is_per_sample(value: Tensor, profile: Profile) -> bool:
    """True if the first axis of `value` has the batch size of the example."""
    return value.ndim > 0 and value.shape[0] == profile.opt[0]


def _repeated(value: Tensor, batch: int) -> Tensor:
    """`batch` rows, cycling through those of `value`."""
    return value[torch.arange(batch, device=value.device) % value.shape[0]]


def _one_row(name: str, whole: Tensor, own: bool) -> Tensor:
    """The row that stands for every sample in the unconditional half."""
    first = whole[:1] if own else whole
    if not torch.equal(whole, first.expand(whole.shape)):
        raise InputError(f"the rows of unconditional[{name!r}] differ; expected one row that stands for every sample")
    return first.clone(memory_format=torch.contiguous_format)
