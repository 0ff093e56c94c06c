"""Engine files on this device: built, saved, loaded, and as near to the reference as torch; their loops as graphs."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from correctness import BUDGET, PLANS, SCALE, Net, eager_run, rms, seeded
from results import Bench

import olss_fast
from olss_fast import Profile, sample

LEAST = 40.0  # seconds that a build may take


def section(bench: Bench) -> None:
    for dtype in ("float16",) if not bench.dry else ("float32",):
        bench.run(f"engine {dtype}", _check, dtype, least=0.0 if bench.dry else LEAST)


def _check(bench: Bench, dtype_name: str) -> None:
    device, dtype = bench.device.torch, getattr(torch, dtype_name)
    net = Net(dtype, device).eval()
    side = 8 if bench.dry else 64
    labels = torch.tensor([3, 7], device=device)
    begin = time.perf_counter()
    built = olss_fast.build(
        net,
        PLANS,
        shapes=Profile((1, 4, side, side), (2, 4, side, side), (4, 4, side, side)),
        conditioning={"y": labels},
        unconditional={"y": 0},
        guidance_scale=SCALE,
        cache=False,
        progress=False,
    )
    facts = {"dtype": dtype_name, "shape": (2, 4, side, side)}
    bench.add("engine: build", time.perf_counter() - begin, "s", **facts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.olss"
        built.save(path)
        begin = time.perf_counter()
        loaded = olss_fast.load_engine(path, device=device)
        bench.add("engine: load, first run and capture", time.perf_counter() - begin, "s", **facts)
    noise = torch.randn((2, 4, side, side), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for name in PLANS:
        _compare(bench, name, net, {"built": built, "loaded": loaded}, noise, labels, facts)


def _compare(
    bench: Bench,
    name: str,
    net: Net,
    engines: dict[str, Any],
    noise: torch.Tensor,
    labels: torch.Tensor,
    facts: dict[str, Any],
) -> None:
    """Against float64, in units of what eager torch costs in this precision: all of the loop, or the network alone and
    half as much again for a loop."""
    plan, device = PLANS[name], noise.device
    how: dict[str, Any] = {"conditioning": {"y": labels}, "unconditional": {"y": 0}, "guidance_scale": SCALE}
    exact = sample(copy.deepcopy(net).double(), plan, noise.double(), generator=seeded(device), **how)
    alone = rms(sample(net, plan, noise, generator=seeded(device), **how).double() - exact)
    least = torch.finfo(noise.dtype).eps * float(exact.abs().max())  # compiled code need not round where torch does
    eager = min(rms(eager_run(plan, net, noise, labels).double() - exact), 1.5 * max(alone, least))
    for kind, engine in engines.items():
        share = rms(engine(noise, plan=name, generator=seeded(device), y=labels).double() - exact) / eager
        stats = engine.stats()
        fell_back = "" if bench.dry or stats.backend == "graph" else stats.reason or "not a graph"
        bench.add(
            f"engine, {kind}",
            share,
            "of eager's error",
            case=name,
            nfe=plan.nfe,
            ok=bool(share <= BUDGET) and not fell_back,
            reference="float64",
            note=fell_back,
            **facts,
        )
