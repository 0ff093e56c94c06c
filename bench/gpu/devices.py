"""What is timed, captured and counted, and how: on a GPU, or on the CPU to try the whole bench out (`--dry`)."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from olss_fast.executors import graph

Run = Callable[[], Any]
SYNCS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
TRANSFERS = ("Memcpy HtoD", "Memcpy DtoH")


@dataclass(frozen=True)
class Counts:
    """What one run asked of the device: operations on it, waits of the host, copies between the two."""

    kernels: int
    syncs: int
    copies: int


class Device(Protocol):
    dry: bool
    name: str
    torch: torch.device

    def seconds(self, run: Run) -> float: ...
    def synchronize(self) -> None: ...
    def capture(self, run: Run) -> graph.Graph: ...
    def compile(self, function: Any, **how: Any) -> Any: ...
    def count(self, run: Run) -> Counts: ...
    def state(self) -> str: ...
    def empty_kernel(self) -> Run: ...


class Cuda:
    """The current GPU, as it is found: no setting is changed."""

    dry = False

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name()
        self.cache = torch.cuda.get_device_properties(self.torch).L2_cache_size
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, run: Run) -> float:
        """Of the device, from an idle queue to the end of what `run` put into it."""
        self.synchronize()
        self._events[0].record()
        run()
        self._events[1].record()
        self.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, run: Run) -> graph.Graph:
        return graph.capture(run, None, torch.device("cuda", torch.cuda.current_device()))

    def compile(self, function: Any, **how: Any) -> Any:
        return torch.compile(function, **how)

    def count(self, run: Run) -> Counts:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self.synchronize()
        events = profile.events()
        on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        copies = sum(name.startswith(TRANSFERS) for name in on_device)
        return Counts(len(on_device) - copies, sum(event.name in SYNCS for event in events), copies)

    def state(self) -> str:
        query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
        return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "no nvidia-smi"

    def empty_kernel(self) -> Run:
        from empty_kernel import launch

        return launch


class Dry:
    """The CPU in place of a GPU: a graph is a recorded function, a kernel an operator, a compiler does nothing."""

    dry = True
    name = "none (dry run)"
    cache = 1 << 14

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        graph.capture = lambda function, pool, device: _Recorded(function)
        import olss_fast.sampling.sampler

        olss_fast.sampling.sampler.require_cuda = lambda device: None

    def seconds(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        pass

    def capture(self, run: Run) -> graph.Graph:
        return graph.capture(run, None, torch.device("cpu"))

    def compile(self, function: Any, **how: Any) -> Any:
        return function

    def count(self, run: Run) -> Counts:
        with _Operators() as found:
            run()
        return Counts(found.count, 0, 0)

    def state(self) -> str:
        return "dry run"

    def empty_kernel(self) -> Run:
        return lambda: None


class _Recorded:
    def __init__(self, function: Run) -> None:
        function()
        self.replay = function


class _Operators(TorchDispatchMode):
    """Operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Contender:
    """What takes part in a comparison; `prepare` comes before each run and is not timed."""

    run: Run
    prepare: Run = lambda: None


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by contender; the rounds are paired."""

    seconds: Mapping[str, list[float]]

    def ratio(self, name: str, reference: str) -> float:
        """How many times as fast as `reference`: the median over rounds of its time over that of `name`."""
        pairs = zip(self.seconds[reference], self.seconds[name], strict=True)
        return statistics.median(other / own for other, own in pairs)

    def row(self, name: str, reference: str | None = None, *, scale: float = 1.0) -> dict[str, Any]:
        """Median and p99 in units of 1 / `scale` seconds."""
        own = sorted(self.seconds[name])
        place = min(len(own) - 1, round(0.99 * (len(own) - 1)))
        row = {"value": scale * statistics.median(own), "p99": scale * own[place], "n": len(own)}
        return row if reference is None else row | {"reference": reference, "ratio": self.ratio(name, reference)}


def rounds(
    device: Device, contenders: Mapping[str, Contender], *, seconds: float, least: int = 4, most: int = 60
) -> Times:
    """Rounds in which each contender runs once, the order turned round every time, until `seconds` are over."""
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    for contender in () if device.dry else contenders.values():
        contender.prepare()
        contender.run()
    started, done = time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while done < most and (done < least or time.perf_counter() - started < seconds):
            for name in names:
                contenders[name].prepare()
                found[name].append(device.seconds(contenders[name].run))
            names.reverse()
            done += 1
    finally:
        if collecting:
            gc.enable()
    return Times(found)


def choose(dry: bool) -> Device:
    if dry:
        return Dry()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py needs a CUDA device; --dry tries it out without one")
    import triton  # noqa: F401 - not something to skip rows for

    return Cuda()


def versions() -> str:
    parts = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    for name in ("triton", "diffusers"):
        try:
            parts.append(f"{name} {__import__(name).__version__}")
        except ImportError:
            parts.append(f"no {name}")
    return ", ".join(parts)


def commit(folder: str) -> str:
    return _output("git", "-C", folder, "describe", "--always", "--dirty") or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
