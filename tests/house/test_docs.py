"""The pages of docs/migration: their Python runs as it is written, every row of their option tables is true."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch

import olss_fast
from olss_fast import solvers, tune_pipeline
from olss_fast.errors import OlssError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.tuning.tuning import Effort

PAGES = sorted((Path(__file__).parents[2] / "docs" / "migration").glob("*.md"))
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SOLVERS = {
    "from-dpm-solver": (diffusers.DPMSolverMultistepScheduler, solvers.dpm_solver_pp),
    "from-unipc": (diffusers.UniPCMultistepScheduler, solvers.unipc),
}
STEPS = (5, 10, 20)  # below and above the 15 at which diffusers changes its last steps

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' deprecations; DPM-Solver's log(0) at the clean end


def page_id(page: Path) -> str:
    return page.stem


# --- the code --------------------------------------------------------------------------------------------------------


def code_blocks(text: str) -> Iterator[tuple[bool, str]]:
    """(is it slow, code) of every Python block, in order."""
    for mark, code in re.findall(r"(<!-- slow -->\n)?```python\n(.*?)```", text, re.DOTALL):
        yield bool(mark), code


def write_original(path: Path) -> None:
    """A file of the original OLSS scheduler: DDIM's coefficients, so the image is one."""
    plan = solvers.ddim(NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012), 5)
    rows = torch.tensor(plan.rows[1:])
    torch.save((torch.tensor(plan.timesteps).int(), rows[:, 0], rows[:, 1:]), path)


@pytest.fixture(scope="module")
def quick_tuning() -> Callable[..., Any]:
    """`tune_pipeline` as the pages call it, with less of everything, and once for all: they all make the same call."""
    few = Effort(polish_iterations=0, path_samples=2, node_moves=(), split_up_to=0)
    results: list[Any] = []

    def quick(pipe: Any, calls: list[Any], steps: list[int]) -> Any:
        assert len(calls) == 32
        assert set(steps) <= {5, 8}
        if not results:
            results.append(tune_pipeline(pipe, calls[:4], [5, 8], teacher_steps=10, effort=few, progress=False))
        return results[0]

    return quick


@pytest.mark.parametrize("page", PAGES, ids=page_id)
@pytest.mark.slow
def test_the_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_tuning: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(olss_fast, "tune_pipeline", quick_tuning)
    write_original(tmp_path / "olss.bin")
    blocks = list(code_blocks(page.read_text()))
    names: dict[str, Any] = {"pipe": tiny_pipelines.stable_diffusion()}
    for _, code in blocks:
        exec(compile(code, page.name, "exec"), names)
    assert isinstance(names["plan"], Plan)
    assert isinstance(names["pipe"].scheduler, olss_fast.PlanScheduler)
    assert names["image"].size == (16, 16)
    assert sum(slow for slow, _ in blocks) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "from-original-olss"], ids=page_id)
def test_before_and_after_give_the_same_image(page: Path) -> None:
    """The first two blocks of a page: diffusers' scheduler, then its plan in the slot."""
    images = []
    names: dict[str, Any] = {"pipe": tiny_pipelines.stable_diffusion(), "torch": torch}
    for _, code in list(code_blocks(page.read_text()))[:2]:
        seeded = code.replace('"a lighthouse"', '"a lighthouse", generator=torch.Generator().manual_seed(0)')
        exec(seeded, names)
        images.append(np.asarray(names["image"], dtype=np.int64))
    assert np.abs(images[0] - images[1]).max() <= 1  # of 255: rounding to whole levels may fall either way
    assert images[0].std() > 1  # not an empty picture


# --- the tables ------------------------------------------------------------------------------------------------------


def option_rows() -> Iterator[Any]:
    """(page, options of diffusers, arguments of ours, tolerance of rows, of times) of every row of every table."""
    for page in PAGES:
        table = re.search(r"^\| diffusers \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
        for row in table[1].splitlines() if table else ():
            cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
            yield pytest.param(page.stem, *cells[:4], id=f"{page.stem}: {cells[0]}")


def plain_capture(page: str, options: str, steps: int) -> tuple[Any, Plan]:
    scheduler = SOLVERS[page][0](**(STABLE_DIFFUSION | eval(f"dict({options})")))
    plan = olss_fast.capture(scheduler, steps)
    scheduler.set_timesteps(steps)  # `timesteps` and `sigmas` are what some rows speak of
    return scheduler, plan


@pytest.mark.parametrize(("page", "options", "ours", "rows", "times"), list(option_rows()))
def test_options(page: str, options: str, ours: str, rows: str, times: str) -> None:
    if ours == "capture":
        for steps in STEPS:
            assert plain_capture(page, options, steps)[1].nfe == steps
    elif ours == "refused":
        with pytest.raises(OlssError):
            plain_capture(page, options, 10)
    else:
        for steps in STEPS:
            check_equal(*plain_capture(page, options, steps), SOLVERS[page][1], ours, float(rows), float(times))


def check_equal(scheduler: Any, captured: Plan, solver: Any, ours: str, rows: float, times: float) -> None:
    given = eval(f"dict({ours})", {"scheduler": scheduler})
    times_of_row = {"steps": captured.nfe} if "spacing" in given else {"timesteps": scheduler.timesteps}
    plan = solver(NoiseSchedule.from_diffusers(scheduler), **(times_of_row | given))
    assert np.abs(plan.rows - captured.rows).max() <= rows * np.abs(plan.rows).max()
    assert np.abs(plan.timesteps - captured.timesteps).max() <= times


def test_every_table_was_found() -> None:
    assert {row.values[0] for row in option_rows()} == set(SOLVERS)
