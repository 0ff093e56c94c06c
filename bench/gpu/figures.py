"""The figures to reach, as data, and what the rows say about each: of several rows that match, the worst counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LIMIT = "graphed network alone"
GRAPH, FUSED = "Sampler graph", "Sampler fused"
COMPILED_GRAPH = "Sampler graph, compiled network"
EAGER, COMPILED = "diffusers eager", "diffusers max-autotune"
PEERS = ("DPM++ 2M", "DDIM", "UniPC")
SD15, SDXL, FLUX, DIT = "SD 1.5 UNet 512²", "SDXL UNet 1024²", "Flux, 4 + 8 blocks, 1024²", "DiT-XL/2 512²"
SMALL = ("4×64×64", "4×128×128")
LARGE = "1 GiB"
HALF = ("float16", "bfloat16")

COLUMNS = ("what", "measured", "least", "aim", "least reached", "aim reached", "rows", "worst row")


def with_graph(peer: str) -> str:
    """The name of the loop of the same graphed network with a diffusers scheduler."""
    return f"graphed network + {peer}"


@dataclass(frozen=True)
class Figure:
    """`of`: the field that counts, or "overhead" for 1 / ratio. `rising`: whether more is better. A field of `rows` may
    list several values. `best`: the best row counts, where one of several ways is enough."""

    what: str
    rows: Mapping[str, Any]
    of: str
    least: float | None
    aim: float | None
    rising: bool = True
    best: bool = False


def _loop(reference: str, **other: Any) -> dict[str, Any]:
    return {"section": "loops", "name": GRAPH, "reference": reference, **other}


def _step(**other: Any) -> dict[str, Any]:
    return {"section": "step kernel", "name": "step", **other}


def _counts(unit: str) -> dict[str, Any]:
    return {"section": "counts", "name": GRAPH, "unit": unit}


ONE = {"case": SD15, "batch": 1}
TUNED = {"section": "compiled", "reference": COMPILED, "name": (GRAPH, COMPILED_GRAPH)}
FIGURES = (
    Figure("failed checks of correctness", {"section": "correctness"}, "failed", 0, 0, rising=False),
    Figure(
        "loop / (NFE × network), SD 1.5, batch 1, NFE 20", _loop(LIMIT, **ONE, nfe=20), "overhead", 1.01, 1.005, False
    ),
    Figure(
        "the same, SDXL, batch 1, NFE 20", _loop(LIMIT, case=SDXL, batch=1, nfe=20), "overhead", 1.003, 1.002, False
    ),
    Figure("the same, SD 1.5, batch 1, NFE 4", _loop(LIMIT, **ONE, nfe=4), "overhead", 1.02, 1.01, False),
    Figure(
        "times as fast as the graphed network + DPM++ 2M", _loop(with_graph("DPM++ 2M"), **ONE), "ratio", 1.01, 1.03
    ),
    Figure("the same, DDIM", _loop(with_graph("DDIM"), **ONE), "ratio", 1.03, 1.06),
    Figure("the same, UniPC", _loop(with_graph("UniPC"), **ONE), "ratio", 1.06, 1.12),
    Figure("times as fast as diffusers max-autotune", TUNED, "ratio", 1.05, 1.3, best=True),
    Figure("times as fast as diffusers eager", _loop(EAGER, **ONE), "ratio", 1.7, 1.9),
    Figure("kernels a step", _counts("kernels a step"), "value", 2, 1, False),
    Figure("host syncs a step", _counts("syncs a step"), "value", 0, 0, False),
    Figure("host-device copies a step", _counts("copies a step"), "value", 0, 0, False),
    Figure("kernel in a graph, k <= 4, µs", _step(case=SMALL, k=(3, 4)), "value", 3, None, False),
    Figure("kernel in a graph, k = 40, µs", _step(case=SMALL, k=40), "value", 5, None, False),
    Figure("kernel over launch floor, k <= 4", _step(case=SMALL, k=(3, 4)), "overhead", None, 1.2, False),
    Figure("bandwidth at 1 GiB, fp16 and bf16, of the copy's", _step(case=LARGE, dtype=HALF), "bandwidth", 0.85, 0.92),
    Figure(
        "`lincomb`, times as fast as torch.compile's fused sum",
        {"section": "step kernel", "name": "lincomb", "reference": "torch.compile", "case": LARGE},
        *("ratio", 0.98, 1.0),
    ),
    Figure(
        "step, times as fast as the foreach axpy chain, k = 40",
        _step(reference="axpy chain", case=LARGE, k=40),
        *("ratio", 2.5, 2.5),
    ),
    Figure(
        "step, which fuses more, times as fast as torch.mv, k = 40",
        _step(reference="torch.mv", case=LARGE, k=40),
        *("ratio", 1.0, 1.0),
    ),
    Figure(
        "large batch, times as fast as each peer",
        _loop((*map(with_graph, PEERS), EAGER), batch=(4, 16)),
        *("ratio", 0.995, 1.0),
    ),
    Figure("host time a replayed step, µs", {"section": "loops", "name": "host time a step"}, "value", 10, 5, False),
)


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each figure: measured, what is asked, whether it was reached; None where nothing was measured."""
    return [_judge(figure, rows) for figure in FIGURES]


def _judge(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [(value, row) for row in rows if _matches(figure, row) and (value := _value(figure, row)) is not None]
    line: dict[str, Any] = {"what": figure.what, "least": figure.least, "aim": figure.aim, "rows": len(found)}
    if not found:
        return line | {"measured": "not measured", "least reached": None, "aim reached": None, "worst row": None}
    if figure.of == "failed":
        found = [(sum(value for value, _ in found), max(found, key=lambda pair: pair[0])[1])]
    worst = min if figure.rising != figure.best else max
    value, row = worst(found, key=lambda pair: pair[0])
    reached = {
        f"{name} reached": None if limit is None else bool(value >= limit if figure.rising else value <= limit)
        for name, limit in (("least", figure.least), ("aim", figure.aim))
    }
    facts = [f"{key} {row[key]}" for key in ("case", "dtype", "k", "nfe", "batch") if row[key] is not None]
    return line | {"measured": value, **reached, "worst row": ", ".join(facts)}


def _matches(figure: Figure, row: Mapping[str, Any]) -> bool:
    return all(
        row[key] in wanted if isinstance(wanted, tuple) else row[key] == wanted for key, wanted in figure.rows.items()
    )


def _value(figure: Figure, row: Mapping[str, Any]) -> float | None:
    if figure.of == "overhead":
        return None if row["ratio"] is None else 1.0 / row["ratio"]
    if figure.of == "failed":
        return float(row["ok"] is False)
    value: float | None = row[figure.of]
    return value
