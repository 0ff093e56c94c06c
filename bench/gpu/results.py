"""Rows of results, the time that is left, and the two files they end in.

A row: section, name, case (which network or kind of data), value, unit, p99, n (rounds), dtype, shape, k (columns
combined), nfe, batch, device, versions, commit. `ratio` says how many times as good as `reference` it is, the median
over rounds: above 1 is faster. `ok` is set where a row is a check, and `note` says what was wrong.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import torch
from devices import Device

from olss_fast.errors import InputError
from olss_fast.support.files import write_atomically

COLUMNS = (
    "name",
    "case",
    "dtype",
    "shape",
    "k",
    "nfe",
    "value",
    "unit",
    "p99",
    "n",
    "ratio",
    "reference",
    "ok",
    "note",
)
EMPTY: dict[str, Any] = dict.fromkeys((*COLUMNS, "section", "batch", "bandwidth", "device", "versions", "commit"), None)


class OutOfTime(BaseException):
    """The whole bench is over; no `except Exception` on the way may catch it."""


@dataclass
class Bench:
    """What a section is handed. `end` and `until`: when the whole bench and this section are over, monotonic time.

    `interruptible`: whether a section runs, which OutOfTime may end; what is between two sections is never cut short.
    """

    device: Device
    out: Path
    about: dict[str, str]
    end: float
    until: float = 0.0
    section: str = ""
    part: str = ""
    interruptible: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.device.dry

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["ok"] is False]

    def add(self, name: str, value: float, unit: str, **other: Any) -> None:
        given = {"section": self.section, "name": name, "value": value, "unit": unit, **other}
        unknown = set(given) - set(EMPTY)
        assert not unknown, f"no such columns: {unknown}"
        self.rows.append({**EMPTY, **given, **{key: self.about[key] for key in ("device", "versions", "commit")}})

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append({"section": self.section, "name": name, "reason": reason})
        print(f"  skipped {name}: {reason}", flush=True)

    def run(self, name: str, part: Callable[..., None], *arguments: Any, least: float = 2.0, **options: Any) -> None:
        """One part of a section. A missing package or too little time skips it, any other error is a failed row."""
        self.part = name
        if self.left < least:
            return self.skip(
                name, f"the section's time was over ({max(0.0, self.left):.0f} s left, {least:.0f} needed)"
            )
        try:
            part(self, *arguments, **options)
        except ModuleNotFoundError as error:
            self.skip(name, str(error))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            note = f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"[:400]
            self.add(name, 1, "errors", ok=False, note=note)
            print(f"  FAILED {name}: {note}", flush=True)
        self.write()

    def free(self) -> None:
        """Gives memory back that nothing refers to any more."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def run_section(self, name: str, section: Callable[[Bench], None], seconds: float) -> None:
        """`seconds` at most, and what earlier sections left of theirs is not lost: the last ones have the most."""
        started = time.monotonic()
        self.section, self.part, self.until = name, name, min(self.end, started + seconds)
        print(f"{name} ({self.end - started:.0f} s left in all)", flush=True)
        before = self.device.state()
        self.interruptible = True
        try:
            section(self)
        except OutOfTime:
            self.skip(self.part, "the time of the whole bench was over while it ran")
        finally:
            self.interruptible = False
        self.free()
        took = time.monotonic() - started
        self.log.append({"section": name, "seconds": took, "before": before, "after": self.device.state()})
        self.write()

    def write(self) -> None:
        """Both files, each atomically: a bench that is killed leaves what it has."""
        reached = figures.judge(self.rows)
        data = {
            "about": self.about,
            "failed": len(self.failed),
            "figures": reached,
            "sections": self.log,
            "skipped": self.skipped,
            "rows": self.rows,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(data, indent=1) + "\n"), (".md", self._markdown(reached))):
            path = self.out / ("gpu-dry" if self.dry else "gpu")
            write_atomically(path.with_suffix(suffix), text.encode(), error=InputError)

    def _markdown(self, reached: Sequence[dict[str, Any]]) -> str:
        lines = ["# On a GPU", "", f"`{self.about['command']}`", ""]
        lines += [f"- {key}: {value}" for key, value in self.about.items() if key != "command"]
        lines += [f"- failed checks: {len(self.failed)}", "", "## Figures to reach", ""]
        if self.dry:
            lines += ["Of a dry run on the CPU, at tiny sizes: these figures mean nothing.", ""]
        lines += _table(figures.COLUMNS, reached)
        for section in dict.fromkeys(row["section"] for row in self.rows):
            rows = [row for row in self.rows if row["section"] == section]
            lines += ["", f"## {section}", "", *_table(COLUMNS, rows)]
        lines += ["", "## Skipped", "", *_table(("section", "name", "reason"), self.skipped)]
        lines += ["", "## Device", "", *_table(("section", "seconds", "before", "after"), self.log)]
        return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table of the columns that any row fills."""
    used = [name for name in columns if any(row[name] not in (None, "") for row in rows)]
    if not used:
        return ["none"]
    lines = [[_cell(row[name]) for name in used] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (used, ["---"] * len(used), *lines)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 2 or abs(value) < 0.5 else f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        return "×".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
