"""The step kernel inside a CUDA graph: beside an empty kernel where data is small, beside a copy where it is large.

A graph holds many launches of the step that combines k columns: x_T, k - 2 outputs and the one that has just come. Each
launch has a step counter of its own, set back by one small kernel a graph. Where data is small and all launches share
it, it lies in the cache; "cold" rows go round over more data than the cache holds, as in a loop whose network has been
through it in between. Rivals only sum; `step` also writes the history and applies guidance.
"""

from __future__ import annotations

import math
from typing import Any

import figures
import torch
from devices import Contender, Device, Run, Times, rounds
from results import Bench
from torch import Tensor

from olss_fast.kernels import StepState, lincomb, step

DTYPES = ("float16", "bfloat16", "float32")
SHAPES = {"4×64×64": (4, 64, 64), "4×128×128": (4, 128, 128), "16×128×128": (16, 128, 128)}
COLUMNS = (3, 4, 10, 20, 40)
FEW_COLUMNS = (4, 40)  # where each costs a compilation or much memory, in the first dtype alone
LARGE_BYTES = 1 << 30  # moved by one step: many times what the cache holds
COPY_BYTES = 1 << 29
LAUNCHES = 100
MOST_LAUNCHES = 1000
COPY, FLOOR, COMPILE = "copy", "launch floor", "torch.compile"
CHECKED = 1024  # elements that are compared with float64 after the timing


class Steps:
    """`launches` times the step of `k` columns, over `sets` sets of buffers in turn."""

    def __init__(
        self,
        device: Device,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        k: int,
        *,
        launches: int,
        sets: int,
        doubled: bool,
    ) -> None:
        self.k, self.launches = k, launches
        self.counters = torch.zeros(
            (launches, 4), dtype=torch.int32, device=device.torch
        )  # 16 bytes: all alike aligned
        self.states: list[Any] = []
        self.outputs: list[Tensor] = []
        for _ in range(sets):
            x = torch.empty((1 + doubled, *shape), dtype=dtype, device=device.torch)
            state = StepState.empty(x, torch.zeros(len(x), device=device.torch), steps=k - 1, doubled=doubled)
            state.history.normal_()
            state.rows.normal_()
            self.states.append(state)
            self.outputs.append(torch.randn_like(x))
        self.bytes = self.states[0].bytes_of_step(k - 2)

    def __call__(self) -> None:
        self.counters.fill_((self.k - 2) * self.states[0].programs)
        for i, counter in enumerate(self.counters[:, 0]):
            at = i % len(self.states)
            step(self.outputs[at], self.states[at]._replace(finished=counter))

    def error(self) -> float:
        """`excess` of the first elements that the last launch wrote."""
        state = self.states[(self.launches - 1) % len(self.states)]
        terms = state.rows[-1].double()[:, None] * state.history[:, :CHECKED].double()
        return max(excess(half[:CHECKED], terms) for half in state.halves(state.x))


def excess(found: Tensor, terms: Tensor) -> float:
    """Largest error of `found` (N,) over what float32 sums of the float64 `terms` (k, N) and one rounding may err."""
    exact = terms.sum(0)
    allowed = torch.finfo(found.dtype).eps * exact.abs() + (len(terms) + 2) * 2.0**-23 * terms.abs().sum(0)
    return float(((found.double() - exact).abs() / allowed).nan_to_num(torch.inf).max())


def section(bench: Bench) -> None:
    bench.run("copy", _copy)
    for case, shape in SHAPES.items():
        for dtype in DTYPES:
            bench.run(f"{case} {dtype}", _small, case, (4, 8, 8) if bench.dry else shape, dtype)
    for dtype in DTYPES:
        for k in COLUMNS:
            bench.run(f"{figures.LARGE} {dtype} k = {k}", _large, dtype, k)


def _copy(bench: Bench) -> None:
    """Bytes read and written a second by torch's own copy."""
    pair = _copied(bench)
    times = rounds(bench.device, {COPY: Contender(lambda: pair[1].copy_(pair[0]))}, seconds=0.5)
    row = times.row(COPY)
    bandwidth = 2 * pair[0].nbytes / row["value"]
    bench.add(COPY, 1e-9 * bandwidth, "GB/s", n=row["n"], shape=(pair[0].nbytes,), dtype="uint8", case="bytes copied")


def _copied(bench: Bench) -> Tensor:
    """Two buffers, of something that is not constant."""
    size = 1 << 12 if bench.dry else COPY_BYTES
    return torch.randint(0, 256, (2, size), dtype=torch.uint8, device=bench.device.torch)


# --- small data: microseconds -----------------------------------------------------------------------------------------


