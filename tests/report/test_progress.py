"""What a run says while it works: bars on a terminal, few lines in a log file; and what Ctrl-C leaves behind."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import olss_fast
from olss_fast.cli import commands, jobs
from olss_fast.support import progress
from olss_fast.support.progress import LogLines, evaluation_bar

PACKAGE = Path(olss_fast.__file__).parent


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(LogLines, "last", -progress.SECONDS)
    return clock


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules={}))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return stream


def test_a_log_file_gets_whole_lines_ten_seconds_apart(clock: Clock, log: io.StringIO) -> None:
    for _ in range(2):
        with evaluation_bar("Teacher, 100 steps", 100, True) as bar:
            bar.delay = 0.0
            for _ in range(100):
                clock.now += 0.5
                bar.update(1)
                bar.refresh()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert len(lines) == 10  # 100 s
    assert all(re.match(r"Teacher, 100 steps +: +\d+%", line) for line in lines)


def test_a_run_without_a_terminal_draws_nothing_over(clock: Clock, log: io.StringIO) -> None:
    noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    schedule = olss_fast.NoiseSchedule.named("linear")
    olss_fast.sample(lambda x, t: x, olss_fast.solvers.ddim(schedule, 50), noise, progress=True)
    assert "\r" not in log.getvalue()
    assert len(log.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, log: io.StringIO) -> None:
    monkeypatch.setattr(log, "isatty", lambda: True)
    assert progress.bar_options(True) == {"disable": False}
    assert progress.bar_options(False) == {"disable": True}


def test_every_bar_of_the_package_asks_where_it_is_drawn() -> None:
    calls = [
        (path.name, call)
        for path in PACKAGE.rglob("*.py")
        for call in re.findall(r"\btqdm\((?:[^()]|\([^()]*\))*\)", path.read_text())
    ]
    assert len(calls) >= 4
    assert [call for call in calls if "**bar_options(" not in call[1] and "**how" not in call[1]] == []


COMMANDS: dict[str, tuple[Any, str, list[str]]] = {
    "tune": (jobs.NetworkSubject, "tune", ["--model", "demo"]),
    "sample": (jobs.NetworkSubject, "sample", ["--model", "demo", "--solver", "ddim", "--steps", "3"]),
    "compare": (jobs.NetworkSubject, "compare", ["--model", "demo"]),
    "demo": (olss_fast, "tune", []),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("out", ["new", "new/inner", "there"])
def test_interrupting_says_a_word_and_leaves_no_empty_folder(
    name: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    home, function, words = COMMANDS[name]
    monkeypatch.setattr(home, function, interrupted)
    (tmp_path / "there").mkdir()
    result = CliRunner().invoke(commands.app, [name, *words, "--out", str(tmp_path / out), "--quiet"])
    assert result.exit_code == 130
    assert result.stderr == "Interrupted\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_interrupted_with_a_store_says_that_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    home, function, words = COMMANDS["tune"]
    monkeypatch.setattr(home, function, interrupted)
    result = CliRunner().invoke(commands.app, ["tune", *words, "--store", str(tmp_path / "recording"), "--quiet"])
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; the same command with the same --store goes on from here\n"


def test_an_interrupted_build_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.NetworkSubject, "build_engine", interrupted)
    words = ["build", "--model", "demo", "--steps", "2", "--out", str(tmp_path / "new" / "demo.olss")]
    assert CliRunner().invoke(commands.app, words).exit_code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["tune", "--model", "demo", "--steps", "3000"],
        ["tune", "--model", "demo", "--teacher-steps", "20000"],
        ["compare", "--model", "demo", "--steps", "5,3000"],
        ["sample", "--model", "demo", "--solver", "ddim", "--steps", "20000"],
        ["demo", "--steps", "3000"],
    ],
)
def test_too_many_steps_are_refused_by_every_command(words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(commands.app, [*words, "--out", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 2
    assert "2000" in result.stderr
    assert list(tmp_path.iterdir()) == []
