"""The sampler's view of a network: raw outputs for a slice of the samples, after guidance, shape-checked.

Classifier-free guidance (Ho & Salimans 2022) lives inside the output: f = u + g (c - u), with u the unconditional and
c the conditional output. With two branches u and c are returned separately.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError, NetworkError
from olss_fast.support.network_failures import naming_arguments
from olss_fast.support.text import quoted
from olss_fast.support.tree import LEAVES, Flat, Path, as_tensor, flat, in_list, mapped, paired, spelled, with_paths

if TYPE_CHECKING:
    from olss_fast.plan.plan import Plan

Network = Callable[..., Any]
"""`network(x, timestep, **conditioning) -> raw output`: x (B, ...), timestep (B,) float32, output of x's shape."""

Conditioning = Mapping[str, Any]
Streams = torch.Generator | Sequence[torch.Generator]  # one for all samples, or one for each

LARGEST_SCALE = float(np.finfo(np.float32).max)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not float8, in which nothing is computed


def module_of(network: Any) -> torch.nn.Module | None:
    """The module whose weights a network reads: itself, or the one behind a bound method (`model.forward`), a
    functools.partial or a decorator with `__wrapped__` (`torch.no_grad()`). None if none is found."""
    while network is not None and not isinstance(network, torch.nn.Module):
        if isinstance(network, functools.partial):
            network = network.func
        elif isinstance(network, MethodType):
            network = network.__self__
        else:
            network = getattr(network, "__wrapped__", None)
    return network


def network_dtype(network: Network, default: torch.dtype) -> torch.dtype:
    """The floating-point dtype of the network's parameters, or `default` if none are found."""
    module = module_of(network)
    parameters = () if module is None else module.parameters()
    return next((each.dtype for each in parameters if each.is_floating_point()), default)


def network_device(networks: Sequence[Network]) -> torch.device | None:
    """The device of the networks' parameters; None if none are found."""
    modules = [module for module in map(module_of, networks) if module is not None]
    return next((parameter.device for module in modules for parameter in module.parameters()), None)


class OwnStart(ABC):
    """A network whose runs begin in one way only, as when a pipeline hands its own latents over: row 0 and the first
    timestep of a tuned plan are then the teacher's."""

    @abstractmethod
    def admits(self, plan: Plan) -> bool:
        """True if a run can begin as the plan does."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a `Network`."""


