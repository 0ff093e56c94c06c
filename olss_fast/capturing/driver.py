"""Runs a diffusers scheduler with chosen tensors in place of x_T, of the network's outputs and of its random draws.

A run is the loop of every pipeline, with a "network" that answers evaluation i with `outputs(i)`:

    state = init_noise_sigma x_T
    for t in timesteps:  x = scale_model_input(state, t);  f_i = outputs(i);  state = step(f_i, t, state)

A TorchFunctionMode watches the run. It answers the k-th Gaussian draw with `noises(k)`, refuses other random numbers,
and turns narrowing casts of float64 states into copies, so the coefficients are the scheduler's own without further
rounding. The scheduler's tables are unchanged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from olss_fast.capturing.facts import ENDS_AT_CLEAN, config_of
from olss_fast.errors import InputError, ScheduleError
from olss_fast.support.arguments import check_count
from olss_fast.support.text import quoted

Answer = Callable[[int], Tensor]

_GAUSSIAN = {torch.randn, torch.randn_like, torch.normal}
_CASTS = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.type_as}
_OTHER_DRAWS = {
    torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.bernoulli, torch.multinomial,
    torch.poisson, Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_,
    Tensor.multinomial, Tensor.random_,
}  # fmt: skip
_WATCHED = _GAUSSIAN | _CASTS | _OTHER_DRAWS


@dataclass
class Trace:
    """Record of one run: network inputs (S), the sample, the factor of scale_model_input (S), the noises drawn (Z)."""

    inputs: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    sample: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))


class _Watch(TorchFunctionMode):
    """Answers draws and keeps float64 states of `shape` in float64; see the module's docstring."""

    def __init__(self, shape: torch.Size, noises: Answer, trace: Trace) -> None:
        super().__init__()
        self._shape, self._answer, self._noises = shape, noises, trace.noises

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _WATCHED:  # almost every call
            return func(*args, **(kwargs or {}))
        if func in _GAUSSIAN:
            return (self._normal if func is torch.normal else self._draw)(*args, **(kwargs or {}))
        if func in _OTHER_DRAWS:
            raise ScheduleError(f"it draws with torch.{func.__name__}; only unit Gaussian noise becomes a column")
        result = func(*args, **(kwargs or {}))
        return args[0].clone() if self._rounds(args[0], result) else result

    def _rounds(self, before: Tensor, after: Tensor) -> bool:
        wide = before.dtype == torch.float64 and before.shape == self._shape
        return wide and after.is_floating_point() and after.dtype != torch.float64

    def _normal(self, mean: Any, std: Any = 1.0, size: Any = None, **_: Any) -> Tensor:
        shape = np.broadcast_shapes(np.shape(mean), np.shape(std)) if size is None else size
        noise: Tensor = mean + std * self._draw(shape)
        return noise

    def _draw(self, *size: Any, **named: Any) -> Tensor:
        wanted = named.get("size", size[0] if len(size) == 1 else size)
        shape = wanted.shape if isinstance(wanted, Tensor) else torch.Size(np.atleast_1d(wanted).tolist())
        if shape != self._shape:
            raise ScheduleError(f"it draws noise of shape {tuple(shape)} for a sample of shape {tuple(self._shape)}")
        self._noises.append(self._answer(len(self._noises)))
        return self._noises[-1].clone()


