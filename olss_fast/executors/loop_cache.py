"""Loops by shape: buffers and graphs are made once, kept while in use, and overwritten between runs."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError, OlssError
from olss_fast.executors.fused import LEAST_ROOM, Ask, FusedLoop, Room
from olss_fast.executors.graph import GraphLoop
from olss_fast.executors.reference import OnStep
from olss_fast.network import sums_to_finite
from olss_fast.plan.plan import Plan
from olss_fast.support.tree import Flat

KEPT = 4  # shapes whose buffers and graphs are kept


@dataclass(frozen=True)
class Stats:
    """Counters of an executor: `backend` of the last run, captures and replays of graphs since it was made, why it fell
    back (or captured again), `bytes` of its own buffers, and kernels between two network calls."""

    backend: str
    captures: int
    replays: int
    reason: str
    bytes: int
    kernels_per_step: int | None


@dataclass(eq=False)
class Work:
    """One call: samples (B, …) of `noise` with `plan`, in the noise's dtype and on its device.

    dtype, device: of the network's input. arguments: the network's, as leaves and form; `asking(held)` turns a loop's
    own copy of them, nested again, into `ask(x, time, model)`. step_noise: (Z, B, …) of a stochastic plan. With
    `on_step`, a loop whose graph covers all steps runs step by step.
    """

    plan: Plan
    noise: Tensor
    arguments: Flat
    asking: Callable[[Any], Ask]
    dtype: torch.dtype
    device: torch.device
    doubled: bool
    guidance_scale: float
    step_noise: Tensor | None = None
    on_step: OnStep | None = None
    told: bool = False  # whether `on_step` was called

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor of the network's dtype, device and memory format."""
        return torch.empty_like(self.noise, dtype=self.dtype, device=self.device)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Whatever a loop's buffers and graphs are made for; a captured graph keeps the state of autocast."""
        like, (leaves, form), kind = self.like, self.arguments, self.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        given = (form, *map(signature, leaves))
        return *signature(like), self.doubled, self.plan.branches, autocast, given

    def done_by(self, loop: FusedLoop) -> Tensor:
        """The samples (B, …), run by `loop`. NetworkError for non-finite samples on the CPU."""
        loop.load(self.plan, self.guidance_scale)
        loop.fill(self.noise, self.step_noise)
        result = loop.run(None if self.on_step is None else self._tell).to(self.noise, copy=True)
        if result.device.type == "cpu" and not sums_to_finite(result):
            loop.require_finite()
        return result

    def _tell(self, i: int, x: Tensor) -> None:
        self.told = True
        if self.on_step is not None:
            self.on_step(i, x)


@dataclass(eq=False)
class Kept:
    """A loop with its copies of the network's arguments. calls: how many it has run; busy: a call is using it."""

    loop: FusedLoop
    held: list[Any]
    calls: int = 0
    busy: bool = True


