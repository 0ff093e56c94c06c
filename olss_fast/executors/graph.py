"""The graph executor: network and step as one CUDA graph, replayed once an evaluation.

The step kernel keeps count in device memory and writes the network's next input and time where the graph reads them, so
nothing changes between two replays and the host only launches. Another plan, guidance scale or conditioning is written
over the old one: no capture. Weights that are changed in place are honoured; where a parameter has moved, the graph
reads memory that is no longer its own, so it is captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.executors.fused import Ask, FusedLoop
from olss_fast.kernels import start
from olss_fast.plan import Plan

WARM_UP = 3  # runs before a capture: cuDNN, Triton and the allocator settle


class Graph(Protocol):
    """What `torch.cuda.CUDAGraph` does."""

    def replay(self) -> None: ...


def capture(function: Callable[[], None], pool: Any) -> Graph:
    """`function` as a CUDA graph in the memory `pool`, warmed up on a stream of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph


class GraphLoop(FusedLoop):
    """One graph of network and step for each network of a plan, or with `unroll` one of the whole loop.

    networks: whose parameters the graphs read. pool: memory shared with other loops that never run at the same time.
    """

    backend = "graph"

    def __init__(
        self,
        ask: Ask,
        like: Tensor,
        plan: Plan,
        *,
        doubled: bool,
        networks: Sequence[Any] = (),
        pool: Any = None,
        unroll: bool = False,
    ) -> None:
        super().__init__(ask, like, plan, doubled=doubled)
        self.networks, self.pool, self.unroll = networks, pool, unroll
        self.captures = self.replays = 0
        self.moved = ""  # the parameter because of which the last capture was repeated
        self._graphs: dict[object, Graph] = {}
        self._addresses: dict[str, int] = {}

    def run(self) -> Tensor:
        assert self.plan is not None
        self._forget_if_moved()
        models = self.plan.models.tolist()
        if self.unroll:
            self._graph(("loop", *models), super().run).replay()
            self.replays += 1
            return self.x.narrow(0, 0, self.batch)
        for model in dict.fromkeys(models):  # before the first step: a warm-up runs the step too
            self._graph(model, lambda model=model: self.evaluate(model))  # type: ignore[misc]
        start(self.state)
        for model in models:
            self._graphs[model].replay()
        self.replays += len(models)
        return self.x.narrow(0, 0, self.batch)

    def _graph(self, key: object, function: Callable[[], Any]) -> Graph:
        if key not in self._graphs:
            start(self.state)
            self._graphs[key] = capture(function, self.pool)
            self._addresses = addresses(self.networks)
            self.captures += 1
        return self._graphs[key]

    def _forget_if_moved(self) -> None:
        """Drops the graphs if a parameter's storage was replaced since they were captured."""
        if not self._graphs:
            return
        now = addresses(self.networks)
        if now != self._addresses:
            names = [name for name in {**self._addresses, **now} if self._addresses.get(name) != now.get(name)]
            self.moved = names[0]
            self._graphs.clear()


def addresses(networks: Sequence[Any]) -> dict[str, int]:
    """Where every parameter and buffer of the networks lies in memory, by name."""
    found: dict[str, int] = {}
    for i, network in enumerate(networks):
        if isinstance(network, torch.nn.Module):
            tensors = [*network.named_parameters(), *network.named_buffers()]
            found |= {f"{i}.{name}" if len(networks) > 1 else name: each.data_ptr() for name, each in tensors}
    return found


def require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"the backend 'graph' needs a CUDA device, got {device}; use 'fused', or 'auto'")
