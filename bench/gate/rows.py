"""Rows of results: what one benchmark found, read from pytest-benchmark's JSON or from the baseline.

A run's file is `pytest bench --benchmark-json FILE`: machine, versions and commit once, then a row a benchmark. The
baseline holds the same rows, of one or several runs on one machine, without the times of every round.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from olss_fast.errors import InputError
from olss_fast.support.files import read_bounded, write_atomically
from olss_fast.support.text import printable, quoted

FORMAT = "olss-fast-bench-baseline"
LARGEST = sys.float_info.max
LARGEST_FILE = 1 << 28  # bytes; a run lists the time of every round
SECONDS = "seconds a call"


@dataclass(frozen=True)
class Row:
    """One benchmark. `median` and `iqr` are of ours, in `unit`; the ratio is ours over the reference.

    `spread` is the standard deviation of the ratio's logarithm between runs: 0 where there was one.
    """

    name: str
    median: float
    iqr: float
    rounds: int
    unit: str = SECONDS
    ratio: float | None = None
    reference: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    spread: float = 0.0

    @property
    def gated(self) -> bool:
        return self.ratio is not None or bool(self.counts)


@dataclass(frozen=True)
class Results:
    """`about`: machine, device, versions, commit, date, slowdown."""

    about: Mapping[str, Any]
    rows: Mapping[str, Row]

    @property
    def slowdown(self) -> float:
        return _number(self.about.get("slowdown", 0.0), "slowdown", least=0.0)


def read(path: Path) -> Results:
    """The rows of a run or of the baseline. InputError: it is neither, or a figure is missing or makes no sense."""
    try:
        data = json.loads(read_bounded(path, LARGEST_FILE, error=InputError))
        if not isinstance(data, dict):
            raise InputError(f"expected an object, got {quoted(data)}")
        if data.get("format") == FORMAT:
            return _results(_of(data, "about", dict), [_row(each) for each in _of(data, "rows", list)])
        return _results(_about(data), [_run_row(each) for each in _of(data, "benchmarks", list)])
    except (InputError, ValueError, RecursionError) as error:
        hint = "Write one with `pytest bench --benchmark-json FILE`"
        raise InputError(
            f"{quoted(str(path))} is no file of benchmark results: {printable(str(error))}. {hint}"
        ) from error


def write_baseline(path: Path, runs: Sequence[Results]) -> Results:
    """The middle of several runs of one tree, written atomically."""
    if not runs or any(run.slowdown for run in runs):
        raise InputError("a baseline is made of one or more runs without a deliberate slowdown")
    merged = middle(runs)
    rows = [{key: value for key, value in asdict(row).items() if value != ""} for row in merged.rows.values()]
    data = {"format": FORMAT, "about": {**merged.about, "runs": len(runs)}, "rows": rows}
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode(), error=InputError)
    return merged


def middle(runs: Sequence[Results]) -> Results:
    """Of each gated row the medians over the runs that have it, and the spread of its ratio between them."""
    names = dict.fromkeys(name for run in runs for name, row in run.rows.items() if row.gated)
    rows = {name: _merged([run.rows[name] for run in runs if name in run.rows]) for name in names}
    return Results(runs[0].about, rows)


def _merged(rows: Sequence[Row]) -> Row:
    first = rows[0]
    if any(row.counts != first.counts for row in rows):
        raise InputError(f"{quoted(first.name)} has other counts in other runs: it is not deterministic")
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return Row(
        name=first.name,
        median=statistics.median(row.median for row in rows),
        iqr=statistics.median(row.iqr for row in rows),
        rounds=sum(row.rounds for row in rows),
        unit=first.unit,
        ratio=statistics.median(ratios) if ratios else None,
        reference=first.reference,
        counts=first.counts,
        spread=statistics.stdev(map(math.log, ratios)) if len(ratios) > 1 else first.spread,
    )


def _about(data: dict[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark and bench/conftest.py know of the machine and the tree, as far as it matters here."""
    machine, commit = _of(data, "machine_info", dict), _of(data, "commit_info", dict)
    cpu = machine.get("cpu")
    return {
        "cpu": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
        "cpus": cpu.get("count") if isinstance(cpu, dict) else None,
        "system": machine.get("system"),
        "python": machine.get("python_version"),
        **{key: machine.get(key) for key in ("device", "threads", "versions")},
        "slowdown": machine.get("slowdown", 0.0),
        "commit": commit.get("id"),
        "dirty": commit.get("dirty"),
        "date": data.get("datetime"),
    }


def _results(about: Mapping[str, Any], rows: Sequence[Row]) -> Results:
    named = {row.name: row for row in rows}
    if len(named) < len(rows):
        raise InputError("two rows have the same name")
    return Results(about, named)


def _run_row(data: Any) -> Row:
    """A benchmark of pytest-benchmark's file: its statistics and what the fixtures added."""
    stats, extra = _of(data, "stats", dict), _of(data, "extra_info", dict)
    wanted = {key: extra[key] for key in ("ratio", "reference", "counts") if key in extra}
    figures = {key: stats.get(key) for key in ("median", "iqr", "rounds")}
    return _row({"name": _of(data, "fullname", str).removeprefix("bench/"), **figures, **wanted})


def _row(data: Any) -> Row:
    name = _of(data, "name", str)
    what = f"{quoted(name)}: "
    counts = data.get("counts", {})
    if not isinstance(counts, dict) or not all(type(value) is int for value in counts.values()):
        raise InputError(f"{what}counts are {quoted(counts)}, expected whole numbers by name")
    ratio = data.get("ratio")
    return Row(
        name=name,
        median=_number(data.get("median"), what + "median", least=0.0),
        iqr=_number(data.get("iqr"), what + "iqr", least=0.0),
        rounds=int(_number(data.get("rounds"), what + "rounds", least=1)),
        unit=str(data.get("unit", SECONDS)),
        ratio=None if ratio is None else _number(ratio, what + "ratio", least=1e-12),
        reference=str(data.get("reference", "")),
        counts=counts,
        spread=_number(data.get("spread", 0.0), what + "spread", least=0.0),
    )


def _of(data: Any, key: str, kind: type) -> Any:
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise InputError(f"{key!r} is {quoted(value)}, expected {kind.__name__}")
    return value


def _number(value: Any, what: str, *, least: float) -> float:
    """A finite number of at least `least`; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST:
        raise InputError(f"{what} is {quoted(value)}, expected a number of at least {least:g}")
    return float(value)