class LoopCache:
    """Runs plans on `networks` with the backend "fused" or "graph"; a network that cannot be captured runs fused.

    "auto" is graph on CUDA and fused elsewhere. Several threads may run at once, and a network may call its own
    sampler: each call gets its own loop, and as many are kept as were in use at once. On a GPU, and with graphs, which
    share memory, threads take turns.
    """

    def __init__(self, networks: Sequence[Any], backend: str, unroll: bool = False) -> None:
        self.networks, self.backend, self.unroll = networks, backend, unroll
        self._lock, self._turn = threading.Lock(), threading.RLock()
        self._threads = threading.local()  # `last`: what the thread ran last, and the number of that call
        self._kept: OrderedDict[object, list[Kept]] = OrderedDict()
        self._used = "fused" if backend == "auto" else backend  # by the last run
        self._stream: Any = None
        self._pool: Any = None
        self._not_captured: set[object] = set()
        self._counts: Counter[str] = Counter()  # captures and replays
        self._reason = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has no loops yet."""
        return LoopCache, (self.networks, self.backend, self.unroll)

    def run(self, work: Work) -> Tensor:
        """The samples. NetworkError for samples on the CPU that are not finite."""
        backend = ("graph" if work.device.type == "cuda" else "fused") if self.backend == "auto" else self.backend
        graph = backend == "graph"
        turn = self._in_turn(work.device) if graph or work.device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), turn:  # buffers outlive it
            graph = graph and work.key not in self._not_captured
            try:
                return self._run(work, graph=graph)
            except (OlssError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if not graph or work.told:  # after a completed step it is not the capture that failed
                    raise
                message = " ".join(str(error).split())[:200]
                reason = f"the network cannot be captured: {type(error).__name__}: {message}"
            with self._lock:
                self._kept.pop(work.key, None)
            result = self._run(work, graph=False)  # if this fails too, graphs are not to blame
            self._not_captured.add(work.key)
            self._reason = reason
            return result

    def reset(self) -> None:
        """See `Sampler.reset`."""
        with self._lock:
            self._kept.clear()
            self._not_captured.clear()
        self._threads = threading.local()

    def require_finite(self) -> None:
        """See `Sampler.require_finite`."""
        last: tuple[Kept, int] | None = getattr(self._threads, "last", None)
        if last is None:
            return
        kept, call = last
        if kept.calls != call:
            raise InputError("a run of another thread has used the buffers since; look for NaN in the samples instead")
        kept.loop.require_finite()

    def stats(self) -> Stats:
        """Counters over all threads."""
        with self._lock:
            loops = [kept.loop for each in self._kept.values() for kept in each]
        moved = [f"captured again, {each.moved} was replaced" for each in loops if each.moved]
        return Stats(
            backend=self._used,
            captures=self._counts["captures"],
            replays=self._counts["replays"],
            reason="; ".join([*([self._reason] if self._reason else []), *moved]),
            bytes=sum(loop.bytes for loop in loops),
            kernels_per_step=1,
        )

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """One thread at a time, and their queued work in the same order on any streams."""
        with self._turn:
            if torch.cuda.is_available():
                stream = torch.cuda.current_stream(device)
                if self._stream not in (None, stream):
                    stream.wait_stream(self._stream)
                self._stream = stream
            yield

    def _run(self, work: Work, *, graph: bool) -> Tensor:
        kept = self._lent(work, graph)
        try:
            for mine, other in zip(kept.held, work.arguments.leaves, strict=True):  # of the same signatures
                if isinstance(mine, Tensor):
                    mine.copy_(other)
            kept.calls += 1
            self._threads.last, self._used = (kept, kept.calls), kept.loop.backend
            return work.done_by(kept.loop)
        finally:
            kept.busy = False

    def _lent(self, work: Work, graph: bool) -> Kept:
        """A loop for these shapes of noise and arguments that no other call is using. Drops the least recently used
        shapes with all their loops."""
        with self._lock:
            shelf = self._kept[work.key] = self._kept.pop(work.key, [])
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            idle = [kept for kept in shelf if not kept.busy]
            if idle and idle[0].loop.fits(work.plan):
                idle[0].busy = True
                return idle[0]
            if idle:
                shelf.remove(idle[0])
        held = [each.clone() if isinstance(each, Tensor) else each for each in work.arguments.leaves]
        ask = work.asking(work.arguments.form.unflatten(held))
        loop = self._new_loop(work, ask, graph, idle[0].loop.room if idle else LEAST_ROOM)
        with self._lock:
            self._kept.setdefault(work.key, []).append(kept := Kept(loop, held))
        return kept

    def _new_loop(self, work: Work, ask: Ask, graph: bool, room: Room) -> FusedLoop:
        shared = partial(GraphLoop, networks=self.networks, pool=self._memory, counts=self._counts, unroll=self.unroll)
        make: Callable[..., FusedLoop] = shared if graph else FusedLoop
        return make(ask, work.like, work.plan, doubled=work.doubled, room=room)

    def _memory(self) -> Any:
        """The memory pool of all graphs; a new one if none is alive, since a pool dies with its last graph."""
        loops = [kept.loop for each in self._kept.values() for kept in each]
        if torch.cuda.is_available() and not any(isinstance(loop, GraphLoop) and loop.graphs for loop in loops):
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def signature(leaf: Any) -> tuple[object, ...]:
    """Shape, dtype and device of a tensor, or a plain value: a leaf of equal signature can be overwritten."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.stride(), leaf.device
    plain = isinstance(leaf, (str, int, float, bool, type(None), np.generic, torch.dtype, torch.device))
    return type(leaf), leaf if plain else id(leaf)
