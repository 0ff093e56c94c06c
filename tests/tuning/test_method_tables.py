"""A solver, or a tuning method, is one function and one row: those of docs/adding.md are wherever others are listed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib import rc_context
from typer.testing import CliRunner

import olss_fast
from olss_fast import solvers
from olss_fast.cli import jobs
from olss_fast.cli.commands import app
from olss_fast.cli.model import solver_plan
from olss_fast.errors import InputError
from olss_fast.methods import METHODS, Method, is_olss
from olss_fast.solvers.rederive import rederive
from olss_fast.solvers.table import TABLE, Solver
from olss_fast.tuning.compare import compare
from olss_fast.tuning.path_search import PathSearch
from olss_fast.tuning.study import Effort

ROOT = Path(__file__).parents[2]
SCHEDULE = olss_fast.NoiseSchedule.named("linear")
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding.md").read_text(), re.DOTALL)


def rows_of(functions: str, rows: str, kind: type) -> dict[str, Any]:
    """The rows of the page, with the functions above them."""
    names: dict[str, Any] = {kind.__name__: kind}
    exec(functions, names)
    found: dict[str, Any] = eval(f"{{{rows}}}", names)
    return found


@pytest.fixture
def one_solver_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, *rows_of(*BLOCKS[:2], Solver).popitem())


@pytest.fixture
def two_methods_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, row in rows_of(*BLOCKS[2:4], Method).items():
        monkeypatch.setitem(METHODS, kind, row)


def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line loads."""
    facts = {"shape": (1, 4, 4), "classes": 0, "null_class": None, "guidance_scale": 1.0}
    model = SimpleNamespace(network=network, schedule=SCHEDULE, **facts)
    monkeypatch.setattr(jobs, "load_model", lambda name, **how: model)


def test_a_solver_is_one_row(one_solver_more: None, tmp_path: Path) -> None:
    noise = torch.randn((8, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    report = compare(network, noise=noise, schedule=SCHEDULE, steps=[3, 5], teacher_steps=20, progress=False)
    names = {each.name for each in report.candidates}
    assert {"Two-step-2 (trailing)", "Two-step-2 (logsnr)"} <= names
    assert "Two-step-2 (karras)" not in names
    again = olss_fast.Report.from_json(report.to_json(tmp_path / "report.json"))
    assert "\n  Two-step " in again.solver_table()
    assert "Two-step" in text_of_the_picture(again, tmp_path)
    plan = solver_plan(SCHEDULE, {"solver": "two_step", "steps": 5})
    assert plan.metadata["method"] == "two_step"
    assert rederive(plan, SCHEDULE, plan.timesteps) == plan
    words = ["--model", "demo", "--solver", "two_step", "--steps", "2", "--count", "1", "--out", str(tmp_path), "-q"]
    assert "1 images at 2 NFE" in CliRunner().invoke(app, ["sample", *words]).output
    with pytest.raises(InputError, match=f"choose one of {', '.join(TABLE)}"):
        solver_plan(SCHEDULE, {"solver": "none", "steps": 5})


def test_a_method_is_one_row(two_methods_more: None, tmp_path: Path) -> None:
    where = ["--model", "demo", "--steps", "3", "--quiet", "--teacher-steps", "12", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["tune", *where, "--samples", "16", "--light"])
    assert "Early" in result.output, result.output
    report = olss_fast.Report.from_json(tmp_path / "report.json")
    fitted = [each.kind for each in report.candidates if each.kind != "analytic"]
    assert fitted == ["olss-published", "olss-uniform", "olss-unpolished", "olss", "early", "olss-early"]
    times, path = report.best(3, "early"), report.best(3, "olss-early")
    assert (times.name, times.path, times.plan.metadata["method"]) == ("Early times", None, "dpm_solver_pp")
    assert (path.name, path.path) == ("OLSS, early path", (0, 2, 4))
    assert (is_olss("early"), is_olss("olss-early")) == (False, True)
    assert "times" in report.table()
    assert "\n  Early times " in report.solver_table()
    assert "Early times" in text_of_the_picture(report, tmp_path)
    times.plan.save(tmp_path / "early.safetensors")
    again = CliRunner().invoke(
        app, ["compare", *where, "--samples", "2", "--plan", str(tmp_path / "early.safetensors")]
    )
    assert "\n  Early times " in again.output, again.output


def test_what_methods_share_is_made_once(two_methods_more: None, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Any] = []
    best = PathSearch.best
    monkeypatch.setattr(PathSearch, "best", lambda self, *given: searches.append(given) or best(self, *given))
    noise = torch.randn((16, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    effort = Effort(polish_iterations=0, path_samples=2, node_moves=())
    how = {"schedule": SCHEDULE, "teacher_steps": 12, "effort": effort, "progress": False}
    result = olss_fast.tune(network, noise=noise, steps=[2, 3], **how)
    assert len(result.plans) == len(searches) == 2


def text_of_the_picture(report: olss_fast.Report, folder: Path) -> str:
    with rc_context({"svg.fonttype": "none"}):
        return report.plot_error(folder / "error.svg").read_text()


def test_the_readme_names_every_solver() -> None:
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `solvers` |")]
    named = {each.strip() for each in line.split("|")[2].split(",")}
    assert {row.family for row in TABLE.values()} == named
    assert {name: row.function for name, row in TABLE.items()} == dict(solvers.SOLVERS)
