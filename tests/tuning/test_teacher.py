"""The measured teacher, and students whose times are not bound to it, on networks whose exact samples are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tunings import LEAST, SOME, Counting, mixture, problem

import olss_fast
from olss_fast import NoiseSchedule, solvers
from olss_fast.errors import NetworkError
from olss_fast.metrics import rmse
from olss_fast.network import Denoiser
from olss_fast.tuning import judge
from olss_fast.tuning.compare import compare
from olss_fast.tuning.teacher import COUNTS, REACHED, SHARE, counts_for, grid_for, measured_teacher

KINDS = {
    "epsilon": NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "v_prediction": NoiseSchedule.named("linear", prediction_type="v_prediction"),
    "exploding": NoiseSchedule.ve(0.01, 50.0),
}


def asked(schedule: NoiseSchedule, samples: int = 32) -> Denoiser:
    given = {key: value for key, value in problem(samples).items() if key not in ("schedule", "progress")}
    return Denoiser(mixture(schedule), given.pop("noise"), **given)  # type: ignore[arg-type]


def truth(denoiser: Denoiser, schedule: NoiseSchedule) -> torch.Tensor:
    plan = solvers.dpm_solver_pp(schedule, 800, order=3, spacing="karras")
    return olss_fast.executors.reference.run(plan, denoiser.asking(slice(0, denoiser.samples)), denoiser.noise.double())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_teacher_is_as_near_to_the_truth_as_it_says(kind: str) -> None:
    schedule = KINDS[kind]
    denoiser = asked(schedule)
    plan, exact = measured_teacher(denoiser, schedule, 8), truth(denoiser, schedule)
    ask = denoiser.asking(slice(0, denoiser.samples))

    def error(plan: olss_fast.Plan) -> float:
        return float(rmse(olss_fast.executors.reference.run(plan, ask, denoiser.noise.double()), exact).mean())

    told, best = float(plan.metadata["own_error"]), min(error(each) for each in analytic(schedule))
    assert told <= REACHED * SHARE * best * 3  # measured on two samples of these: a factor between them and all
    assert error(plan) < 3 * told
    assert plan.nfe in COUNTS


def analytic(schedule: NoiseSchedule) -> list[olss_fast.Plan]:
    return [solvers.dpm_solver_pp(schedule, 8, order=2, spacing=each) for each in ("karras", "logsnr", "trailing")]


@pytest.mark.slow
def test_students_of_a_measured_teacher_are_nearer_to_the_truth() -> None:
    """Than those of DDIM in 100 steps, at 8 evaluations on fresh noise; and their times are not the teacher's."""
    given = problem(48) | {"steps": 8, "effort": SOME}
    fresh, errors = asked(KINDS["epsilon"]), []
    with torch.no_grad():
        exact = truth(fresh, KINDS["epsilon"])
        for teacher in (None, 100):
            result = olss_fast.tune(mixture(), **given, teacher_steps=teacher)  # type: ignore[arg-type]
            made = olss_fast.executors.reference.run(
                result.plans[8], fresh.asking(slice(0, fresh.samples)), fresh.noise.double()
            )
            errors.append(float(rmse(made, exact).mean()))
    assert errors[0] < 0.8 * errors[1]


def test_the_report_says_the_teachers_own_error() -> None:
    report = compare(mixture(), **problem(24), steps=[3])  # type: ignore[arg-type]
    assert report.own_error is not None
    assert f"(its own error {report.own_error:.4f})" in " ".join(report.solver_table().split())
    assert olss_fast.Report.from_dict(report.to_dict()).own_error == report.own_error
    assert report.near_teacher == []
    facts = {**report.teacher.metadata, "own_error": repr(report.best(3).mean / 2)}
    assert replace(report, teacher=report.teacher.replace(metadata=facts)).near_teacher == [3]
    assert compare(mixture(), **problem(), steps=[3], teacher_steps=20).own_error is None  # type: ignore[arg-type]


def test_a_kept_teacher_is_not_measured_again(tmp_path: Path) -> None:
    given = problem() | {"steps": 3, "effort": LEAST, "store": tmp_path}
    first = olss_fast.tune(mixture(), **given)  # type: ignore[arg-type]
    network = Counting(mixture())
    again = olss_fast.tune(network.network, **given)  # type: ignore[arg-type]
    assert again.report.teacher == first.report.teacher
    assert again.report.evaluations["record"] < 3 * 4 + 1  # the probe of the store: three questions, four samples
    assert np.array_equal(again.plans[3].rows, first.plans[3].rows)


