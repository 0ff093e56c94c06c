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
from olss_fast.errors import NetworkError, ScheduleError
from olss_fast.metrics import rmse
from olss_fast.network import Denoiser
from olss_fast.tuning.compare import compare
from olss_fast.tuning.teacher import COUNTS, REACHED, SHARE, grid_for, measured_teacher

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
    few = NoiseSchedule.named("linear", num_train_timesteps=30, beta_start=0.01, beta_end=0.3)
    assert grid_for(None, few).nfe == 25


def test_what_cannot_be_measured_is_named() -> None:
    few = NoiseSchedule.named("linear", num_train_timesteps=300, beta_end=0.07, whole_times=True)
    with pytest.raises(ScheduleError, match=r"300 timesteps.*fewer than 400 timesteps. Give teacher_steps"):
        measured_teacher(asked(few), few, 4)
    broken = Denoiser(lambda x, timestep: x * torch.inf, torch.randn(16, 4))
    with pytest.raises(NetworkError, match="no solver's sample is finite"):
        measured_teacher(broken, KINDS["epsilon"], 4)
