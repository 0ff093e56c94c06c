"""CUDA graphs without a device: recorded functions, whose replays read the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from olss_fast.executors import graph


class FakeGraph:
    """A recorded function: what a CUDA graph does, without a device."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def replay(self) -> None:
        self.function()


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the backend "graph" run anywhere."""

    def capture(function: Callable[[], None], pool: Any, device: Any) -> FakeGraph:
        function()  # the warm-up, whose traces the loop must not keep
        return FakeGraph(function)

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr("olss_fast.sampling.sampler.require_cuda", lambda device: None)