def test_grids() -> None:
    schedule = KINDS["epsilon"]
    heun, even = solvers.heun(schedule, 21), solvers.ddim(schedule, 30)
    assert grid_for(None, schedule).nfe == 100
    assert grid_for(even, schedule) is even
    assert grid_for(heun, schedule) is heun  # asks some times twice
    uneven = solvers.unipc(schedule, 30, spacing="logsnr")
    assert np.array_equal(grid_for(uneven, schedule).timesteps, schedule.timesteps(100))
    louder = solvers.unipc(schedule, 30, spacing="logsnr", start=1.25)
    assert grid_for(louder, schedule).rows[0, 0] == louder.rows[0, 0]  # students begin as their teacher does
    few = NoiseSchedule.named("linear", num_train_timesteps=30, beta_start=0.01, beta_end=0.3)
    assert grid_for(None, few).nfe == 25


def test_what_cannot_be_measured_is_named() -> None:
    broken = Denoiser(lambda x, timestep: x * torch.inf, torch.randn(16, 4))
    with pytest.raises(NetworkError, match="no solver's sample is finite"):
        measured_teacher(broken, KINDS["epsilon"], 4)


@pytest.mark.parametrize(
    ("timesteps", "most", "teacher"), [(2, 2, 2), (10, 10, 10), (300, 300, None), (1000, 400, None)]
)
def test_few_whole_timesteps_are_all_asked_or_share_the_steps(timesteps: int, most: int, teacher: int | None) -> None:
    betas = np.linspace(2.0, 9.0, timesteps) / timesteps if timesteps > 20 else np.linspace(0.3, 0.8, timesteps)
    schedule = NoiseSchedule.from_betas(betas, whole_times=True)
    counts = counts_for(schedule)
    assert counts[-1] == most
    with torch.no_grad():
        plan = measured_teacher(asked(schedule), schedule, min(8, timesteps))
    assert plan.nfe in ([teacher] if teacher else counts[:-1])
    assert np.array_equal(plan.timesteps, np.round(plan.timesteps))
    assert not teacher or plan.metadata["own_error"] == "0.0"  # the truth is all there is


def test_where_every_student_is_exact_the_teacher_is_short() -> None:
    """No error is a tenth of nothing: 200 steps were taken, with an error of 5e-13."""
    zero = Denoiser(lambda x, timestep: 0.0 * x, torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert measured_teacher(zero, KINDS["epsilon"], 4).nfe == COUNTS[0]


def test_one_timestep_that_fails_does_not_condemn_the_others() -> None:
    exact, schedule = mixture(KINDS["epsilon"]), KINDS["epsilon"]

    def fails_at_the_end(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return exact(x, timestep) / (timestep > 0.5).to(x).view(-1, 1, 1, 1)

    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plan = measured_teacher(Denoiser(fails_at_the_end, noise), schedule, 4)
    assert plan.metadata["spacing"] == "trailing"


def test_other_steps_resume_with_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps have a teacher measured for them, fewer take the one that there is; fits of either are kept."""

    def tuned(*steps: int) -> olss_fast.Report:
        given = problem() | {"steps": steps, "effort": LEAST, "store": tmp_path}
        return olss_fast.tune(mixture(), **given).report  # type: ignore[arg-type]

    few, more = tuned(2), tuned(2, 4)
    assert (more.own_error or 1.0) <= (few.own_error or 0.0)
    assert len(list(tmp_path.glob("teacher-*"))) == 2
    between = tuned(3)
    assert between.teacher == more.teacher
    assert between.evaluations["record"] == 3 * 4  # the probe of the store: three questions, four samples
    assert tuned(2).teacher == few.teacher
    assert len(list(tmp_path.glob("manifest*"))) == 1
    (damaged,) = tmp_path.glob("teacher-004*")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    measured: list[int] = []
    monkeypatch.setattr(judge, "measured_teacher", lambda *how: measured.append(how[-1]) or measured_teacher(*how))
    tuned(3)
    assert measured == [4]  # what its name says


def test_a_run_killed_while_the_teacher_was_measured_starts_again(tmp_path: Path) -> None:
    given = problem(24) | {"steps": 3, "effort": LEAST}
    network = Counting(mixture())
    network.left = 200
    with pytest.raises(KeyboardInterrupt):
        olss_fast.tune(network, **given, store=tmp_path)  # type: ignore[arg-type]
    network.left = 10**9
    resumed = olss_fast.tune(network, **given, store=tmp_path)  # type: ignore[arg-type]
    assert resumed.plans == olss_fast.tune(mixture(), **given).plans  # type: ignore[arg-type]
