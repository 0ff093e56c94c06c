"""Path planning in C++ against its NumPy twin, in one run: `pytest bench/bench_planning.py`.

The twin searches as published (a binary search on the threshold, its residuals remembered between runs), which is far
less work than the tall least-squares problems of the original. Every case first checks that both find the same path.
Planning runs in one thread, and its time is that of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from planning_twin import Problem, Twin, mixture

from olss_fast.tuning import path_planning

CASES = [(100, 5), (100, 10), (1000, 20)]
#: Milliseconds that a plan may take, by teacher steps.
BUDGET = {100: 2.0, 1000: 50.0}
ROUNDS = 15


@cache
def problem(end: int) -> Problem:
    return mixture(end, 0)


def plan(end: int, steps: int) -> path_planning.PathPlan:
    r, rows, count = problem(end)
    return path_planning.plan_path(r, rows, steps, samples_count=count)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(("end", "steps"), CASES)
def bench_plan(benchmark: Any, end: int, steps: int) -> None:
    twin = Twin(*problem(end))
    started = time.thread_time()
    threshold, path = twin.least_threshold_by_halving(steps)
    twin_seconds = time.thread_time() - started
    found = plan(end, steps)
    assert found.path == path
    assert found.threshold == pytest.approx(threshold, rel=1e-9)
    benchmark.pedantic(plan, args=(end, steps), rounds=ROUNDS, warmup_rounds=2)
    if benchmark.disabled:
        return
    best = benchmark.stats.stats.min
    benchmark.extra_info.update(
        twin_ms=1e3 * twin_seconds, times_the_twin=twin_seconds / best, budget_ms=BUDGET[end], proven=found.proven
    )
    print(f"\nT = {end}, n = {steps}: {1e3 * best:.2f} ms, {twin_seconds / best:.0f} times the speed of the twin")
    assert 1e3 * best <= BUDGET[end]


@pytest.mark.parametrize(("end", "steps"), CASES[1:2])
def bench_plan_and_twin(versus: Callable[..., Any], end: int, steps: int) -> None:
    def twin() -> tuple[float, tuple[int, ...]]:
        return Twin(*problem(end)).least_threshold_by_halving(steps)

    found = plan(end, steps)
    assert found.path == twin()[1]
    versus(lambda: plan(end, steps), twin, name="the twin", counts={"proven": int(found.proven)})


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(("end", "steps"), CASES[:2])
def bench_refine(benchmark: Any, end: int, steps: int) -> None:
    r, rows, count = problem(end)
    start = plan(end, steps)
    found = benchmark.pedantic(
        path_planning.refine_all,
        args=(r, rows, start.path),
        kwargs={"samples_count": count},
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    benchmark.extra_info["deployed_error_ratio"] = found[0].deployed_error / start.deployed_error


def bench_import(benchmark: Any) -> None:
    """`import olss_fast` in a fresh interpreter: the processor's time, as the interpreter itself measures it."""
    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.append(_import_seconds()), rounds=5)
    benchmark.extra_info["import_ms"] = 1e3 * min(seconds)
    print(f"\nimport olss_fast: {1e3 * min(seconds):.0f} ms")
    assert min(seconds) <= 0.3


def _import_seconds() -> float:
    code = "import time; start = time.process_time(); import olss_fast; print(time.process_time() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