class Denoiser:
    """The checked inputs of a sampler: networks, the noise of P samples, conditioning and guidance.

    Args:
        network: one, or several for a model schedule. noise: (P, …), unit Gaussian.
        conditioning, unconditional: the networks' other arguments. Tensors whose first dimension is P, however deep
            they lie in dicts, lists, tuples and dataclasses, are sliced with the samples; all else is passed whole.
            An unconditional argument may be None, where this is the network's own "no condition".
        streams: of the fresh noises of a stochastic plan. doubled: both halves of a guided pair in one call, if they
            differ only in per-sample tensors. waits: check the values of noise on a GPU too, which synchronises.

    `evaluations` counts samples x network evaluations; a guided pair counts once. `tick` is called with each addition.

    Raises `InputError` for unusable noise or conditioning, for guidance without `unconditional`, if the two have
    different keys, and for lists in which some tensors have P rows and others do not.
    """

    def __init__(
        self,
        network: Network | Sequence[Network],
        noise: Tensor,
        *,
        conditioning: Conditioning | None = None,
        unconditional: Conditioning | None = None,
        guidance_scale: float = 1.0,
        streams: Streams | None = None,
        doubled: bool = True,
        waits: bool = True,
    ) -> None:
        self.networks = checked_networks(network)
        check_noise(noise, waits=waits)
        self.noise, self.samples, self.streams, self.doubled = noise, noise.shape[0], streams, doubled
        self.guidance_scale = checked_guidance_scale(guidance_scale)
        self.conditioning = checked_arguments(conditioning, "conditioning")
        self.unconditional = None if unconditional is None else checked_arguments(unconditional, "unconditional")
        self.evaluations = 0
        self.tick: Callable[[int], object] = lambda evaluations: None
        self._given = flat(self.conditioning)
        self._check()

    def _check(self) -> None:
        for name, arguments in (("conditioning", self.conditioning), ("unconditional", self.unconditional)):
            if arguments is not None and not LEAVES.issuperset(map(type, arguments.values())):
                _check_rows(arguments, name, self.samples)
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
        """True if an evaluation needs both the conditional and the unconditional output."""
        return self.unconditional is not None and self.guidance_scale != 1.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network input: the networks' own, else the noise's."""
        return network_dtype(self.networks[0], self.noise.dtype)

    def what_is_asked(self) -> dict[str, Any]:
        """Networks, noise, conditioning and guidance by name; see `identity`."""
        given = {"conditioning": self.conditioning, "unconditional": self.unconditional or {}}
        arguments = {f"{half}.{name}": each for half, named in given.items() for name, each in named.items()}
        names = ["network"] if len(self.networks) == 1 else [f"network{i}" for i in range(len(self.networks))]
        asked = {"noise": self.noise, "guidance_scale": self.guidance_scale}
        return {**asked, **arguments, **dict(zip(names, self.networks, strict=True))}

    def count(self, evaluations: int) -> None:
        """Adds to `evaluations`."""
        self.evaluations += evaluations
        self.tick(evaluations)

    def also(self, network: Network) -> Denoiser:
        """The same asked of another network, whose evaluations count here too."""
        other = Denoiser(
            network,
            self.noise,
            conditioning=self.conditioning,
            unconditional=self.unconditional,
            guidance_scale=self.guidance_scale,
            doubled=self.doubled,
        )
        other.tick = self.count
        return other

    def __call__(
        self, x: Tensor, timestep: float | Tensor, samples: slice, *, branches: int = 1, model: int = 0
    ) -> Tensor:
        """Raw outputs of shape (branches, B, ...) for x (B, ...), the network inputs of `samples`. Gradients go through
        it, to a timestep too that is a tensor ()."""
        self.count(x.shape[0])
        time = torch.ones(x.shape[0], dtype=torch.float32, device=x.device) * timestep
        doubled = branches == 2 or self.guided
        with self.naming_arguments():
            leaves, form = self.arguments(samples, x.device, doubled=doubled)
            ask = asking_with(self.networks, form.unflatten(leaves))
            if not doubled:
                return ask(x, time, model)[None]
            both = ask(torch.cat([x, x]), torch.cat([time, time]), model)
        without, given = both.chunk(2)
        return torch.stack([without, given]) if branches == 2 else torch.lerp(without, given, self.guidance_scale)[None]

    def asking(self, samples: slice) -> Callable[..., Tensor]:
        """The `evaluate` of a loop over `samples`: passes a copy of x in the networks' dtype."""
        dtype = self.dtype
        return lambda x, timestep, **how: self(x.to(dtype, copy=True), timestep, samples, **how)

    def naming_arguments(self) -> AbstractContextManager[None]:
        """Errors that an argument explains name it; see `support.network_failures`."""
        return naming_arguments(map(module_of, self.networks), self.samples, self.conditioning, self.unconditional)

    def arguments(self, samples: slice, device: torch.device, *, doubled: bool) -> Flat:
        """The network's arguments for `samples`: the conditional ones; if doubled, those of the doubled batch, or a
        list of those of each half, unconditional first, if one batch cannot hold both."""

        def part(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return (leaf[samples] if self._per_sample(leaf) else leaf).to(device)

        leaves, form = self._given
        given = [*map(part, leaves)]
        if not doubled:
            return Flat(given, form)
        without = [*map(part, self._without.leaves)]
        if not self._joins:
            return paired(Flat(without, self._without.form), Flat(given, form))
        triples = zip(leaves, without, given, strict=True)
        return Flat([torch.cat(pair) if self._per_sample(whole) else pair[1] for whole, *pair in triples], form)

    @property
    def without(self) -> dict[str, Any]:
        """The unconditional arguments in the shapes and dtypes of the conditional ones."""
        if self.unconditional is None:
            raise InputError("this plan keeps the unconditional and the conditional output apart: pass unconditional")
        return {name: _matched(self.unconditional[name], each, name) for name, each in self.conditioning.items()}

    @cached_property
    def _without(self) -> Flat:
        return flat(self.without)

    @cached_property
    def _joins(self) -> bool:
        """True if one doubled batch can hold both halves."""
        (given, form), (without, other) = self._given, self._without
        pairs = zip(given, without, strict=False)
        if not self.doubled or form != other:
            return False
        return all(isinstance(two, Tensor) if self._per_sample(one) else _same(one, two) for one, two in pairs)

    def _per_sample(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.samples


def asking_with(
    networks: Sequence[Network], arguments: dict[str, Any] | list[dict[str, Any]]
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """`ask(x, time, model)` with these arguments: one call, or two with a half of x each."""
    if isinstance(arguments, dict):
        return lambda x, time, model: call_network(networks[model], x, time, arguments)

    def twice(x: Tensor, time: Tensor, model: int) -> Tensor:
        halves = zip(x.chunk(2), time.chunk(2), arguments, strict=True)  # a network may write both into the same buffer
        return torch.cat([call_network(networks[model], half, t, part).clone() for half, t, part in halves])

    return twice


def checked_networks(network: Any) -> list[Network]:
    """One network or several as a list. `InputError` if one is not callable."""
    listed = list(network) if isinstance(network, (list, tuple)) else [network]
    if not listed or not all(map(callable, listed)):
        raise InputError(f"network must be a callable or a list of callables, got {network!r}")
    return listed


def checked_guidance_scale(scale: Any) -> float:
    """The guidance scale as a float. `InputError` unless it is a number, finite in float32."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise InputError(f"guidance_scale must be a number, got {scale!r}")
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:  # nor is NaN
        raise InputError(f"guidance_scale must be finite in float32, got {scale}")
    return float(scale)


def checked_arguments(given: Any, name: str) -> dict[str, Any]:
    """A checked copy of `conditioning` or `unconditional`, with numpy arrays as tensors. `InputError` if unusable."""
    if given is None:
        return {}
    if not isinstance(given, (dict, Mapping)):  # a dict is known at once
        raise InputError(f"{name} must be a mapping of argument names to values, got {type(given).__name__}")
    if not all(isinstance(key, str) for key in given):
        raise InputError(f"{name} must be a mapping of argument names to values, got the keys {list(given)}")
    return {key: value if isinstance(value, Tensor) else mapped(as_tensor, value) for key, value in given.items()}


def _check_rows(arguments: Mapping[str, Any], name: str, samples: int) -> None:
    """InputError if some tensors of a list are per sample and others have another number of rows."""
    rows: dict[Path, dict[str, int]] = {}
    for path, leaf in with_paths(arguments):
        if isinstance(leaf, Tensor) and leaf.ndim and in_list(path):
            rows.setdefault(path[:-1], {})[spelled(path)] = leaf.shape[0]
    for found in rows.values():
        odd = [place for place, count in found.items() if count not in (1, samples)]
        if odd and samples > 1 and samples in found.values():
            raise InputError(
                f"{name}{odd[0]} has {found[odd[0]]} samples, noise {samples}: tensors of a list or tuple must be all "
                "per sample, or none of them"
            )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    try:
        return first is second or bool(first == second)
    except (RuntimeError, TypeError, ValueError):  # nested tensors and arrays have no single truth value
        return False


def _matched(without: Any, given: Any, name: str) -> Any:
    """The unconditional argument, with numbers and single rows expanded to the shape of `given`."""
    if isinstance(given, Tensor):
        return _expanded(without, given, f"[{name!r}]")
    leaves, form = flat(without)
    if form != flat(given)[1]:
        return without  # the halves are separate calls
    pairs = zip(leaves, with_paths(given), strict=True)
    return form.unflatten([_expanded(leaf, like, f"[{name!r}]{spelled(path)}") for leaf, (path, like) in pairs])


def _expanded(without: Any, given: Any, place: str) -> Any:
    if without is None or not isinstance(given, Tensor):
        return without
    if not isinstance(without, (Tensor, bool, int, float)):
        raise InputError(
            f"unconditional{place} is {quoted(without)}, but conditioning{place} is a tensor of shape "
            f"{tuple(given.shape)}: give a tensor that broadcasts to it, a number, or None"
        )
    exact = torch.float64 if isinstance(without, float) else None
    value = without if isinstance(without, Tensor) else torch.as_tensor(without, dtype=exact, device=given.device)
    plain = value.to(given.dtype)
    if value.dtype != plain.dtype and not plain.is_floating_point() and not torch.equal(plain.to(value.dtype), value):
        raise InputError(
            f"unconditional{place} is {quoted(without)}, which is no {given.dtype}; expected whole numbers"
        )
    try:
        return plain if plain.shape == given.shape else plain.expand(given.shape)
    except RuntimeError as error:
        raise InputError(
            f"unconditional{place} has shape {tuple(value.shape)}, which does not broadcast to conditioning{place} "
            f"of shape {tuple(given.shape)}"
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
    """True only if no value is NaN or infinity, since the sum would be too; one pass, without temporaries. A sum may
    overflow though no value does: False means to check each."""
    return math.isfinite(float(values.sum()))


def check_noise(noise: Any, *, waits: bool = True) -> None:
    """Raise `InputError` unless `noise` is a finite floating-point tensor (P, ...) with at least one sample. Without
    `waits` values are checked only if that needs no GPU synchronisation."""
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
    if (noise.device.type != "cpu" and not waits) or sums_to_finite(noise):
        return
    finite = torch.isfinite(noise).flatten(1).all(1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten().tolist()
        raise InputError(f"noise holds NaN or infinity in sample(s) {bad[:8]}")
