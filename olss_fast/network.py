"""What a sampler sees of a network: raw outputs for a slice of the samples, after guidance, shape-checked.

Classifier-free guidance (Ho & Salimans 2022) lives inside the output: f = u + g (c - u), with u the unconditional and
c the conditional output. With two branches u and c are handed on apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast._network_failures import naming_arguments
from olss_fast.errors import InputError, NetworkError

Network = Callable[..., Any]
"""`network(x, timestep, **conditioning) -> raw output`: x (B, ...), timestep (B,) float32, output of x's shape."""

Conditioning = Mapping[str, Any]

LARGEST_SCALE = float(np.finfo(np.float32).max)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what noise and networks may be of


def module_of(network: Any) -> torch.nn.Module | None:
    """The module whose weights a network reads: itself, or the one behind a bound method (`model.forward`), a
    functools.partial or a decorator that tells what it wraps (`torch.no_grad()`). None where there is none to see."""
    while network is not None and not isinstance(network, torch.nn.Module):
        if isinstance(network, functools.partial):
            network = network.func
        elif isinstance(network, MethodType):
            network = network.__self__
        else:
            network = getattr(network, "__wrapped__", None)
    return network


class Denoiser:
    """A network (or several, for a model schedule) with its conditioning and guidance.

    Arguments of the conditioning whose first dimension is the number of samples are sliced with the samples;
    everything else is handed on whole. `evaluations` counts samples x network evaluations; a guided pair counts once.

    Raises `InputError` for guidance without `unconditional`, or for the two having different keys.
    """

    def __init__(
        self,
        network: Network | Sequence[Network],
        *,
        samples: int,
        conditioning: Conditioning | None = None,
        unconditional: Conditioning | None = None,
        guidance_scale: float = 1.0,
        doubled: bool = True,
    ) -> None:
        self.networks = checked_networks(network)
        self.samples = samples
        self.guidance_scale = checked_guidance_scale(guidance_scale)
        self.conditioning = checked_arguments(conditioning, "conditioning")
        self.unconditional = None if unconditional is None else checked_arguments(unconditional, "unconditional")
        self.doubled = doubled
        self.evaluations = 0
        self._check()

    def _check(self) -> None:
        if self.unconditional is None:
            if self.guidance_scale != 1.0:
                raise InputError(
                    f"guidance_scale={self.guidance_scale} needs the unconditional arguments too: pass "
                    "unconditional={...} with the same keys as conditioning, or guidance_scale=1.0"
                )
            return
        if set(self.unconditional) != set(self.conditioning):
            raise InputError(
                f"unconditional has the keys {sorted(self.unconditional)} but conditioning has "
                f"{sorted(self.conditioning)}: give both the same"
            )

    @property
    def guided(self) -> bool:
        """Whether an evaluation asks the network twice."""
        return self.unconditional is not None and self.guidance_scale != 1.0

    def what_is_asked(self) -> dict[str, Any]:
        """Networks, conditioning and guidance by name; see `identity`."""
        given = {"conditioning": self.conditioning, "unconditional": self.unconditional or {}}
        arguments = {f"{half}.{name}": each for half, named in given.items() for name, each in named.items()}
        names = ["network"] if len(self.networks) == 1 else [f"network{i}" for i in range(len(self.networks))]
        return {"guidance_scale": self.guidance_scale, **arguments, **dict(zip(names, self.networks, strict=True))}

    def require_networks(self, highest: int) -> None:
        if highest >= len(self.networks):
            raise InputError(f"the plan uses network {highest}, but {len(self.networks)} came: pass a list of networks")

    def __call__(self, x: Tensor, timestep: float, samples: slice, *, branches: int = 1, model: int = 0) -> Tensor:
        """Raw outputs of shape (branches, B, ...) for x (B, ...), the network inputs of `samples`."""
        network = self.networks[model]
        self.evaluations += x.shape[0]
        time = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        conditional = self._slice(self.conditioning, samples, x)
        with self.naming_arguments():
            if branches == 1 and not self.guided:
                return call_network(network, x, time, conditional)[None]
            without, given = self._pair(network, x, time, samples, conditional)
        return torch.stack([without, given]) if branches == 2 else torch.lerp(without, given, self.guidance_scale)[None]

    def naming_arguments(self) -> AbstractContextManager[None]:
        """What the network raises because of an argument says so; see `_network_failures`."""
        modules = [module_of(network) for network in self.networks]
        return naming_arguments(modules, self.samples, self.conditioning, self.unconditional)

    def arguments(self, x: Tensor, *, doubled: bool) -> list[dict[str, Any]]:
        """The network's arguments for all samples on x's device: [joined for a doubled batch], or one for each half,
        unconditional first, where they cannot be joined; not doubled, the conditional ones alone."""
        everything = slice(0, self.samples)
        conditional = self._slice(self.conditioning, everything, x)
        if not doubled:
            return [conditional]
        if self.unconditional is None:
            raise InputError("this plan keeps the unconditional and the conditional output apart: pass unconditional")
        unconditional = self._slice(self.unconditional, everything, x)
        _match(unconditional, conditional)
        joined = self._join(unconditional, conditional) if self.doubled else None
        return [unconditional, conditional] if joined is None else [joined]

    def _pair(
        self, network: Network, x: Tensor, time: Tensor, samples: slice, conditional: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if self.unconditional is None:
            raise InputError("this plan keeps the unconditional and the conditional output apart: pass unconditional")
        unconditional = self._slice(self.unconditional, samples, x)
        _match(unconditional, conditional)
        joined = self._join(unconditional, conditional) if self.doubled else None
        if joined is None:  # the first output is copied: a network may write the second into the same buffer
            return call_network(network, x, time, unconditional).clone(), call_network(network, x, time, conditional)
        both = call_network(network, torch.cat([x, x]), torch.cat([time, time]), joined)
        first, second = both.chunk(2)
        return first, second

    def _join(self, unconditional: dict[str, Any], conditional: dict[str, Any]) -> dict[str, Any] | None:
        """Arguments of one doubled batch, unconditional half first; None if some argument cannot be doubled."""
        try:
            return {
                name: self._join_one(self.conditioning[name], unconditional[name], given)
                for name, given in conditional.items()
            }
        except _CannotJoin:
            return None

    def _join_one(self, whole: Any, without: Any, given: Any) -> Any:
        """`whole` is the argument before slicing, which tells whether it belongs to the samples."""
        if isinstance(given, Mapping) and isinstance(without, Mapping) and set(given) == set(without):
            return {key: self._join_one(whole[key], without[key], each) for key, each in given.items()}
        if self._per_sample(whole):
            return torch.cat([without, given])
        if _same(given, without):
            return given
        raise _CannotJoin

    def _per_sample(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.samples

    def _slice(self, arguments: Conditioning, samples: slice, x: Tensor) -> dict[str, Any]:
        return {name: self._slice_one(value, samples, x) for name, value in arguments.items()}

    def _slice_one(self, value: Any, samples: slice, x: Tensor) -> Any:
        if isinstance(value, Mapping):
            return {key: self._slice_one(each, samples, x) for key, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        if self._per_sample(value):
            value = value[samples]
        return value.to(x.device)


class _CannotJoin(Exception):
    """The two halves of a guided pair differ in an argument that cannot be handed to both at once."""


def checked_networks(network: Any) -> list[Network]:
    """One network or several as a list. `InputError` for what cannot be called."""
    listed = list(network) if isinstance(network, (list, tuple)) else [network]
    if not listed or not all(callable(each) for each in listed):
        raise InputError(f"network must be a callable or a list of callables, got {network!r}")
    return listed


def checked_guidance_scale(scale: Any) -> float:
    """`InputError` for what is not a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise InputError(f"guidance_scale must be a number, got {scale!r}")
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:  # nor is NaN
        raise InputError(f"guidance_scale must be finite in float32, got {scale}")
    return float(scale)


def checked_arguments(given: Any, name: str) -> dict[str, Any]:
    """A checked copy of `conditioning` or `unconditional`, numpy arrays made tensors."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"{name} must be a mapping of argument names to values, got {type(given).__name__}")
    if not all(isinstance(key, str) for key in given):
        raise InputError(f"{name} must be a mapping of argument names to values, got the keys {list(given)}")
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in given.items()}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    try:
        return first is second or bool(first == second)
    except (RuntimeError, TypeError, ValueError):  # nested tensors and arrays have no single truth value
        return False


def _match(unconditional: dict[str, Any], conditional: dict[str, Any]) -> None:
    """A scalar or a single row stands for every sample: expand it to the conditional argument's shape, in place."""
    for name, given in conditional.items():
        without = unconditional[name]
        if not isinstance(given, Tensor):
            continue
        if isinstance(without, (bool, int, float)):
            unconditional[name] = torch.full_like(given, without)
        elif not isinstance(without, Tensor):
            raise InputError(
                f"unconditional[{name!r}] is {type(without).__name__}, but conditioning[{name!r}] is a tensor of shape "
                f"{tuple(given.shape)}: give a tensor that broadcasts to it, or a number"
            )
        elif without.shape != given.shape:
            try:
                unconditional[name] = without.expand(given.shape)
            except RuntimeError as error:
                raise InputError(
                    f"unconditional[{name!r}] has shape {tuple(without.shape)}, which does not broadcast to "
                    f"conditioning[{name!r}] of shape {tuple(given.shape)}"
                ) from error


def call_network(network: Network, x: Tensor, time: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The raw output, checked: a floating-point tensor of x's shape. Raises `NetworkError`."""
    output = network(x, time, **arguments)
    if not isinstance(output, Tensor):  # diffusers models return an object with `.sample`, or a tuple
        output = output[0] if isinstance(output, tuple) and output else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise NetworkError(f"the network returned {type(output).__name__}, expected a tensor of shape {tuple(x.shape)}")
    if output.shape != x.shape:
        raise NetworkError(
            f"the network returned shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}; "
            "a raw output must have the input's shape (networks that also predict the variance: pass its first half)"
        )
    if not output.is_floating_point() or output.layout != torch.strided:
        raise NetworkError(
            f"the network returned dtype {output.dtype} and layout {output.layout}, expected a floating-point tensor "
            "of ordinary layout"
        )
    return output


def require_finite(outputs: Tensor, *, step: int, first_sample: int) -> None:
    """Raise `NetworkError` naming evaluation and sample if `outputs` (branches, B, ...) holds NaN or infinity."""
    finite = torch.isfinite(outputs).flatten(2).all(2).all(0)
    if not bool(finite.all()):
        bad = [first_sample + int(i) for i in torch.nonzero(~finite).flatten()]
        raise NetworkError(
            f"the network returned NaN or infinity at evaluation {step} for sample(s) {bad[:8]}"
            f"{'...' if len(bad) > 8 else ''}; lower the guidance, or run the network in a wider dtype"
        )


def sums_to_finite(values: Tensor) -> bool:
    """True only where no value is NaN or infinity, for a sum would be so too; one pass, with nothing to keep. A sum may
    overflow where no value does: then, False says to look at each."""
    return math.isfinite(float(values.sum()))


def check_noise(noise: Any) -> None:
    """Raise `InputError` unless `noise` is a finite floating-point tensor (P, ...) with at least one sample."""
    check_noise_kind(noise)
    if sums_to_finite(noise):
        return
    finite = torch.isfinite(noise).flatten(1).all(1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten().tolist()
        raise InputError(f"noise holds NaN or infinity in sample(s) {bad[:8]}")


def check_noise_kind(noise: Any) -> None:
    """What `check_noise` does without a look at the values, which on a GPU would be a wait."""
    if not isinstance(noise, Tensor):
        raise InputError(f"noise must be a tensor of shape (samples, ...), got {type(noise).__name__}")
    if noise.layout != torch.strided or noise.is_nested or noise.is_meta:
        raise InputError(
            f"noise must be an ordinary tensor that holds its values, got {noise.layout}"
            f"{', nested' if noise.is_nested else ''} on {noise.device}"
        )
    if noise.dtype not in FLOATS or noise.ndim < 2 or noise.numel() == 0:
        raise InputError(
            f"noise must be a floating-point tensor of shape (samples, ...), got {noise.dtype} of {tuple(noise.shape)}"
            "; float16, bfloat16, float32 and float64 are"
        )
