"""Fixtures of the gated benchmarks, and what a results file says of the machine. See bench/README.md."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
from interleaved import Call, Comparison, compare, slowed

SLOWDOWN = "OLSS_BENCH_SLOWDOWN"  # a fraction: everything of ours takes that much longer, to prove the gate
VERSIONS = ("numpy", "torch", "diffusers", "triton", "olss_fast")
Counts = dict[str, int]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gated: gives a ratio or counts that bench/compare.py compares with the baseline"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"versus", "exactly"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gated)


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
def versus(benchmark: Any) -> Callable[..., Comparison | None]:
    """`versus(ours, reference, name=, counts=)`: interleaved times; None where benchmarks only have to run once.

    pytest-benchmark gets the seconds a call of ours, the row of results the ratio, its standard error and the counts.
    """

    def measure(ours: Call, reference: Call, *, name: str, counts: Counts | None = None) -> Comparison | None:
        if benchmark.disabled:
            benchmark(ours)
            reference()
            return None
        slowdown = float(os.environ.get(SLOWDOWN, 0))
        found = compare(slowed(ours, slowdown) if slowdown else ours, reference)
        _hand_over(benchmark, found.ours)
        benchmark.extra_info.update(ratio=found.ratio, standard_error=found.standard_error, reference=name)
        benchmark.extra_info["counts"] = counts or {}
        print(f"\n{found.ratio:.4f} of {name}, ± {found.standard_error:.1%} of it, {len(found.ours)} rounds")
        return found

    return measure


def _hand_over(benchmark: Any, seconds: tuple[float, ...]) -> None:
    """pytest-benchmark has no public way to take times that were measured elsewhere."""
    benchmark._mode = "interleaved"
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
