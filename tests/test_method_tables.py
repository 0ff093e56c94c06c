"""A solver, or a tuning method, is one function and one row: toy ones are in every place that lists them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner

import olss_fast
from olss_fast import solvers
from olss_fast.cli import jobs
from olss_fast.cli.commands import app
from olss_fast.cli.model import solver_plan
from olss_fast.compare import compare
from olss_fast.errors import InputError
from olss_fast.methods import METHODS, Method, is_olss
from olss_fast.solvers._exponential import Space, lagrange_rule, multistep
from olss_fast.solvers._tape import Tape, evaluation_levels
from olss_fast.solvers.table import TABLE, Solver
from olss_fast.study import Study
from olss_fast.truncation import rederive

SCHEDULE = olss_fast.NoiseSchedule.named("linear")
README = Path(__file__).parent.parent / "README.md"


def toy_solver(
    schedule: olss_fast.NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    timesteps: npt.ArrayLike | None = None,
    start: float | None = None,
) -> olss_fast.Plan:
    levels, name = evaluation_levels(schedule, steps, timesteps, spacing)
    tape = Tape(schedule, len(levels), start=start)
    sample = multistep(tape, levels, [min(i + 1, 2) for i in range(len(levels))], lagrange_rule, Space.DATA)
    return tape.plan(sample, method="toy", order=2, spacing=name)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "toy", Solver(toy_solver, "Toy", "Toy-{order}", ({},), ("trailing", "logsnr")))


def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line loads."""
    facts = {"shape": (1, 4, 4), "classes": 0, "null_class": None, "guidance_scale": 1.0}
    model = SimpleNamespace(network=network, schedule=SCHEDULE, **facts)
    monkeypatch.setattr(jobs, "load_model", lambda name, **how: model)


def test_a_solver_is_one_row(toy: None, tmp_path: Path) -> None:
    noise = torch.randn((8, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    report = compare(network, noise=noise, schedule=SCHEDULE, steps=[3, 5], teacher_steps=20, progress=False)
    names = {each.name for each in report.candidates}
    assert {"Toy-2 (trailing)", "Toy-2 (logsnr)"} <= names
    assert "Toy-2 (karras)" not in names
    again = olss_fast.Report.from_json(report.to_json(tmp_path / "report.json"))
    assert "\n  Toy " in again.solver_table()
    assert "Toy" in _words(again, tmp_path)
    plan = solver_plan(SCHEDULE, {"solver": "toy", "steps": 5})
    assert rederive(plan, SCHEDULE, plan.timesteps) == plan == toy_solver(SCHEDULE, 5)
    out = tmp_path / "images"
    words = ["sample", "--model", "demo", "--solver", "toy", "--steps", "2", "--count", "1", "--out", str(out), "-q"]
    assert "1 images at 2 NFE" in CliRunner().invoke(app, words).output
    with pytest.raises(InputError, match=f"choose one of {', '.join(TABLE)}"):
        solver_plan(SCHEDULE, {"solver": "none", "steps": 5})


def toy_times(study: Study) -> olss_fast.Plan:
    """Times, for an analytic solver."""
    share = np.arange(study.steps) / study.steps
    return solvers.dpm_solver_pp(study.task.schedule, timesteps=950.0 * (1.0 - share**0.8))


def toy_path(study: Study) -> olss_fast.Plan:
    """A path, for a fit with the ridge that another method has found."""
    late = tuple(3 * i for i in range(study.steps))
    return study.plan(study.on_policy(late, ridges=[study.fitted.ridge]))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Method("Toy times", toy_times, line=("#008800", "-.")))
    monkeypatch.setitem(METHODS, "olss-toy", Method("OLSS, toy path", toy_path))


def test_a_method_is_one_row(toys: None, tmp_path: Path) -> None:
    where = ["--model", "demo", "--steps", "3", "--quiet", "--teacher-steps", "12", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["tune", *where, "--samples", "16", "--light"])
    assert "Toy" in result.output, result.output
    report = olss_fast.Report.from_json(tmp_path / "report.json")
    fitted = [each.kind for each in report.candidates if each.kind != "analytic"]
    assert fitted == ["olss-published", "olss-uniform", "olss-unpolished", "olss", "toy", "olss-toy"]
    times, path = report.best(3, "toy"), report.best(3, "olss-toy")
    assert (times.name, times.path, times.plan.metadata["method"]) == ("Toy times", None, "dpm_solver_pp")
    assert (path.name, path.path) == ("OLSS, toy path", (0, 3, 6))
    assert (is_olss("toy"), is_olss("olss-toy")) == (False, True)
    assert "times" in report.table()
    assert "\n  Toy times " in report.solver_table()
    assert "Toy times" in _words(report, tmp_path)
    times.plan.save(tmp_path / "toy.safetensors")
    again = CliRunner().invoke(app, ["compare", *where, "--samples", "2", "--plan", str(tmp_path / "toy.safetensors")])
    assert "\n  Toy times " in again.output, again.output


def _words(report: olss_fast.Report, folder: Path) -> str:
    """The text of its picture of errors."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        return report.plot_error(folder / "error.svg").read_text()


def test_the_readme_names_every_solver() -> None:
    (line,) = [line for line in README.read_text().splitlines() if line.startswith("| `solvers` |")]
    for name, row in TABLE.items():
        assert row.family.split()[0] in line, name
        assert solvers.SOLVERS[name] is row.function
