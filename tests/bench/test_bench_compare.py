"""bench/gate/compare.py and bench/gate/interleaved.py, on made-up rows and made-up clocks: nothing is timed here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import interleaved
import numpy as np
import pytest
from rows import Results, Row, middle, read, write_baseline
from typer import Typer
from typer.testing import CliRunner

from olss_fast.errors import InputError

NAME = "bench_step.py::bench_step[1-(2, 3)]"


def row(name: str = NAME, **changed: Any) -> Row:
    given = {"median": 1e-3, "iqr": 1e-5, "rounds": 40, "ratio": 0.5, "reference": "torch"}
    return Row(**{"name": name, **given, "counts": {"kernels": 2}, **changed})


def rows(*each: Row) -> dict[str, Row]:
    return {one.name: one for one in each}


def outcomes(baseline: dict[str, Row], run: dict[str, Row]) -> dict[str, str]:
    return {verdict.figure: verdict.outcome for verdict in compare.judge(baseline, [run])}


def benchmark(**changed: Any) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it."""
    extra = {"ratio": 0.5, "reference": "torch", "counts": {"kernels": 2}}
    stats = {"median": 1e-3, "iqr": 1e-5, "rounds": 40, "data": [1e-3] * 40}
    return {"fullname": f"bench/{NAME}", "stats": stats, "extra_info": {**extra, **changed}}


def run_file(path: Path, *benchmarks: Any, **machine: Any) -> Path:
    cpu = {"brand_raw": "Some Processor", "count": 2}
    about = {"cpu": cpu, "versions": {"torch": "2.13.0"}, "device": "cpu", **machine}
    data = {"machine_info": about, "commit_info": {"id": "0123456789abcdef", "dirty": True}, "datetime": "2026-01-01"}
    path.write_text(json.dumps({**data, "benchmarks": benchmarks}))
    return path


@pytest.fixture
def call() -> Callable[..., tuple[int, str]]:
    """compare.py from the command line: exit code and output."""
    app = Typer()
    app.command()(compare.main)

    def invoke(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return invoke


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.0, "same"), (1.09, "same"), (0.92, "same"), (1.10, "worse"), (1.2, "worse"), (0.9, "better")],
)
def test_a_ratio_may_move_half_way_to_the_slowdown_that_must_be_found(factor: float, outcome: str) -> None:
    found = outcomes(rows(row()), rows(row(ratio=0.5 * factor)))
    assert found == {"of torch": outcome, "kernels": "same"}


def test_counts_are_compared_exactly() -> None:
    for kernels in (1, 3):  # fewer is a change too: the baseline is to say so
        assert outcomes(rows(row()), rows(row(counts={"kernels": kernels})))["kernels"] == "changed"


def test_missing_and_new_figures_are_named_and_only_missing_ones_fail() -> None:
    before, after = rows(row("gone"), row(counts={"kernels": 2, "syncs": 0})), rows(row(), row("fresh"))
    verdicts = compare.judge(before, [after])
    assert {(each.name, each.figure) for each in verdicts if each.outcome == "missing"} == {
        ("gone", "of torch"),
        ("gone", "kernels"),
        (NAME, "syncs"),
    }
    assert {each.name for each in verdicts if each.outcome == "new"} == {"fresh"}
    assert {each.outcome for each in verdicts if each.failed} == {"missing"}


def test_another_reference_is_another_figure() -> None:
    found = outcomes(rows(row()), rows(row(reference="diffusers")))
    assert found == {"of torch": "missing", "of diffusers": "new", "kernels": "same"}


def test_rows_without_ratio_and_counts_are_not_compared() -> None:
    plain = row(ratio=None, counts={})
    assert compare.judge(rows(plain), [{}]) == []


def test_the_gate_lies_between_noise_and_the_slowdown() -> None:
    assert math.log(compare.GATE) == pytest.approx(math.log(compare.SLOWDOWN) - math.log(compare.GATE))
    at_the_edge = row(spread=0.99 * compare.NOISIEST)
    assert compare.too_noisy(rows(at_the_edge, row("noisy", spread=1.01 * compare.NOISIEST))) == ["noisy"]


# --- several runs -----------------------------------------------------------------------------------------------------


def test_the_middle_of_several_runs() -> None:
    ratios = (0.4, 0.6, 0.5)
    merged = middle([Results({"cpu": "first"}, rows(row(ratio=ratio))) for ratio in ratios])
    found = merged.rows[NAME]
    assert (found.ratio, found.rounds, merged.about) == (0.5, 120, {"cpu": "first"})
    mean = sum(map(math.log, ratios)) / 3
    assert found.spread == pytest.approx(math.sqrt(sum((math.log(ratio) - mean) ** 2 for ratio in ratios) / 2))


