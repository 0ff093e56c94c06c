"""The main job end to end, on an exact class-conditional mixture: its outputs are known, and a run takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_tunings import SCHEDULE, SHAPE, SOME, Counting, mixture, problem

import olss_fast
from olss_fast.errors import InputError, NetworkError
from olss_fast.network import OwnStart
from olss_fast.tuning.compare import compare
from olss_fast.tuning.preparation import split_samples

PROBE = 3  # calls by which a store, or a run without one, makes sure of its network


@pytest.fixture(scope="module")
def result() -> olss_fast.TuneResult:
    return olss_fast.tune(mixture(), **problem(), steps=[3, 5], teacher_steps=40, effort=SOME)  # type: ignore[arg-type]


def test_accepted_plan_is_the_best_of_the_table(result: olss_fast.TuneResult) -> None:
    for n, plan in result.plans.items():
        accepted = [each for each in result.report.candidates if each.nfe == n and each.accepted]
        assert [each.plan for each in accepted] == [plan]
        full = [each for each in result.report.candidates if each.nfe == n and each.samples == result.report.held_out]
        assert accepted[0].mean == min(each.mean for each in full)


def test_olss_beats_every_analytic_solver(result: olss_fast.TuneResult) -> None:
    for n in result.plans:
        assert result.report.best(n, "olss").mean < result.report.best(n, "analytic").mean


def test_on_policy_and_polish_beat_what_they_start_from(result: olss_fast.TuneResult) -> None:
    for n in result.plans:
        kinds = {kind: result.report.best(n, kind).mean for kind in ("olss", "olss-unpolished", "olss-published")}
        assert kinds["olss"] < kinds["olss-unpolished"] < kinds["olss-published"]


def test_hopeless_solvers_were_scored_on_fewer_samples(result: olss_fast.TuneResult) -> None:
    counts = {each.samples for each in result.report.candidates if each.kind == "analytic"}
    assert min(counts) < result.report.held_out == max(counts)


def test_reported_error_is_what_sampling_gives(result: olss_fast.TuneResult) -> None:
    arguments = problem()
    arguments.pop("schedule"), arguments.pop("progress")
    teacher = olss_fast.sample(mixture(), result.report.teacher, **arguments)  # type: ignore[arg-type]
    samples = olss_fast.sample(mixture(), result.plans[3], **arguments)  # type: ignore[arg-type]
    errors = olss_fast.metrics.rmse(samples, teacher)[-result.report.held_out :]
    # the teacher's sample is kept in float32, so errors of order 1e-1 agree to float32's rounding
    np.testing.assert_allclose(errors, result.report.best(3).errors, atol=2e-6)


def test_split_guidance_is_offered_and_judged(result: olss_fast.TuneResult) -> None:
    split = result.report.best(3, "olss-split")
    assert split.plan.branches == 2
    assert split.plan.rows.shape == (4, 7)


def test_same_seed_same_plan_bitwise(result: olss_fast.TuneResult) -> None:
    again = olss_fast.tune(mixture(), **problem(), steps=3, teacher_steps=40, effort=SOME)  # type: ignore[arg-type]
    assert again.plans[3] == result.plans[3]


def test_killed_run_resumes_without_repeating_a_chunk(
    tmp_path: Path, result: olss_fast.TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("olss_fast.tuning.tuning.checked", lambda *_: None)  # what that asks is not counted here
    arguments = {**problem(), "steps": 3, "teacher_steps": 40, "effort": SOME, "batch_size": 10, "store": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        olss_fast.tune(Counting(mixture(), PROBE + 3 * 40 + 7), **arguments)  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("chunk-*"))) == 3
    unbroken = Counting(mixture())
    olss_fast.tune(unbroken, **{**arguments, "store": tmp_path / "other"})  # type: ignore[arg-type]
    resumed = Counting(mixture())
    plans = olss_fast.tune(resumed, **arguments).plans  # type: ignore[arg-type]
    assert unbroken.calls - resumed.calls == 3 * 40
    assert plans[3].nfe == 3
    finished = Counting(mixture())
    assert olss_fast.tune(finished, **arguments).plans == plans  # type: ignore[arg-type]
    assert finished.calls == PROBE  # recording, fits and their acceptance are kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "between 1 and the 10 times"),
        ({"steps": 11}, "between 1 and the 10 times"),
        ({"steps": []}, "whole number"),
        ({"steps": 2.5}, "whole number"),
        ({"teacher_steps": 0}, "teacher_steps"),
        ({"noise": torch.zeros(2, *SHAPE)}, "too few"),
        ({"noise": torch.zeros(8, *SHAPE).index_fill(0, torch.tensor([3]), torch.nan)}, r"\[3\]"),
        ({"noise": torch.zeros(8, *SHAPE).long()}, "floating-point"),
        ({"noise": np.zeros((8, *SHAPE))}, "ndarray"),
        ({"unconditional": None}, "unconditional"),
        ({"unconditional": {"z": 0}}, "same"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"teacher": olss_fast.solvers.ddim(SCHEDULE, 10, eta=1.0)}, "deterministic"),
        (
            {
                "schedule": olss_fast.NoiseSchedule.named("linear", prediction_type="v_prediction"),
                "teacher": olss_fast.solvers.ddim(SCHEDULE, 10),
            },
            "v_prediction",
        ),
    ],
)
def test_unusable_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        olss_fast.tune(mixture(), **{**problem(), "steps": 2, "teacher_steps": 10, **change})  # type: ignore[arg-type]


def test_network_that_goes_wrong_is_named_with_step_and_sample() -> None:
    def broken(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        if float(timestep[0]) < 500:
            output[min(5, len(output) - 1)] = torch.nan
        return output

    arguments = {**problem(), "guidance_scale": 1.0, "steps": [2], "teacher_steps": 10}
    with pytest.raises(NetworkError, match=r"evaluation 5 for sample\(s\) \[5\]"):
        compare(broken, **arguments)  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match=r"evaluation 3 for sample\(s\) \[5\]"):  # of the short run before all else
        olss_fast.tune(broken, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [2, 4])
def test_exact_fits_end_well(steps: int) -> None:
    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.7 * x)

    noise = problem(12)["noise"]
    how = {"noise": noise, "schedule": SCHEDULE, "steps": steps, "teacher_steps": steps, "progress": False}
    report = olss_fast.tune(network, **how).report  # type: ignore[arg-type]
    assert report.best(steps).mean < 1e-5  # the student is the teacher, to the rounding of float32


def test_network_that_fails_after_the_recording_is_named() -> None:
    calls = Counting(mixture())
    recording = PROBE + 3 * 10  # fit, validation and held-out samples through the teacher

    def dying(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return calls(x, timestep, y=y) * (torch.nan if calls.calls > recording else 1.0)

    how = {"guidance_scale": 1.0, "steps": 3, "teacher_steps": 10, "effort": SOME, "batch_size": 64}
    with pytest.raises(NetworkError, match="NaN or infinity"):
        olss_fast.tune(dying, **{**problem(), **how})  # type: ignore[arg-type]


TEACHER = {"teacher": olss_fast.solvers.ddim(SCHEDULE, 10)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"seed": None}, "seed is None"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5"),
        ({"held_out": 0}, "held_out is 0"),
        ({"held_out": 2.5}, r"held_out is 2\.5; expected a whole number"),
        ({"teacher_steps": "10"}, "teacher_steps is '10'; expected a whole number"),
        ({"teacher_steps": 10.5}, r"teacher_steps is 10\.5"),
        ({"teacher_steps": 20_000}, "teacher_steps is 20000; .* at most 2000"),
        ({"teacher": "x"}, "teacher is a str 'x'; expected a Plan"),
        ({"teacher": 0}, "teacher is a int 0; expected a Plan"),
        ({"schedule": None}, "schedule is None; expected a NoiseSchedule"),
        ({"schedule": TEACHER["teacher"]}, "schedule is a Plan .*; expected a NoiseSchedule"),
        ({"schedule": None, **TEACHER}, "schedule is None; expected a NoiseSchedule"),
        ({"rivals": ["x"]}, r"rivals\[0\] is a str 'x'; expected a Plan"),
        ({"rivals": None}, "rivals is None; expected a list of Plans"),
        ({"rivals": TEACHER["teacher"]}, "rivals is a Plan .*; expected a list of Plans"),
        ({"steps": "2"}, "steps must be a whole number or a list of them, got '2'"),
        ({"steps": [2, None]}, "steps must be a whole number"),
    ],
)
def test_arguments_are_checked_before_any_work(change: dict[str, object], message: str) -> None:
    network = Counting(mixture(), 0)
    with pytest.raises(InputError, match=message):
        olss_fast.tune(network, **{**problem(), "steps": 2, **change})  # type: ignore[arg-type]
    if {*change} <= {"schedule", "steps", "teacher_steps", "batch_size"}:
        with pytest.raises(InputError):
            compare(network, **{**problem(), "steps": [2], **change})  # type: ignore[arg-type]


def test_plans_to_compare_are_plans() -> None:
    for plans, message in ((["x"], r"plans\[0\] is a str"), (TEACHER["teacher"], "expected a list of Plans")):
        with pytest.raises(InputError, match=message):
            compare(Counting(mixture(), 0), **problem(), steps=[2], plans=plans)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"steps holds 3000; .* at most 2000"):
        compare(Counting(mixture(), 0), **problem(), steps=[3000])  # type: ignore[arg-type]


@pytest.mark.parametrize("held_out", [None, 1, 40])
@pytest.mark.parametrize("steps", [2, 20])
def test_too_little_noise_is_told_how_much_would_do(steps: int, held_out: int | None) -> None:
    with pytest.raises(InputError, match=r"Give more noise: \d+ samples in all") as caught:
        split_samples(torch.zeros(3, 4), [steps], held_out)
    enough = int(str(caught.value).rsplit(":", 1)[1].split()[0])
    assert len(split_samples(torch.zeros(enough, 4), [steps], held_out).fit) > 0
    with pytest.raises(InputError):
        split_samples(torch.zeros(enough - 1, 4), [steps], held_out)


def test_rows_of_conditioning_for_other_noises_are_named_before_the_work() -> None:
    network = Counting(mixture(), 1)
    labels = {"conditioning": {"y": torch.arange(32) % 6}, "unconditional": None, "guidance_scale": 1.0}
    with pytest.raises(NetworkError, match="y has 32 rows; expected 64"):
        olss_fast.tune(network, **{**problem(64), **labels}, steps=2, teacher_steps=10, batch_size=32)  # type: ignore[arg-type]


def test_a_network_has_a_say_in_how_runs_begin() -> None:
    class Other(Counting):  # whose attributes happen to have these names
        admits, fixed_start = None, "yes"

    class Picky(OwnStart, Counting):
        __call__ = Counting.__call__

        def admits(self, plan: olss_fast.Plan) -> bool:
            return plan.timesteps[0] > 900.0

    early, late = (olss_fast.solvers.ddim(SCHEDULE, timesteps=[first, 400.0, 90.0]) for first in (950.0, 850.0))
    report = compare(Picky(mixture()), **problem(), steps=[3], teacher_steps=10, rivals=[early, late])  # type: ignore[arg-type]
    plans = [each.plan for each in report.candidates]
    assert early in plans
    assert min(plan.timesteps[0] for plan in plans) == 950.0
    every = len(olss_fast.solvers.candidates(SCHEDULE, 3))
    assert len(plans) < every
    assert len(compare(Other(mixture()), **problem(), steps=[3], teacher_steps=10).candidates) == every  # type: ignore[arg-type]
