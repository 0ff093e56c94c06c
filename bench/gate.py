"""Does the gate of bench/compare.py hold? It must pass an unchanged tree every time, and find a slowdown of 20%.

    python bench/gate.py FOLDER        # 27 runs, half an hour; writes bench/baseline.json and bench/results/gate.md

The first runs are the baseline, each of the following is compared with it alone, and the last ones run with everything
of ours slowed down (see `interleaved.slowed`). Files that are in FOLDER already are not measured again.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from compare import BASELINE, GATE, SLOWDOWN, described, judge
from rows import Results, read, write_baseline

OUT = Path(__file__).parent / "results" / "gate.md"
Runs = list[Results]


def run(file: Path, slowdown: float = 0.0) -> Results:
    if not file.exists():
        command = [sys.executable, "-m", "pytest", str(BASELINE.parent), "-m", "gated", "-q"]
        environment = {**os.environ, "OLSS_BENCH_SLOWDOWN": str(slowdown), "OMP_NUM_THREADS": "1"}
        partial = file.with_suffix(".partial")
        subprocess.run([*command, f"--benchmark-json={partial}"], env=environment, check=True, stdout=sys.stderr)
        partial.rename(file)
    return read(file)


def failures(baseline: Results, each: Results) -> list[str]:
    return [verdict.name for verdict in judge(baseline.rows, each.rows) if verdict.failed]


def changes(baseline: Results, runs: Runs, name: str) -> list[float]:
    """log(ratio / the baseline's) in every run."""
    return [math.log(each.rows[name].ratio / baseline.rows[name].ratio) for each in runs]  # type: ignore[operator]


def markdown(baseline: Results, unchanged: Runs, slowed: Runs) -> str:
    timed = [name for name, row in baseline.rows.items() if row.ratio is not None]
    wrong = sum(bool(failures(baseline, each)) for each in unchanged)
    found = [len(set(failures(baseline, each)) & set(timed)) for each in slowed]
    lines = [
        f"- {len(unchanged)} runs of an unchanged tree: {wrong} failed.",
        f"- {len(slowed)} runs with everything of ours slowed by {SLOWDOWN - 1:.0%}: {sum(map(bool, found))} failed, "
        f"in {' and '.join(map(str, found))} of {len(timed)} timed rows.",
        f"- A ratio may grow by {GATE - 1:.1%}, half way to the slowdown in logarithms; counts may not change.",
        "",
        "Change of the ratio against the baseline; spread is the standard deviation over the unchanged runs.",
        "",
        "| benchmark | reference | ratio | spread | unchanged, least | unchanged, most | slowed, least |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in timed:
        moves, after = changes(baseline, unchanged, name), changes(baseline, slowed, name)
        row = baseline.rows[name]
        figures = [statistics.stdev(moves), math.expm1(min(moves)), math.expm1(max(moves)), math.expm1(min(after))]
        cells = [f"{figures[0]:.1%}", *(f"{each:+.1%}" for each in figures[1:])]
        lines.append(f"| {name.replace('|', ' ')} | {row.reference} | {row.ratio:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", described(baseline.about), ""])


def main(
    folder: Annotated[Path, typer.Argument(help="For the files of the runs.")],
    baseline_runs: Annotated[int, typer.Option(help="Runs that make the baseline.")] = 5,
    unchanged_runs: Annotated[int, typer.Option(help="Runs that must pass.")] = 20,
    slowed_runs: Annotated[int, typer.Option(help="Runs that must fail.")] = 2,
) -> None:
    """Measure, write the baseline and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    baseline = [run(folder / f"baseline-{i}.json") for i in range(baseline_runs)]
    slowed = [run(folder / f"slowed-{i}.json", SLOWDOWN - 1) for i in range(slowed_runs)]
    unchanged = [run(folder / f"unchanged-{i}.json") for i in range(unchanged_runs)]
    OUT.write_text(markdown(write_baseline(BASELINE, baseline), unchanged, slowed))
    print(OUT.read_text())


if __name__ == "__main__":
    typer.run(main)