def test_a_count_that_differs_between_runs_is_refused() -> None:
    with pytest.raises(InputError, match="not deterministic"):
        middle([Results({}, rows(row())), Results({}, rows(row(counts={"kernels": 3})))])


def test_a_baseline_reads_as_it_was_written(tmp_path: Path) -> None:
    results = Results(
        {"cpu": "x", "slowdown": 0.0}, rows(row(), row("b", ratio=None), row("plain", ratio=None, counts={}))
    )
    written = write_baseline(tmp_path / "baseline.json", [results])
    again = read(tmp_path / "baseline.json")
    assert again.rows == written.rows == {name: each for name, each in results.rows.items() if each.gated}
    assert again.about == {"cpu": "x", "slowdown": 0.0, "runs": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["baseline.json"]  # no temporary file is left


def test_a_run_that_was_slowed_down_is_no_baseline(tmp_path: Path, call: Callable[..., tuple[int, str]]) -> None:
    slowed = run_file(tmp_path / "slowed.json", benchmark(), slowdown=0.2)
    code, output = call("--update", slowed, "--baseline", tmp_path / "baseline.json")
    assert code == 2
    assert "slowdown" in output
    assert not (tmp_path / "baseline.json").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_update_and_compare(tmp_path: Path, call: Callable[..., tuple[int, str]]) -> None:
    baseline = ("--baseline", tmp_path / "baseline.json")
    good = run_file(tmp_path / "good.json", benchmark())
    assert call("--update", good, *baseline)[0] == 0
    code, output = call(good, *baseline)
    assert code == 0
    assert "2 figures passed" in output
    assert "Some Processor" in output
    assert NAME in output  # its brackets are no markup
    code, output = call(run_file(tmp_path / "slow.json", benchmark(ratio=0.6), slowdown=0.2), *baseline)
    assert code == 1
    for expected in ("worse", "+20.0%", "1 of 2 figures failed", "slowed by 0.2", "0123456789 with changes"):
        assert expected in output
    assert call(run_file(tmp_path / "empty.json"), *baseline)[0] == 1  # nothing was run: everything is missing


def test_of_several_runs_a_ratio_fails_if_it_is_worse_in_every_one(
    tmp_path: Path, call: Callable[..., tuple[int, str]]
) -> None:
    baseline = ("--baseline", tmp_path / "baseline.json")
    files = [run_file(tmp_path / f"{i}.json", benchmark(ratio=ratio)) for i, ratio in enumerate((0.5, 0.7, 0.6, 0.51))]
    assert call("--update", files[0], *baseline)[0] == 0
    code, output = call(files[1], files[2], *baseline)
    assert code == 1
    assert "+20.0%" in output  # the least of them
    assert call(*files[1:], *baseline)[0] == 0


def test_a_count_fails_if_it_changed_in_any_run() -> None:
    runs = [rows(row()), rows(row(counts={"kernels": 3}))]
    assert [each.outcome for each in compare.judge(rows(row()), runs)] == ["same", "changed"]


def test_a_noisy_baseline_is_named(tmp_path: Path, call: Callable[..., tuple[int, str]]) -> None:
    files = [run_file(tmp_path / f"{i}.json", benchmark(ratio=ratio)) for i, ratio in enumerate((0.5, 0.6))]
    code, output = call("--update", *files, "--baseline", tmp_path / "baseline.json")
    assert code == 1
    assert "too much for the gate" in output


HOSTILE = {
    "nan": benchmark(ratio=math.nan),
    "infinite": benchmark(ratio=math.inf),
    "zero": benchmark(ratio=0),
    "negative": benchmark(ratio=-0.5),
    "true": benchmark(ratio=True),
    "text": benchmark(ratio="0.5"),
    "huge": benchmark(ratio=10**400),
    "fractional count": benchmark(counts={"kernels": 2.5}),
    "boolean count": benchmark(counts={"kernels": True}),
    "counts are a list": benchmark(counts=[1]),
    "no statistics": {"fullname": "x", "extra_info": {}},
    "statistics are null": {"fullname": "x", "stats": {"median": None, "iqr": 0, "rounds": 1}, "extra_info": {}},
    "no name": {"stats": {}, "extra_info": {}},
    "a number": 3,
    "null": None,
}


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_a_row_that_makes_no_sense_is_refused(tmp_path: Path, call: Callable[..., tuple[int, str]], bad: Any) -> None:
    baseline = tmp_path / "baseline.json"
    assert call("--update", run_file(tmp_path / "good.json", benchmark()), "--baseline", baseline)[0] == 0
    code, output = call(run_file(tmp_path / "bad.json", bad), "--baseline", baseline)
    assert code == 2
    assert "expected" in output
    assert "Traceback" not in output


TEXTS = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "a number": b"3",
    "other object": b"{}",
    "rows are an object": b'{"machine_info": {}, "commit_info": {}, "benchmarks": {}}',
    "machine is null": b'{"machine_info": null, "commit_info": {}, "benchmarks": []}',
    "baseline without rows": b'{"format": "olss-fast-bench-baseline", "about": {}}',
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "long number": b'{"benchmarks": ' + b"9" * 5000 + b"}",
    "control characters": b'{"machine_info": "\\u001b[2J", "commit_info": {}, "benchmarks": []}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_file_that_is_none_of_results_is_refused(
    tmp_path: Path, call: Callable[..., tuple[int, str]], text: bytes
) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(text)
    code, output = call(file)
    assert code == 2
    assert "is no file of benchmark results" in output
    assert "\x1b" not in output


