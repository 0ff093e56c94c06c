"""Engine files of the embedded model: how long they take to build, to look at, to load and to run.

    pytest bench/bench_engine.py -s

Everything that is about a start is measured in processes of its own, as the median of some; what is told beyond the
start of Python is that beyond `python -c pass`, beside it in turns. Targets are for two processor cores. The loop's
overhead is a ratio of processor time, interleaved (see interleaved.py): the engine's call over its bare network calls.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from interleaved import compare

from olss_fast.engine.engine import load_engine
from olss_fast.engine.timing import calls_of

pytestmark = pytest.mark.slow
PYTHON = sys.executable
STEPS = 5
BUILD, BUILD_AGAIN, LOAD, INSPECT, START = 90.0, 2.0, 2.0, 0.05, 0.5  # seconds
OVERHEAD = 0.02
RUNS = 20  # of what takes a moment
SECONDS = 20.0  # of interleaved rounds

BUILD_DEMO = """
import sys, time
import olss_fast
from olss_fast import solvers
from olss_fast.cli import model as models
model = models.load_model("demo", device="cpu")
how = models.arguments(model, models.pick_labels(model, 4))
begin = time.perf_counter()
shapes = olss_fast.Profile((1, *model.shape), (4, *model.shape), (16, *model.shape))
engine = olss_fast.build(model.network, solvers.unipc(model.schedule, 5), shapes=shapes, progress=False, **how)
engine.save(sys.argv[1])
print(time.perf_counter() - begin)
"""
FIRST_SAMPLE = """
import sys, torch, olss_fast
engine = olss_fast.load_engine(sys.argv[1])
noise = torch.randn((1, *engine.manifest.profile.opt[1:]))
assert bool(torch.isfinite(engine(noise, steps=5, class_labels=3)).all())
"""
NOTHING = [PYTHON, "-c", "pass"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The engine file, and the seconds of its first and of its second build; the cache was empty."""
    folder = tmp_path_factory.mktemp("engine")
    path = folder / "demo.olss"
    environment = {"OLSS_FAST_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return path, [float(output([PYTHON, "-c", BUILD_DEMO, str(path)], environment)) for _ in range(2)]


@pytest.fixture(scope="module")
def engine_file(built: tuple[Path, list[float]]) -> Path:
    return built[0]


def output(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(environment or {})}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds_of(words: Sequence[str]) -> float:
    begin = time.perf_counter()
    output(words)
    return time.perf_counter() - begin


def beyond(words: Sequence[str], start: Sequence[str], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of a process, of the one that only starts, and the difference; they take turns."""
    pairs = [(seconds_of(words), seconds_of(start)) for _ in range(runs)]
    whole, alone = (statistics.median(each) for each in zip(*pairs, strict=True))
    return {"seconds": whole, "start": alone, "beyond": whole - alone}


def told(benchmark: Any, row: Mapping[str, float]) -> None:
    benchmark.extra_info.update(row)
    print("\n" + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))


def bench_build(benchmark: Any, built: tuple[Path, list[float]]) -> None:
    first, second = benchmark.pedantic(lambda: built[1], rounds=1)
    told(benchmark, {"build_s": first, "from_cache_s": second})
    assert first <= BUILD
    assert second <= BUILD_AGAIN


def bench_load_to_first_sample(benchmark: Any, engine_file: Path) -> None:
    """From the start of Python, import of torch included."""
    words = [PYTHON, "-c", FIRST_SAMPLE, str(engine_file)]
    row = benchmark.pedantic(lambda: beyond(words, NOTHING, 5), rounds=1)
    told(benchmark, row)
    assert row["seconds"] <= LOAD


def bench_inspect(benchmark: Any, engine_file: Path) -> None:
    words = [PYTHON, "-m", "olss_fast", "inspect", str(engine_file)]
    row = benchmark.pedantic(lambda: beyond(words, NOTHING), rounds=1)
    told(benchmark, row)
    assert row["beyond"] <= INSPECT


@pytest.mark.parametrize("batch", [1, 4])
def bench_overhead(benchmark: Any, engine_file: Path, batch: int) -> None:
    engine = load_engine(engine_file)
    call, network = calls_of(engine, engine.chosen_plan(STEPS), batch)
    found = benchmark.pedantic(lambda: compare(call, network, seconds=SECONDS), rounds=1)
    quiet = {"call_s": statistics.median(found.quiet.ours), "network_s": statistics.median(found.quiet.reference)}
    told(benchmark, {**quiet, "overhead": found.ratio - 1.0})
    assert found.ratio - 1.0 <= OVERHEAD


def bench_runtime(benchmark: Any, engine_file: Path, tmp_path: Path) -> None:
    """The C++ program, to the first sample, beyond its own start (that of libtorch)."""
    runtime = pytest.importorskip("olss_fast.engine.runtime")
    program = str(runtime.build_runtime(tmp_path / "runtime"))
    words = [program, str(engine_file), "--steps", str(STEPS), "--set", "class_labels=3"]
    words += ["--out", str(tmp_path / "image.png")]
    row = benchmark.pedantic(lambda: beyond(words, [program, "--version"]), rounds=1)
    told(benchmark, row)
    assert row["beyond"] <= START
