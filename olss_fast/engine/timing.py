"""Timing an engine: its calls, and its network calls alone."""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from olss_fast.engine import inputs
from olss_fast.engine.engine import Engine, load_engine
from olss_fast.plan.plan import Plan
from olss_fast.support.device import timed
from olss_fast.support.progress import bar_options

PERCENTILES = (90, 95, 99)
LEAST = 10  # least number of iterations for any duration


@dataclass(frozen=True)
class Timing:
    """Seconds of each call (`calls`) and of its network calls alone (`network`), interleaved; of loading the file and
    of the first call, which makes the buffers. memory: peak bytes; on the CPU those of the process."""

    plan: str
    nfe: int
    batch: int
    device: str
    threads: int
    load: float
    first: float
    memory: int | None
    calls: tuple[float, ...]
    network: tuple[float, ...]

    @property
    def latency(self) -> dict[str, float]:
        """Milliseconds per call: min, mean, median, percentiles (nearest call above), max."""
        ordered = sorted(1e3 * each for each in self.calls)
        tail = {f"p{part}": ordered[math.ceil(part / 100 * len(ordered)) - 1] for part in PERCENTILES}
        middle = {"mean": statistics.fmean(ordered), "median": statistics.median(ordered)}
        return {"min": ordered[0], **middle, **tail, "max": ordered[-1]}

    @property
    def throughput(self) -> float:
        """Samples per second, for consecutive calls."""
        return self.batch * len(self.calls) / sum(self.calls)

    @property
    def overhead(self) -> float:
        """Time of a call beyond its network calls, relative to them: median over the pairs."""
        return statistics.median(a / b for a, b in zip(self.calls, self.network, strict=True)) - 1.0

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values as text."""
        yield "plan", f"{self.plan}, {self.nfe} evaluation{'s' * (self.nfe != 1)}"
        yield "batch", f"{self.batch} on {self.device}, {self.threads} thread{'s' * (self.threads != 1)}"
        yield "load", f"{self.load:.3f} s"
        yield "first", f"{self.first:.3f} s, {self.load + self.first:.3f} s from file to sample"
        yield "calls", str(len(self.calls))
        for name, value in self.latency.items():
            yield ("latency" if name == "min" else ""), f"{name:<6} {value:10.3f} ms"
        yield "network", f"median {1e3 * statistics.median(self.network):10.3f} ms in {self.nfe} calls"
        yield "overhead", f"{100 * self.overhead:.2f}% of the network calls"
        yield "throughput", f"{self.throughput:.4g} samples/s"
        if self.memory is not None:
            yield "memory", f"{self.memory / 1e6:.1f} MB at most"

    def to_json(self, path: Path) -> None:
        """All figures and every call; times in milliseconds."""
        figures = {
            **asdict(self),
            "load": 1e3 * self.load,
            "first": 1e3 * self.first,
            "iterations": len(self.calls),
            "latency": self.latency,
            "network": 1e3 * statistics.median(self.network),
            "overhead": self.overhead,
            "throughput": self.throughput,
            "calls": [{"call": 1e3 * a, "network": 1e3 * b} for a, b in zip(self.calls, self.network, strict=True)],
        }
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    def to_csv(self, path: Path) -> None:
        """One row per call."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["call", "milliseconds", "network_milliseconds"])
            for i, (call, network) in enumerate(zip(self.calls, self.network, strict=True)):
                writer.writerow([i, 1e3 * call, 1e3 * network])


def time_engine(
    path: Path,
    *,
    device: str | None = None,
    sha256: str | None = None,
    steps: int | None = None,
    plan: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    warmup: int = 3,
    iterations: int | None = None,
    duration: float = 5.0,
    progress: bool = True,
) -> Timing:
    """Loads an engine, and times its calls for a number of iterations or seconds.

    sha256: as for `load_engine`. batch: default: the profile's `opt`. threads: on the CPU; default: torch's. warmup:
    number of untimed calls.

    Raises EngineFileError, MachineError, InputError: an unknown plan, a batch outside its profile.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    engine = load_engine(path, device=device, sha256=sha256)
    load = time.perf_counter() - begin
    chosen = engine.chosen_plan(steps, plan)
    call, network = calls_of(engine, chosen, batch)
    first = timed(call, engine.device)
    for _ in range(warmup):
        call()
        network()
    calls, networks = _turns(call, network, engine.device, iterations, duration, progress)
    return Timing(
        plan=next(name for name, each in engine.plans.items() if each is chosen),
        nfe=chosen.nfe,
        batch=batch or engine.manifest.profile.opt[0],
        device=str(engine.device),
        threads=torch.get_num_threads(),
        load=load,
        first=first,
        memory=_most_memory(engine.device),
        calls=tuple(calls),
        network=tuple(networks),
    )


def calls_of(engine: Engine, plan: Plan, batch: int | None = None) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A call of the engine, and its network calls alone, with likely arguments of the network.

    Raises InputError for a batch outside the profile.
    """
    found = engine.manifest
    noise = inputs.usual_noise(found, engine.device, batch)
    given, without = engine.usual_arguments(len(noise))
    generator = torch.Generator(engine.device).manual_seed(0)
    x = torch.cat([noise, noise]) if found.doubled else noise
    whole = x.new_zeros(x.shape[0], dtype=torch.float32, device=engine.device)
    times = [whole + float(each) for each in plan.timesteps]
    tensors = inputs.network_inputs(
        found, len(noise), engine.device, given, {**engine.unconditional, **(without or {})}
    )

    def call() -> Tensor:
        return engine(noise, plan=plan, unconditional=without, generator=generator, **given)

    def network() -> None:
        for each in times:
            engine.network(x, each, *tensors.values())

    return call, network


def _turns(
    call: Callable[[], object],
    network: Callable[[], object],
    device: torch.device,
    iterations: int | None,
    duration: float,
    progress: bool,
) -> tuple[list[float], list[float]]:
    """Seconds of each call, and of its network calls alone; their order alternates."""
    calls, networks = list[float](), list[float]()
    turn = [(call, calls), (network, networks)]
    end = time.perf_counter() + duration
    with tqdm(total=iterations, desc="Timing", unit="call", **bar_options(progress)) as bar:
        while len(calls) < (iterations or LEAST) or (iterations is None and time.perf_counter() < end):
            for function, seconds in turn:
                seconds.append(timed(function, device))
            turn.reverse()
            bar.update(1)
    return calls, networks


def _most_memory(device: torch.device) -> int | None:
    """Peak bytes: on a GPU those held by torch, else those of this process; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