class Driver:
    """A private copy of a scheduler with its timesteps set. `run` may be called any number of times.

    Raises InputError for arguments that its methods do not take and a `begin` outside its timesteps, ScheduleError if
    it fails.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int | None,
        begin: int,
        arguments: Mapping[str, Any],
        step_arguments: Mapping[str, Any],
    ) -> None:
        self.name = type(scheduler).__name__
        self.config = config_of(scheduler)
        self.scheduler = copy.deepcopy(scheduler)
        _check_arguments(f"{self.name}.set_timesteps", self.scheduler.set_timesteps, arguments)
        _check_arguments(f"{self.name}.step", self.scheduler.step, step_arguments)
        counts = () if steps is None else (steps,)
        with np.errstate(all="ignore"):
            self._guarded("set_timesteps", lambda: self.scheduler.set_timesteps(*counts, **arguments))
        timesteps = _timesteps(self.name, getattr(self.scheduler, "timesteps", None))
        self.timesteps = timesteps[:-1] if self.name in ENDS_AT_CLEAN else timesteps
        check_count(len(self.timesteps), f"the number of timesteps of {self.name} is")
        self.order = int(getattr(self.scheduler, "order", 1))
        self.begin = _check_begin(begin, len(self.timesteps), self.order)
        self._step_arguments = dict(step_arguments)

    @property
    def nfe(self) -> int:
        """Number of network evaluations of a run."""
        return len(self.timesteps) - self.begin

    @torch.no_grad()
    def run(self, start: Tensor, outputs: Answer, noises: Answer) -> Trace:
        """One run from x_T = `start`, or with begin > 0 from the network input `start`."""
        scheduler, trace = copy.deepcopy(self.scheduler), Trace()
        # Of equal first timesteps, a scheduler that looks its index up starts at the second.
        starts_twice = len(self.timesteps) > 1 and bool(self.timesteps[0] == self.timesteps[1])
        if (self.begin or starts_twice) and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)
        step = _step_function(scheduler, self.timesteps, self._step_arguments)
        with np.errstate(all="ignore"), _Watch(start.shape, noises, trace):
            state = start if self.begin else start * float(getattr(scheduler, "init_noise_sigma", 1.0))
            for i in range(self.nfe):
                index = self.begin + i
                where = f"evaluation {i} (timestep {float(self.timesteps[index]):g})"
                x, scale = self._guarded(where, lambda: _scaled(scheduler, state, self.timesteps[index]))  # noqa: B023
                if i == 0 and self.begin:
                    x, state = start, start / scale
                trace.inputs.append(x)
                trace.scales.append(scale)
                state = self._guarded(where, lambda: step(outputs(i), index, state))  # noqa: B023
                self._check_state(state, start, where)
        trace.sample = state
        return trace

    def _check_state(self, state: Tensor, start: Tensor, where: str) -> None:
        if state.shape != start.shape:
            raise ScheduleError(
                f"{self.name} makes shape {tuple(state.shape)} of {tuple(start.shape)} at {where}; a plan keeps the "
                "shape of its sample"
            )

    def _guarded(self, where: str, call: Callable[[], Any]) -> Any:
        """The result of `call`; a failure of the scheduler or of `_Watch` becomes a ScheduleError."""
        try:
            return call()
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            raise ScheduleError(f"{self.name} cannot be captured: at {where}, {text}") from error


def _scaled(scheduler: Any, state: Tensor, timestep: Tensor) -> tuple[Tensor, float]:
    """The network input and its ratio to the state, by projection: scale_model_input multiplies by a number."""
    if not hasattr(scheduler, "scale_model_input"):
        return state, 1.0
    x = scheduler.scale_model_input(state, timestep)
    return x, float((x * state).sum() / (state * state).sum())


def _step_function(
    scheduler: Any, timesteps: Tensor, arguments: dict[str, Any]
) -> Callable[[Tensor, int, Tensor], Tensor]:
    """step(output, index of the timestep, state) -> next state, as the pipelines of the scheduler call it."""
    name = type(scheduler).__name__
    memory: Tensor | None = None

    def step(output: Tensor, index: int, state: Tensor) -> Tensor:
        nonlocal memory
        timestep = timesteps[index]
        if name == "CogVideoXDPMScheduler":
            back = timesteps[index - 1] if memory is not None else None
            state, memory = scheduler.step(output, memory, timestep, back, state, **arguments)
            return state
        if name == "DDPMWuerstchenScheduler":  # one timestep per sample
            timestep = timestep.expand(len(state))
        following = timesteps[index + 1] if index + 1 < len(timesteps) else None
        extra = {"prev_timestep": following} if name == "UnCLIPScheduler" else {}
        result = scheduler.step(output, timestep, state, **extra, **arguments)
        following_state: Tensor = result.prev_sample if hasattr(result, "prev_sample") else result[0]
        return following_state

    return step


def _timesteps(name: str, value: Any) -> Tensor:
    """(N,) finite numbers on the CPU. ScheduleError if set_timesteps left anything else."""
    try:
        timesteps = torch.as_tensor(value)
        usable = timesteps.device.type == "cpu" and timesteps.ndim == 1 and len(timesteps) > 0
        usable = usable and bool(torch.isfinite(timesteps).all())
    except (TypeError, ValueError, RuntimeError):
        usable = False
    if not usable:
        raise ScheduleError(
            f"{name} cannot be captured: after set_timesteps its timesteps are {quoted(value)}; expected one row of "
            "finite numbers on the CPU"
        )
    return timesteps


def _check_arguments(what: str, method: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        raise InputError(f"{what} does not take {', '.join(unknown)}; it takes {', '.join(parameters)}")


def _check_begin(begin: object, count: int, order: int) -> int:
    if isinstance(begin, bool) or not isinstance(begin, (int, np.integer)) or not 0 <= begin < count or begin % order:
        raise InputError(
            f"begin is {begin!r}; expected a whole number from 0 to {count - 1}, the index of the first of "
            f"{count} timesteps" + (f", and a multiple of {order}: no run starts inside a step" if order > 1 else "")
        )
    return int(begin)