def _small(bench: Bench, case: str, shape: tuple[int, ...], dtype: str) -> None:
    """All k in one comparison with an empty kernel, doubled as guidance needs it."""
    kind, launches = getattr(torch, dtype), 3 if bench.dry else LAUNCHES
    loops = {f"hot {k}": Steps(bench.device, shape, kind, k, launches=launches, sets=1, doubled=True) for k in COLUMNS}
    if dtype == "float16":
        loops |= {f"cold {k}": _cold(bench, shape, kind, k) for k in FEW_COLUMNS}
    empty, counters = bench.device.empty_kernel(), torch.zeros(launches, device=bench.device.torch)

    def floor() -> None:
        counters.zero_()
        for _ in range(launches):
            empty()

    timed = {FLOOR: (floor, launches)} | {name: (loop, loop.launches) for name, loop in loops.items()}
    times = _in_graphs(bench.device, timed, seconds=0.1 if bench.dry else 1.0)
    facts = {"case": case, "shape": shape, "dtype": dtype}
    bench.add(FLOOR, unit="µs", **times.row(FLOOR, scale=1e6), **facts)
    for name, loop in loops.items():
        error = loop.error()
        bench.add(
            "step" if name.startswith("hot") else "step, cold",
            unit="µs",
            k=loop.k,
            ok=error <= 1.0,
            note="" if error <= 1.0 else f"{error:.3g} times the allowed error",
            **times.row(name, FLOOR, scale=1e6),
            **facts,
        )


def _cold(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype, k: int) -> Steps:
    """Over as many buffers as are twice the size of the cache, at most so many that the graph stays small."""
    cache = bench.device.cache
    one = (k + 5) * math.prod(shape) * dtype.itemsize
    sets = 3 if bench.dry else max(2, min(MOST_LAUNCHES, math.ceil(2 * cache / one)))
    return Steps(bench.device, shape, dtype, k, launches=max(sets, 3), sets=sets, doubled=True)


def _in_graphs(device: Device, timed: dict[str, tuple[Run, int]], *, seconds: float) -> Times:
    """Seconds a launch of each, out of graphs of many."""
    graphs = {name: device.capture(run) for name, (run, _) in timed.items()}
    times = rounds(device, {name: Contender(each.replay) for name, each in graphs.items()}, seconds=seconds)
    return Times({name: [each / timed[name][1] for each in found] for name, found in times.seconds.items()})


# --- large data: bandwidth --------------------------------------------------------------------------------------------


def _large(bench: Bench, dtype: str, k: int) -> None:
    """step, lincomb and their rivals beside the copy, on data that is many times the cache."""
    kind, device = getattr(torch, dtype), bench.device
    size = 256 if bench.dry else LARGE_BYTES // ((k + 2) * kind.itemsize) // 1024 * 1024
    launches = 2 if bench.dry else 3
    steps = Steps(device, (size,), kind, k, launches=launches, sets=1, doubled=False)
    pair = _copied(bench)
    contenders: dict[str, Run] = {"step": steps, COPY: _repeated(launches, lambda: pair[1].copy_(pair[0]))}
    columns, weights = steps.states[0].history, steps.states[0].rows[-1].clone()
    for name, run in _rivals(device, columns, weights).items():
        contenders[name] = _repeated(launches, run)
    times = _in_graphs(
        device, {name: (run, launches) for name, run in contenders.items()}, seconds=0.05 if bench.dry else 0.7
    )
    moved = {"step": steps.bytes, COPY: 2 * pair[0].nbytes, "lincomb": (k + 1) * size * kind.itemsize}
    facts = {"case": figures.LARGE, "shape": (size,), "dtype": dtype, "k": k}
    error = steps.error()
    for name in contenders:
        checks = {"ok": error <= 1.0} if name == "step" else {}
        if name in moved:
            share = moved[name] / moved[COPY] * times.ratio(name, COPY)
            checks |= {
                "bandwidth": share,
                "note": f"{1e-9 * moved[name] / times.row(name)['value']:.0f} GB/s, {share:.1%}",
            }
        bench.add(name, unit="µs", **times.row(name, scale=1e6), **facts, **checks)
    for ours in ("step", "lincomb"):
        for rival in set(contenders) - {"step", "lincomb", COPY}:
            bench.add(ours, unit="µs", **times.row(ours, rival, scale=1e6), **facts)


def _repeated(launches: int, run: Run) -> Run:
    def several() -> None:
        for _ in range(launches):
            run()

    return several


def _rivals(device: Device, columns: Tensor, weights: Tensor) -> dict[str, Run]:
    """The sum alone, `columns` (k, N) and `weights` (k,) given: ours, and what one would write in torch."""
    k, separate, numbers = len(columns), list(columns), weights.tolist()
    rounded, total = weights.to(columns.dtype), torch.empty_like(columns[0])

    def axpy_chain() -> None:
        total.zero_()
        for column, number in zip(separate, numbers, strict=True):
            torch._foreach_add_([total], [column], alpha=number)

    rivals: dict[str, Run] = {
        "lincomb": lambda: lincomb(columns, weights),
        "torch.mv": lambda: torch.mv(columns.t(), rounded, out=total),
        "axpy chain": axpy_chain,
    }
    if k in FEW_COLUMNS and columns.dtype == torch.float16:
        fused = device.compile(_sum, dynamic=False, fullgraph=True)
        fused(separate, weights)
        rivals[COMPILE] = lambda: fused(separate, weights)
    return rivals


def _sum(columns: list[Tensor], weights: Tensor) -> Tensor:
    total = weights[0] * columns[0].float()
    for j in range(1, len(columns)):
        total = total + weights[j] * columns[j].float()
    return total.to(columns[0].dtype)
