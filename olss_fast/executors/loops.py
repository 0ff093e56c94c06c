"""Loops by shape: their buffers and graphs are made once, kept while they are used, and written over between runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import OlssError
from olss_fast.executors.fused import Ask, FusedLoop
from olss_fast.executors.graph import GraphLoop
from olss_fast.plan import Plan

Key = tuple[tuple[Any, ...], object]
KEPT = 4  # shapes whose buffers and graphs are kept


@dataclass(frozen=True)
class Stats:
    """What an executor did: `backend` of the last run, captures and replays of graphs since it was made, why it fell
    back (or captured again), `bytes` of its own buffers, and kernels between two network calls."""

    backend: str
    captures: int
    replays: int
    reason: str
    bytes: int
    kernels_per_step: int | None


class Loops:
    """Runs plans on `networks` with the backend "fused" or "graph"; a network that cannot be captured runs fused."""

    def __init__(self, networks: Sequence[Any], backend: str, *, unroll: bool = False) -> None:
        self.networks, self.backend, self.unroll = networks, backend, unroll
        self._loops: OrderedDict[Key, tuple[FusedLoop, Any]] = OrderedDict()
        self._last: FusedLoop | None = None
        self._pool: Any = None
        self._not_captured: set[Key] = set()
        self._captures = self._replays = 0
        self._reason = ""

    def run(
        self,
        plan: Plan,
        noise: Tensor,
        arguments: Any,
        asking: Callable[[Any], Ask],
        *,
        dtype: torch.dtype,
        device: torch.device,
        doubled: bool,
        guidance_scale: float,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Samples (B, …) of `noise`, in its dtype and on its device.

        `arguments` are those of the network, nested as they like; `asking(held)` makes of the loop's own copy of them
        the function `ask(x, time, model)`.
        """
        with torch.inference_mode(False), torch.no_grad():  # buffers outlive the mode that they were made in
            like = torch.empty_like(noise, dtype=dtype, device=device)
            kind = (like.shape, like.stride(), dtype, device, doubled, plan.branches, autocast_of(device))
            key = (kind, signature(arguments))
            loop = self._last = self._loop(key, plan, like, arguments, asking)
            loop.load(plan, guidance_scale)
            loop.fill(noise, step_noise)
            try:
                return loop.run().to(noise, copy=True)
            except (OlssError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if not isinstance(loop, GraphLoop):
                    raise
                message = " ".join(str(error).split())[:200]
                reason = f"the network cannot be captured: {type(error).__name__}: {message}"
            self._forget(key)
            self._not_captured.add(key)
            try:
                loop = self._last = self._loop(key, plan, like, arguments, asking)
                loop.load(plan, guidance_scale)
                loop.fill(noise, step_noise)
                result = loop.run().to(noise, copy=True)
            except Exception:  # it cannot be run at all, which says nothing about graphs
                self._not_captured.discard(key)
                raise
            self._reason = reason
            return result

    def reset(self) -> None:
        """Lets go of all buffers and graphs: for changes of a network that no capture sees, as of adapters' scales."""
        while self._loops:
            self._forget()
        self._not_captured.clear()
        self._last = None

    def require_finite(self) -> None:
        """NetworkError that names the first evaluation of the last run that was not finite. Waits for the device."""
        if self._last is not None:
            self._last.require_finite()

    def stats(self) -> Stats:
        loops = [loop for loop, _ in self._loops.values()]
        graphs = [loop for loop in loops if isinstance(loop, GraphLoop)]
        moved = [f"captured again, {loop.moved} was replaced" for loop in graphs if loop.moved]
        return Stats(
            backend=self.backend if self._last is None else self._last.backend,
            captures=self._captures + sum(loop.captures for loop in graphs),
            replays=self._replays + sum(loop.replays for loop in graphs),
            reason="; ".join([*([self._reason] if self._reason else []), *moved]),
            bytes=sum(loop.bytes for loop in loops),
            kernels_per_step=1,
        )

    def _loop(self, key: Key, plan: Plan, like: Tensor, arguments: Any, asking: Callable[[Any], Ask]) -> FusedLoop:
        """The loop for this shape of noise and of arguments, the latter written into its copies."""
        room = (0, 0)
        if key in self._loops and not self._loops[key][0].fits(plan):
            room = self._loops[key][0].room[:2]
            self._forget(key)
        if key not in self._loops:
            held = copied(arguments)
            self._loops[key] = self._new_loop(key, asking(held), like, plan, room), held
        loop, held = self._loops[key]
        write_over(held, arguments)
        self._loops.move_to_end(key)
        while len(self._loops) > KEPT:
            self._forget()
        return loop

    def _new_loop(self, key: Key, ask: Ask, like: Tensor, plan: Plan, room: tuple[int, int]) -> FusedLoop:
        doubled = bool(key[0][4])
        if self.backend == "fused" or key in self._not_captured:
            return FusedLoop(ask, like, plan, doubled=doubled, room=room)
        return GraphLoop(
            ask,
            like,
            plan,
            doubled=doubled,
            networks=self.networks,
            pool=self._memory,
            unroll=self.unroll,
            room=room,
        )

    def _memory(self) -> Any:
        """The pool of all graphs; a new one where none is alive, for the old one went with its last graph."""
        alive = any(isinstance(loop, GraphLoop) and loop.alive for loop, _ in self._loops.values())
        if not alive and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _forget(self, key: Key | None = None) -> None:
        """Lets go of a loop, the one that was used longest ago if none is named; what it counted stays counted."""
        loop, _ = self._loops.pop(next(iter(self._loops)) if key is None else key)
        if isinstance(loop, GraphLoop):
            self._captures += loop.captures
            self._replays += loop.replays


def autocast_of(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether and in what type autocast runs: a graph stays what it was captured under."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def signature(value: Any) -> object:
    """Shapes, dtypes and plain values of arguments: where they are equal, one can be written over the other."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride(), value.device
    if isinstance(value, Mapping):
        return type(value), tuple((key, signature(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(signature(each) for each in value)
    plain = isinstance(value, (str, int, float, bool, type(None), np.generic, torch.dtype, torch.device))
    return type(value), value if plain else id(value)


def copied(value: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(each) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(copied(each) for each in value)
    return value


def write_over(held: Any, value: Any) -> None:
    """Copies the tensors of `value` into those of `held`, which has the same signature."""
    if isinstance(held, Tensor):
        held.copy_(value)
    elif isinstance(held, Mapping):
        for key, each in held.items():
            write_over(each, value[key])
    elif isinstance(held, (list, tuple)):
        for each, other in zip(held, value, strict=True):
            write_over(each, other)