def test_two_rows_of_one_name_and_no_file_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same name"):
        read(run_file(tmp_path / "twice.json", benchmark(), benchmark()))
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nowhere.json")


# --- interleaved times ------------------------------------------------------------------------------------------------


class Machine:
    """A clock that calls advance: by `cost` nanoseconds times how slow the machine is at the moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slowness: Callable[[int], float] = lambda now: 1.0) -> None:
        self.now, self.slowness, self.order = 0, slowness, ""
        monkeypatch.setattr(interleaved, "CLOCK", lambda: self.now)

    def call(self, name: str, cost: int) -> interleaved.Call:
        def spend() -> None:
            self.order += name
            self.now += round(cost * self.slowness(self.now))

        return spend


COST = 2 * interleaved.BLOCK  # one call fills a block


def test_the_order_is_a_b_b_a(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    found = interleaved.compare(machine.call("A", 3 * COST), machine.call("B", 2 * COST), seconds=0.01)
    assert machine.order == "AB" + "ABBA" * len(found.ours)  # a call of either warms up
    assert found.ratio == 1.5
    assert found.ours[0] == pytest.approx(3e-9 * COST)


def test_a_steady_drift_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, lambda now: 1.0 + now / (2000.0 * COST))
    found = interleaved.compare(machine.call("A", COST), machine.call("B", COST), seconds=0.01)
    assert found.ratio == pytest.approx(1.0, abs=1e-6)  # of second order in 1/2000, the growth of one call
    assert found.ours == tuple(sorted(found.ours))


def test_only_the_quietest_quarter_counts() -> None:
    quiet = [(1.0, 2.0), (1.1, 2.0), (1.2, 2.0)]
    busy = [(5.0, 3.0)] * 9  # ours is slowed more than the reference
    ours, reference = zip(*busy, *quiet, strict=True)
    found = interleaved.Comparison(ours, reference)
    assert sorted(zip(found.quiet.ours, found.quiet.reference, strict=True)) == quiet
    assert found.ratio == 0.55
    assert interleaved.Comparison((3.0,), (2.0,)).ratio == 1.5


def test_which_rounds_are_quiet_favours_neither_side() -> None:
    rng = np.random.default_rng(0)
    ours, reference = np.exp(0.2 * rng.standard_normal((2, 4000)))
    found = interleaved.Comparison(tuple(ours), tuple(reference))
    # the median of 1000 ratios with a logarithm of deviation 0.28 is known to 1.25 * 0.28 / sqrt(1000) = 0.011
    assert math.log(found.ratio) == pytest.approx(0.0, abs=0.04)
    assert interleaved.Comparison(found.reference, found.ours).ratio == pytest.approx(1 / found.ratio)


def test_turns_are_joined() -> None:
    turns = [interleaved.Comparison((1.0, 2.0), (3.0, 4.0)), interleaved.Comparison((5.0,), (6.0,))]
    assert interleaved.joined(turns) == interleaved.Comparison((1.0, 2.0, 5.0), (3.0, 4.0, 6.0))


def test_short_calls_are_timed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    found = interleaved.compare(machine.call("A", 3_000), machine.call("B", 1_000), seconds=0.01)
    assert found.ratio == pytest.approx(3.0)
    longest_run = max(len(list(run)) for _, run in itertools.groupby(machine.order))
    assert longest_run * 3_000 >= interleaved.BLOCK


def test_slowed_adds_a_fraction_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    ticks = itertools.count()
    monkeypatch.setattr(interleaved, "CLOCK", lambda: machine.now + next(ticks))  # looking at the clock takes 1 ns
    interleaved.slowed(machine.call("A", COST), 0.2)()
    assert next(ticks) == pytest.approx(0.2 * COST, rel=1e-3)
