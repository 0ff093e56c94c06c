"""Recording, fitting, path search, polish and scoring, each against a plain computation of the same thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import olss_fast
from olss_fast import solvers
from olss_fast.network import Denoiser
from olss_fast.testing import NULL_CLASS, ExactMixture
from olss_fast.tuning.fitting import (
    Student,
    Task,
    analytic_student,
    huber,
    on_policy,
    ridge_solve,
    roll,
    teacher_forced,
)
from olss_fast.tuning.path_search import PathSearch, bent_paths
from olss_fast.tuning.polish import Direction, Objective, _difference, _directions, evaluations_of_jacobian, polish
from olss_fast.tuning.recording import Split, merge_triangles, record, triangle
from olss_fast.tuning.scoring import score, tournament
from olss_fast.tuning.store import Store
from olss_fast.tuning.teacher import Teacher

SHAPE = (2, 3, 3)
SAMPLES = 24
SCHEDULE = olss_fast.NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
TEACHER = solvers.ddim(SCHEDULE, 20)
PATH = (0, 6, 13)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn((4, *SHAPE), generator=generator)
    noise = torch.randn((SAMPLES, *SHAPE), generator=generator, dtype=torch.float64)
    denoiser = Denoiser(
        ExactMixture(SCHEDULE, means, 0.2),
        noise,
        conditioning={"y": torch.arange(SAMPLES) % 4},
        unconditional={"y": NULL_CLASS},
        guidance_scale=1.5,
    )
    split = Split.of(SAMPLES, validation=5, held_out=7)
    store = Store(tmp_path_factory.mktemp("store"))
    recording = record(Teacher(TEACHER, TEACHER), denoiser, SCHEDULE, store=store, split=split, batch_size=5)
    return Task(recording, denoiser, SCHEDULE)


def teacher_basis(task: Task, samples: range) -> torch.Tensor:
    """[x_T | f_0 .. f_{T-1}] of `samples`, by asking the network step by step."""
    chunk = slice(samples.start, samples.stop)
    basis = [task.noise[chunk]]
    for i in range(TEACHER.nfe):
        x = sum(w * column for w, column in zip(TEACHER.rows[i], basis, strict=False))
        basis.append(task.denoiser.asking(chunk)(x, float(TEACHER.timesteps[i]))[0])
    return torch.stack(basis)


def test_streaming_triangle_is_that_of_all_samples(task: Task) -> None:
    fit = task.recording.split.fit
    tall = teacher_basis(task, fit).flatten(1).T.numpy()
    # the store keeps outputs in float32, hence 1e-6 of the columns' length
    np.testing.assert_allclose(task.recording.r.T @ task.recording.r, tall.T @ tall, atol=1e-6 * len(tall))
    assert task.recording.pixels == len(tall)


def test_triangles_merge_in_any_grouping() -> None:
    parts = [torch.randn((4, 3, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole = triangle(torch.cat(parts, dim=1))
    pairs = merge_triangles([merge_triangles([triangle(parts[0]), triangle(parts[1])]), triangle(parts[2])])
    np.testing.assert_allclose(pairs, whole, atol=1e-12)
    few_rows = triangle(torch.randn((4, 1, 2)))
    assert few_rows.shape == (4, 4)
    assert not few_rows[2:].any()


def test_states_and_results_are_the_teachers(task: Task) -> None:
    basis = teacher_basis(task, task.recording.split.fit)
    for chunk in task.recording.chunks(range(3, 9)):  # crosses the border of two recorded chunks
        for index in (0, 7, TEACHER.nfe):
            row = torch.tensor(TEACHER.rows[index])
            expected = torch.tensordot(row, basis[:, chunk], 1)
            torch.testing.assert_close(task.recording.state(chunk, index), expected, rtol=0, atol=2e-6)


def test_ridge_solve_is_the_regularised_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    a, y, prior, ridge = rng.normal(size=(50, 3)) * [1, 5, 0.1], rng.normal(size=50), rng.normal(size=3), 0.3
    r = np.linalg.qr(np.column_stack([a, y]), mode="r")
    w = ridge_solve(r, ridge, prior)
    gradient = a.T @ (a @ w - y) + ridge * (a**2).sum(0) * (w - prior)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-10)
    np.testing.assert_allclose(ridge_solve(r, 1e12, prior), prior, atol=1e-9)


def test_teacher_forced_rows_are_least_squares_on_the_teachers_tensors(task: Task) -> None:
    basis = teacher_basis(task, task.recording.split.fit).flatten(1).numpy()
    student = teacher_forced(task, PATH, 1e-12)
    columns = basis[[0, *(1 + s for s in PATH)]]
    for k, target in enumerate([*PATH[1:], TEACHER.nfe]):
        y = TEACHER.rows[target] @ basis
        expected = np.linalg.lstsq(columns[: k + 2].T, y, rcond=None)[0]
        np.testing.assert_allclose(student.rows[k + 1, : k + 2], expected, atol=1e-4)  # outputs stored in float32


def test_on_policy_rows_are_least_squares_on_the_students_own_rollout(task: Task) -> None:
    fit = task.recording.split.fit
    basis = teacher_basis(task, fit)
    student = on_policy(task, PATH, 1e-12)
    own = task.rollout(student, slice(fit.start, fit.stop)).columns
    for k, target in enumerate([*PATH[1:], TEACHER.nfe]):
        y = torch.tensordot(torch.tensor(TEACHER.rows[target]), basis, 1).flatten().numpy()
        expected = np.linalg.lstsq(own[: k + 2].flatten(1).T.numpy(), y, rcond=None)[0]
        np.testing.assert_allclose(student.rows[k + 1, : k + 2], expected, atol=1e-4)


def test_on_policy_beats_teacher_forced_on_fresh_noise(task: Task) -> None:
    held_out = task.recording.split.held_out
    errors = [
        roll(task, student, held_out).errors(student.rows[-1]).mean()
        for student in (on_policy(task, PATH, 1e-6), teacher_forced(task, PATH, 1e-10))
    ]
    assert errors[0] < errors[1]


def test_split_prior_is_the_guided_solver(task: Task) -> None:
    times = TEACHER.timesteps[list(PATH)]
    merged, split = (analytic_student(task.with_branches(b), times) for b in (1, 2))
    plans = [student.plan(SCHEDULE, {}) for student in (merged, split)]
    errors = score(plans, task, task.recording.split.held_out)
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-9)


def test_rollout_errors_are_those_of_the_samples(task: Task) -> None:
    student = on_policy(task, PATH, 1e-6)
    samples = task.recording.split.validation
    expected = score([student.plan(SCHEDULE, {})], task, samples)[0]
    np.testing.assert_allclose(roll(task, student, samples).errors(student.rows[-1]), expected, rtol=1e-6)


def test_best_row_has_no_better_neighbour(task: Task) -> None:
    student = on_policy(task, PATH, 1e-6)
    rollout = roll(task, student, task.recording.split.fit)
    weights = np.linspace(0.5, 2.0, len(rollout.gram))
    row = rollout.best_row(weights, ridge=0.0, prior=student.rows[-1])

    def loss(w: np.ndarray) -> float:
        return float(weights @ rollout.errors(w) ** 2)

    for j in range(len(row)):
        for amount in (1e-3, -1e-3):
            assert loss(row + amount * np.eye(len(row))[j]) > loss(row)


def test_directions_change_the_input_by_one_root_mean_square(task: Task) -> None:
    student = on_policy(task, PATH, 1e-6)
    chunk = task.recording.chunks(task.recording.split.fit)[0]
    columns = task.rollout(student, chunk).columns
    directions = list(_directions(task, student, task.recording.split.fit))
    assert len(directions) == sum(2 + k for k in range(student.nfe))
    for direction in directions:
        if direction.row is not None:
            change = torch.tensordot(torch.tensor(direction.row), columns[: len(direction.row)], 1)
            assert float(change.square().mean()) == pytest.approx(1.0, rel=1e-6)


def test_forward_difference_is_the_derivative(task: Task) -> None:
    student = on_policy(task, PATH, 1e-6)
    chunk = task.recording.chunks(task.recording.split.fit)[0]
    run = task.rollout(student, chunk)
    for direction in (Direction(1, np.array([1.0, 0.0])), Direction(1, None)):
        found = _difference(task, student, direction, run, chunk)
        both = [task.rollout(direction.apply(student, step, task), chunk).x for step in (1e-3, -1e-3)]
        central = (both[0] - both[1]) / 2e-3
        # first-order difference of step 1e-2 against second-order one
        assert float((found - central).norm()) < 0.05 * float(central.norm())


def test_evaluations_of_a_jacobian_are_counted_right(task: Task) -> None:
    student = on_policy(task, PATH, 1e-6)
    chunk = task.recording.chunks(task.recording.split.fit)[0]
    before = task.denoiser.evaluations
    run = task.rollout(student, chunk)
    for k in range(student.nfe):
        for direction in [Direction(k, np.eye(1 + k)[j]) for j in range(1 + k)] + [Direction(k, None)]:
            _difference(task, student, direction, run, chunk)
    asked = task.denoiser.evaluations - before
    assert asked == evaluations_of_jacobian(student.nfe) * (chunk.stop - chunk.start)


@pytest.mark.parametrize("robust", [False, True])
def test_polish_lowers_the_validation_error(task: Task, robust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[Student, float, float]] = []
    solve = Objective.solve
    monkeypatch.setattr(Objective, "solve", lambda self, student: solved.append(solve(self, student)) or solved[-1])
    start = analytic_student(task, TEACHER.timesteps[list(PATH)])
    polished = polish(
        task, start, iterations=3, jacobian_samples=6, ridge=1e-6, robust=robust, rng=np.random.default_rng(0)
    )
    best, _, validation = min(solved, key=lambda each: each[2])
    assert polished is best
    assert validation < 0.7 * solved[0][2]


def test_huber_is_quadratic_then_linear() -> None:
    assert huber(np.array([0.1]), 0.5) == pytest.approx(0.01)
    assert huber(np.array([3.0]), 0.5) == pytest.approx(2.75)
    assert huber(np.array([0.5 + 1e-9]), 0.5) == pytest.approx(huber(np.array([0.5 - 1e-9]), 0.5))


def test_path_search_restarts_where_a_path_changes(task: Task) -> None:
    search = PathSearch(task, 6)
    base = search.trial(PATH)
    before = task.denoiser.evaluations
    moved = search.trial((0, 6, 15), base=base, changed=2)
    assert task.denoiser.evaluations - before == 6 + 5  # one evaluation for each of 6 fit and 5 validation samples
    fresh = search.trial((0, 6, 15))
    np.testing.assert_allclose(moved.rows, fresh.rows, rtol=1e-9, atol=1e-12)
    assert moved.error == pytest.approx(fresh.error, rel=1e-9)


def test_path_search_never_ends_worse_than_it_started(task: Task) -> None:
    search = PathSearch(task, 6)
    starts = list(bent_paths(TEACHER.nfe, 3))
    best = search.best(starts, (3, 1))
    assert search.trial(best).error <= min(search.trial(path).error for path in starts)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_bent_paths_are_paths_and_hold_the_uniform_one(steps: int) -> None:
    paths = list(bent_paths(20, steps))
    assert tuple(20 * k // steps for k in range(steps)) in paths
    for path in paths:
        assert path[0] == 0
        assert path[-1] < 20
        assert np.all(np.diff(path) > 0)


def test_shared_evaluations_are_made_once_and_change_nothing(task: Task) -> None:
    plans = [solvers.ddim(SCHEDULE, 4), solvers.dpm_solver_pp(SCHEDULE, 4, order=2), solvers.ddim(SCHEDULE, 6)]
    held_out = task.recording.split.held_out
    before = task.denoiser.evaluations
    together = score(plans, task, held_out)
    asked = (task.denoiser.evaluations - before) / len(held_out)
    # all start from the same noise and time; DDIM and DPM-Solver++ 2M also share their first step
    assert asked == 1 + 1 + 2 + 2 + 5
    for plan, errors in zip(plans, together, strict=True):
        np.testing.assert_array_equal(errors, score([plan], task, held_out)[0])


def test_diverging_plan_has_infinite_error(task: Task) -> None:
    plan = solvers.ddim(SCHEDULE, 4)
    rows = np.array(plan.rows)
    rows[1:, 1] = 1e308
    assert np.isinf(score([plan.replace(rows=rows)], task, task.recording.split.held_out)[0]).all()


def test_tournament_drops_the_hopeless_and_keeps_the_best(task: Task) -> None:
    plans = [solvers.ddim(SCHEDULE, n) for n in (1, 2, 15)]
    errors = tournament(plans, task, task.recording.split.held_out, keep=[0], first=2)
    assert [len(each) for each in errors] == [7, 2, 7]


def test_student_without_columns_is_counted(task: Task) -> None:
    student = Student(np.zeros((3, 5)), np.array([900.0, 400.0]))
    assert (student.branches, student.known(0), student.known(2)) == (2, 1, 5)


def test_store_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(olss_fast.errors.StoreError, match=r"file"):
        Store(file)
