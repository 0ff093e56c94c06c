"""Fixtures of the gated benchmarks, and what a results file says of the machine. See bench/README.md."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from interleaved import Call, Comparison, compare, joined, slowed

SLOWDOWN = "OLSS_BENCH_SLOWDOWN"  # a fraction: everything of ours takes that much longer, to prove the gate
VERSIONS = ("numpy", "torch", "diffusers", "triton", "olss_fast")
TURNS = 10  # a machine is busy for seconds, so every comparison is spread over the whole run
TURN = re.compile(r"\[turn\d+\]|(?<=\[)turn\d+-|-turn\d+(?=\])")  # in the name of a test
Counts = dict[str, int]
ROUNDS = pytest.StashKey[dict[str, list[Comparison]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROUNDS] = {}
    config.addinivalue_line(
        "markers", "gated: gives a ratio or counts that bench/gate/compare.py compares with the baseline"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        turns = 1 if metafunc.config.getoption("benchmark_disable") else TURNS
        metafunc.parametrize("turn", range(turns), ids=[f"turn{i}" for i in range(turns)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is gated; all first turns come before all second ones, and so on."""
    for item in items:
        if {"versus", "exactly"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gated)
    items.sort(key=lambda item: item.callspec.params.get("turn", 0) if hasattr(item, "callspec") else 0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import torch

    machine_info["versions"] = {name: _version(name) for name in VERSIONS}
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine_info["threads"] = torch.get_num_threads()
    machine_info["slowdown"] = float(os.environ.get(SLOWDOWN, 0))


def _version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def versus(benchmark: Any, turn: int, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`versus(ours, reference, name=, counts=)`: interleaved times, in turns; once each where nothing is to be timed.

    After the last turn pytest-benchmark gets the seconds a call of ours, its `extra_info` the ratio and the counts.
    """

    def measure(ours: Call, reference: Call, *, name: str, counts: Counts | None = None) -> None:
        if benchmark.disabled:
            benchmark(ours)
            reference()
            return
        slowdown = float(os.environ.get(SLOWDOWN, 0))
        row = TURN.sub("", request.node.nodeid)
        so_far = request.config.stash[ROUNDS].setdefault(row, [])
        so_far.append(compare(slowed(ours, slowdown) if slowdown else ours, reference))
        benchmark._mode = "interleaved"  # or pytest-benchmark warns of a fixture that was not used
        if turn == TURNS - 1:
            found = joined(so_far)
            benchmark.name, benchmark.fullname = TURN.sub("", request.node.name), row
            benchmark.extra_info.update(ratio=found.ratio, reference=name, counts=counts or {})
            _hand_over(benchmark, found.ours)
            print(f"\n{found.ratio:.4f} of {name}, {len(found.ours)} rounds")

    return measure


def _hand_over(benchmark: Any, seconds: tuple[float, ...]) -> None:
    """pytest-benchmark has no public way to take times that were measured elsewhere."""
    stats = benchmark._make_stats(1)
    for each in seconds:
        stats.update(each)


@pytest.fixture
def exactly(benchmark: Any) -> Callable[[Callable[[], Counts]], Counts]:
    """`exactly(call)`: the counts that `call` returns, which are compared exactly."""

    def measure(call: Callable[[], Counts]) -> Counts:
        counts: Counts = benchmark.pedantic(call, rounds=1)
        benchmark.extra_info["counts"] = counts
        return counts

    return measure
