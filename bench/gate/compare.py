"""Is a run of the benchmarks as good as the baseline?

    pytest bench -m gated --benchmark-json run.json && python bench/gate/compare.py run.json
    python bench/gate/compare.py --update run-1.json run-2.json run-3.json       # these are the baseline from now on

Times are compared as ratios to a reference that was measured in the same run, counts exactly; a row of the baseline
that the run lacks fails too. If a ratio is worse, run again and give all files: only what is worse in every run fails.
Exit code 0: all passed; 1: something is worse; 2: a file cannot be used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from rows import Results, Row, read, write_baseline

from olss_fast.errors import InputError
from olss_fast.support.text import printable

BASELINE = Path(__file__).parent / "baseline.json"

SLOWDOWN = 1.2  # what must be found
#: A ratio may grow by this factor, half way (in logarithms) to the slowdown that must be found, so that a false alarm
#: and a slowdown that passes are equally rare: both need a ratio to be off by log(GATE) = 0.091.
GATE = math.sqrt(SLOWDOWN)
#: Largest spread (of a log ratio, between runs) that a row may have: log(GATE) is then four standard deviations.
NOISIEST = math.log(GATE) / 4

FAILED = {"worse", "changed", "missing"}
STYLES = {"worse": "red", "changed": "red", "missing": "red", "better": "green", "new": "yellow"}


@dataclass(frozen=True)
class Verdict:
    """What became of one figure of one row; `before` and `after` are None where a side lacks it."""

    name: str
    figure: str
    before: float | None
    after: float | None
    outcome: str

    @property
    def failed(self) -> bool:
        return self.outcome in FAILED


def judge(baseline: Mapping[str, Row], runs: Sequence[Mapping[str, Row]]) -> list[Verdict]:
    """A verdict on every ratio and every count that either side has, in the baseline's order, new ones last.

    Of several runs of one tree a ratio is worse if it is worse in every one: what keeps a machine busy passes.
    """
    names = dict.fromkeys(name for rows in (baseline, *runs) for name, row in rows.items() if row.gated)
    return [
        verdict for name in names for verdict in _verdicts(name, baseline.get(name), [run.get(name) for run in runs])
    ]


def _verdicts(name: str, before: Row | None, after: Sequence[Row | None]) -> Iterator[Verdict]:
    old, new = _figures(before), [_figures(row) for row in after]
    for figure in dict.fromkeys(figure for each in (old, *new) for figure in each):
        found = sorted(each[figure] for each in new if figure in each)
        outcome = _outcome(old.get(figure), found)
        yield Verdict(name, figure, old.get(figure), _shown_of(found, outcome), outcome)


def _figures(row: Row | None) -> dict[str, float]:
    if row is None:
        return {}
    return ({} if row.ratio is None else {f"of {row.reference}": row.ratio}) | dict(row.counts)


def _outcome(before: float | None, found: Sequence[float]) -> str:
    """`found` is sorted; whole numbers are counts."""
    if before is None or not found:
        return "missing" if before is not None else "new"
    if isinstance(before, int):
        return "same" if found[0] == found[-1] == before else "changed"
    return "worse" if found[0] > GATE * before else "better" if found[-1] < before / GATE else "same"


def _shown_of(found: Sequence[float], outcome: str) -> float | None:
    """The one that decided; else the middle one."""
    return None if not found else found[0] if outcome == "worse" else found[len(found) // 2]


def too_noisy(rows: Mapping[str, Row]) -> list[str]:
    """Rows whose ratio moves so much between runs that the gate would not tell."""
    return [name for name, row in rows.items() if row.spread > NOISIEST]


def table(verdicts: list[Verdict]) -> Table:
    made = Table("benchmark", "figure", *(Column(each, justify="right") for each in ("baseline", "now", "change")), "")
    for each in verdicts:
        cells = [_shown(each.before), _shown(each.after), _change(each)]
        made.add_row(
            *(Text(printable(text)) for text in (each.name, each.figure)),
            *map(Text, cells),
            Text(each.outcome, style=STYLES.get(each.outcome, "")),
        )
    return made


def _shown(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _change(verdict: Verdict) -> str:
    if verdict.before is None or verdict.after is None or isinstance(verdict.before, int):
        return ""
    return f"{verdict.after / verdict.before - 1:+.1%}"


def described(about: Mapping[str, Any]) -> str:
    """One line on the machine and the tree."""
    versions = about.get("versions")
    listed = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "versions unknown"
    tree = f"{str(about.get('commit'))[:10]}{' with changes' if about.get('dirty') else ''}"
    slowdown = f"; slowed by {about['slowdown']}" if about.get("slowdown") else ""
    return printable(
        f"{about.get('cpu')} x {about.get('cpus')}, {about.get('device')}; {listed}; commit {tree}{slowdown}"
    )


def main(
    runs: Annotated[list[Path], typer.Argument(help="Files of `pytest bench --benchmark-json`, of one tree.")],
    baseline: Annotated[Path, typer.Option(help="What to compare with.")] = BASELINE,
    update: Annotated[bool, typer.Option("--update", help="Make the runs the baseline.")] = False,
) -> None:
    """Compare a run with the baseline, or make runs the baseline."""
    console = Console(soft_wrap=True)
    try:
        results = [read(path) for path in runs]
        passed = _update(console, baseline, results) if update else _gate(console, read(baseline), results)
    except InputError as error:
        console.print(Text(str(error)))
        raise typer.Exit(2) from error
    raise typer.Exit(0 if passed else 1)


def _update(console: Console, path: Path, runs: list[Results]) -> bool:
    rows = write_baseline(path, runs).rows
    noisy = too_noisy(rows)
    console.print(Text(f"{path.name}: {len(rows)} rows, the middle of {len(runs)} runs"))
    for name in noisy:
        console.print(
            Text(f"{name}: its ratio's spread is {rows[name].spread:.1%}, too much for the gate", style="red")
        )
    return not noisy


def _gate(console: Console, baseline: Results, runs: list[Results]) -> bool:
    verdicts = judge(baseline.rows, [run.rows for run in runs])
    failed = [each for each in verdicts if each.failed]
    console.print(Text(f"baseline: {described(baseline.about)}\nnow:      {described(runs[0].about)}"))
    console.print(table(verdicts))
    summary = f"{len(failed)} of {len(verdicts)} figures failed" if failed else f"{len(verdicts)} figures passed"
    console.print(Text(f"{summary}; a ratio may be {GATE - 1:.1%} above the baseline's"))
    return not failed


if __name__ == "__main__":
    typer.run(main)
