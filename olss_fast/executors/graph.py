"""The graph executor: network and step as one CUDA graph, replayed once per evaluation.

The step kernel counts in device memory and writes the network's next input and timestep where the graph reads them, so
nothing changes between replays and the host only launches. Another plan, guidance scale or conditioning is written over
the old one, without a capture. In-place changes of weights take effect; if a parameter has moved or a module was
replaced (as adapters do), the graph would read freed memory, so it is captured again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.executors.fused import Ask, FusedLoop, Room
from olss_fast.executors.reference import OnStep
from olss_fast.network import module_of
from olss_fast.plan.plan import Plan
from olss_fast.support.identity import Watched, first_moved, watched

CAPTURING = threading.RLock()
"""One capture at a time in this process: a second would abort the first."""

WARM_UP = 3  # runs before a capture: cuDNN, Triton and the allocator settle


def capture(function: Callable[[], None], pool: Any, device: torch.device) -> torch.cuda.CUDAGraph:
    """`function` as a CUDA graph in the memory `pool`, warmed up on its own stream.

    The last warm-up refuses host synchronisation such as `.item()`, which inside a capture would leave stream and
    allocator in a bad state. Autocast caches no weights: a graph would read them after they are freed.
    """
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    uncached = torch.autocast("cuda", enabled=enabled, dtype=dtype, cache_enabled=False)
    with CAPTURING, torch.cuda.device(device), uncached:
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        mode = torch.cuda.get_sync_debug_mode()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP - 1):
                    function()
                torch.cuda.set_sync_debug_mode("error")
                function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        finally:
            torch.cuda.set_stream(before)
    return graph


class GraphLoop(FusedLoop):
    """One graph of network and step per network of a plan, or with `unroll` one graph of the whole loop.

    networks: whose parameters the graphs read. pool: returns the memory shared with other loops, which never run at the
    same time. counts: captures and replays, counted here. Whatever else a graph depends on (adapter scales, train or
    eval) stays as it was when captured.
    """

    backend = "graph"

    def __init__(
        self,
        ask: Ask,
        like: Tensor,
        plan: Plan,
        *,
        doubled: bool,
        networks: Sequence[Any],
        pool: Callable[[], Any],
        counts: Counter[str],
        unroll: bool,
        room: Room,
    ) -> None:
        super().__init__(ask, like, plan, doubled=doubled, room=room)
        self.networks, self.pool, self.counts, self.unroll = networks, pool, counts, unroll
        self.graphs: dict[object, torch.cuda.CUDAGraph] = {}
        self._watched: list[Watched] = []

    def run(self, on_step: OnStep | None = None) -> Tensor:
        """As `FusedLoop.run`, by graphs, which are captured if there are none or a parameter has moved."""
        assert self.plan is not None
        if self.graphs and (name := first_moved(self._watched)):
            self.moved = name
            self.graphs.clear()
        models = self.plan.models.tolist()
        if self.unroll and on_step is None:
            self._graph(("loop", *models), lambda: self.steps(self.evaluate)).replay()
            self.counts["replays"] += 1
            return self.x.narrow(0, 0, self.batch)
        for model in dict.fromkeys(models):  # before the first step: a warm-up runs the step too
            self._graph(model, lambda model=model: self.evaluate(model))  # type: ignore[misc]
        self.counts["replays"] += len(models)
        return self.steps(lambda model: self.graphs[model].replay(), on_step)

    def _graph(self, key: object, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        if key not in self.graphs:
            self.start()
            self.graphs[key] = capture(function, self.pool(), self.x.device)
            self._watched = watched([module_of(each) for each in self.networks])
            self.counts["captures"] += 1
        return self.graphs[key]


def require_cuda(device: torch.device) -> None:
    """InputError unless `device` is a CUDA device."""
    if device.type != "cuda":
        raise InputError(f"the backend 'graph' needs a CUDA device, got {device}; use 'fused', or 'auto'")
