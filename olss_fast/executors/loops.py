"""Loops by shape: their buffers and graphs are made once, kept while they are used, and written over between runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import OlssError
from olss_fast.executors.fused import Ask, FusedLoop
from olss_fast.executors.graph import GraphLoop
from olss_fast.plan import Plan

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
        self._loops: OrderedDict[object, tuple[FusedLoop, Any]] = OrderedDict()
        self._last: FusedLoop | None = None
        self._pool: Any = None
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
        like = torch.empty_like(noise, dtype=dtype, device=device)
        loop = self._last = self._loop(plan, like, arguments, asking, doubled)
        loop.load(plan, guidance_scale)
        loop.fill(noise, step_noise)
        try:
            return loop.run().to(noise, copy=True)
        except OlssError:
            raise
        except Exception as error:
            if not isinstance(loop, GraphLoop):
                raise
            message = " ".join(str(error).split())[:200]
            self._reason = f"the network cannot be captured: {type(error).__name__}: {message}"
            self.backend = "fused"
            while self._loops:
                self._forget()
        return self.run(
            plan,
            noise,
            arguments,
            asking,
            dtype=dtype,
            device=device,
            doubled=doubled,
            guidance_scale=guidance_scale,
            step_noise=step_noise,
        )

    def require_finite(self) -> None:
        """NetworkError that names the first evaluation of the last run that was not finite. Waits for the device."""
        if self._last is not None:
            self._last.require_finite()

    def stats(self) -> Stats:
        loops = [loop for loop, _ in self._loops.values()]
        graphs = [loop for loop in loops if isinstance(loop, GraphLoop)]
        moved = [f"captured again, the parameter {loop.moved} was replaced" for loop in graphs if loop.moved]
        return Stats(
            backend=self.backend if self._last is None else self._last.backend,
            captures=self._captures + sum(loop.captures for loop in graphs),
            replays=self._replays + sum(loop.replays for loop in graphs),
            reason="; ".join([*([self._reason] if self._reason else []), *moved]),
            bytes=sum(loop.bytes for loop in loops),
            kernels_per_step=1,
        )

    def _loop(self, plan: Plan, like: Tensor, arguments: Any, asking: Callable[[Any], Ask], doubled: bool) -> FusedLoop:
        """The loop for this shape of noise and of arguments, the latter written into its copies."""
        kind = tuple(like.shape), like.stride(), like.dtype, like.device
        key = (self.backend, kind, doubled, plan.branches, signature(arguments))
        if key in self._loops and not self._loops[key][0].fits(plan):
            self._forget(key)
        if key not in self._loops:
            held = copied(arguments)
            self._loops[key] = self._new_loop(asking(held), like, plan, doubled), held
        loop, held = self._loops[key]
        write_over(held, arguments)
        self._loops.move_to_end(key)
        while len(self._loops) > KEPT:
            self._forget()
        return loop

    def _new_loop(self, ask: Ask, like: Tensor, plan: Plan, doubled: bool) -> FusedLoop:
        if self.backend == "fused":
            return FusedLoop(ask, like, plan, doubled=doubled)
        if self._pool is None and like.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        return GraphLoop(ask, like, plan, doubled=doubled, networks=self.networks, pool=self._pool, unroll=self.unroll)

    def _forget(self, key: object = None) -> None:
        """Lets go of a loop, the one that was used longest ago if none is named; what it counted stays counted."""
        loop, _ = self._loops.pop(next(iter(self._loops)) if key is None else key)
        if isinstance(loop, GraphLoop):
            self._captures += loop.captures
            self._replays += loop.replays


def signature(value: Any) -> object:
    """Shapes, dtypes and plain values of arguments: where they are equal, one can be written over the other."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if isinstance(value, Mapping):
        return tuple((key, signature(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(signature(each) for each in value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def copied(value: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(each) for key, each in value.items()}
    return type(value)(copied(each) for each in value) if type(value) in (list, tuple) else value


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
