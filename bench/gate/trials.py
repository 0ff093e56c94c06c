"""Does the gate of bench/gate/compare.py hold? It must pass an unchanged tree every time, and find a slowdown of 20%.

    python bench/gate/trials.py FOLDER   # 40 runs, an hour; writes bench/gate/baseline.json and bench/results/gate.md

The first runs are the baseline. Then come trials with everything of ours slowed down (see `interleaved.slowed`), then
of the unchanged tree. Files that are in FOLDER already are not measured again.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from compare import BASELINE, GATE, SLOWDOWN, described, judge
from rows import Results, read, write_baseline

OUT = Path(__file__).parents[1] / "results" / "gate.md"
ATTEMPTS = 3
Runs = list[Results]


def run(file: Path, slowdown: float = 0.0) -> Results:
    if not file.exists():
        command = [sys.executable, "-m", "pytest", str(BASELINE.parents[1]), "-m", "gated", "-q"]
        environment = {**os.environ, "OLSS_BENCH_SLOWDOWN": str(slowdown), "OMP_NUM_THREADS": "1"}
        partial = file.with_suffix(".partial")
        subprocess.run([*command, f"--benchmark-json={partial}"], env=environment, check=True, stdout=sys.stderr)
        partial.rename(file)
    return read(file)


def trial(folder: Path, name: str, baseline: Results, slowdown: float = 0.0) -> Runs:
    """Runs until they pass, as bench/README.md says, but no more than ATTEMPTS."""
    runs: Runs = []
    for attempt in range(ATTEMPTS):
        runs.append(run(folder / f"{name}-{attempt}.json", slowdown))
        if not failures(baseline, runs):
            break
    return runs


def failures(baseline: Results, runs: Runs) -> set[str]:
    return {verdict.name for verdict in judge(baseline.rows, [each.rows for each in runs]) if verdict.failed}


def changes(baseline: Results, trials: list[Runs], name: str) -> list[float]:
    """log(ratio / the baseline's) in every run."""
    before = baseline.rows[name].ratio or math.nan
    return [math.log((each.rows[name].ratio or math.nan) / before) for runs in trials for each in runs]


def markdown(baseline: Results, unchanged: list[Runs], slowed: list[Runs]) -> str:
    timed = [name for name, row in baseline.rows.items() if row.ratio is not None]
    needed = Counter(len(runs) for runs in unchanged)
    false_alarms = sum(bool(failures(baseline, runs)) for runs in unchanged)
    found = [len(failures(baseline, runs) & set(timed)) for runs in slowed]
    lines = [
        f"- {len(unchanged)} trials of an unchanged tree: {false_alarms} failed. "
        f"Runs that a trial took: {', '.join(f'{runs} in {count}' for runs, count in sorted(needed.items()))}.",
        f"- {len(slowed)} trials with everything of ours slowed by {SLOWDOWN - 1:.0%}: {sum(map(bool, found))} failed, "
        f"in {' and '.join(map(str, found))} of {len(timed)} timed rows.",
        f"- A ratio may grow by {GATE - 1:.1%}, half way to the slowdown in logarithms; counts may not change. A trial "
        f"runs until nothing is worse, at most {ATTEMPTS} times, and fails for what is worse in every run.",
        "",
        "Change of the ratio against the baseline, over all runs; spread is the standard deviation of its logarithm.",
        "",
        "| benchmark | reference | ratio | spread | unchanged, least | most | slowed, least | most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(baseline, unchanged, slowed, name) for name in timed]
    return "\n".join([*lines, "", described(baseline.about), ""])


def _line(baseline: Results, unchanged: list[Runs], slowed: list[Runs], name: str) -> str:
    moves, after = (sorted(changes(baseline, trials, name)) for trials in (unchanged, slowed))
    row = baseline.rows[name]
    ends = [f"{math.expm1(each):+.1%}" for each in (moves[0], moves[-1], after[0], after[-1])]
    return f"| {name} | {row.reference} | {row.ratio:.3f} | {statistics.stdev(moves):.1%} | {' | '.join(ends)} |"


def main(
    folder: Annotated[Path, typer.Argument(help="For the files of the runs.")],
    baseline_runs: Annotated[int, typer.Option(help="Runs that make the baseline.")] = 5,
    unchanged_trials: Annotated[int, typer.Option(help="Trials that must pass.")] = 20,
    slowed_trials: Annotated[int, typer.Option(help="Trials that must fail.")] = 2,
) -> None:
    """Measure, write the baseline and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    baseline = write_baseline(BASELINE, [run(folder / f"baseline-{i}.json") for i in range(baseline_runs)])
    slowed = [trial(folder, f"slowed-{i}", baseline, SLOWDOWN - 1) for i in range(slowed_trials)]
    unchanged = [trial(folder, f"unchanged-{i}", baseline) for i in range(unchanged_trials)]
    OUT.write_text(markdown(baseline, unchanged, slowed))
    print(OUT.read_text())


if __name__ == "__main__":
    typer.run(main)
