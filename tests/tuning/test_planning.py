"""Path planning against a NumPy twin, brute force over all paths, and trajectories whose answer is known."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_twin import Array, Problem, Twin, dense, dependent, mixture, smooth

from olss_fast.errors import InputError
from olss_fast.tuning import path_planning

Family = Callable[[int, int], Problem]
FAMILIES = [mixture, smooth, dense, dependent]


def planned(problem: Problem, steps: int, **options: int) -> path_planning.PathPlan:
    r, rows, count = problem
    return path_planning.plan_path(r, rows, steps, samples_count=count, **options)


def all_paths(end: int, steps: int) -> Iterator[tuple[int, ...]]:
    for size in range(steps):
        for rest in itertools.combinations(range(1, end), size):
            yield (0, *rest)


# --- the same path and threshold as the definitions give --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(50))
def test_equals_the_twin(family: Family, seed: int) -> None:
    rng = np.random.default_rng(seed)
    end = int(rng.integers(1, 25))
    steps = int(rng.integers(1, min(end, 8) + 1))
    problem = family(end, seed)
    twin = Twin(*problem)
    threshold, path = twin.least_threshold(steps)
    plan = planned(problem, steps)
    assert plan.path == path
    assert plan.threshold == pytest.approx(threshold, rel=1e-12, abs=0)
    assert plan.proven
    assert plan.stride_errors == pytest.approx(twin.stride_errors(path), rel=1e-9, abs=1e-14)
    assert plan.deployed_error == pytest.approx(twin.deployed_error(path), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("family", [mixture, smooth])
@pytest.mark.parametrize("seed", range(8))
def test_without_proof_the_threshold_is_feasible_and_the_next_below_is_not(family: Family, seed: int) -> None:
    problem = family(40, seed)
    plan = planned(problem, 7, proof_visits=0)
    assert not plan.proven
    proven = planned(problem, 7)
    assert proven.proven
    assert (plan.path, plan.threshold) == (proven.path, proven.threshold)


def test_a_proof_finds_a_smaller_threshold_where_feasibility_is_not_monotone() -> None:
    found = 0
    for seed in range(60):
        problem = dense(8, seed)
        searched, proven = planned(problem, 5, proof_visits=0), planned(problem, 5)
        assert searched.threshold is not None
        assert proven.threshold is not None
        assert proven.threshold <= searched.threshold
        found += proven.threshold < searched.threshold
    assert found > 0


def test_a_proof_that_runs_out_of_visits_says_so() -> None:
    assert not planned(mixture(100, 0), 10, proof_visits=3).proven


# --- brute force ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_threshold_is_the_least_at_which_greedy_strides_arrive(family: Family, seed: int) -> None:
    end, steps = 7, 2 + seed % 4
    problem = family(end, seed)
    twin = Twin(*problem)
    compared = {0.0} | {float(error) for path in all_paths(end, end) for error in twin.errors(path)}
    feasible = [threshold for threshold in compared if twin.greedy(steps, threshold)[0] is not None]
    plan = planned(problem, steps)
    assert plan.threshold == pytest.approx(min(feasible), rel=1e-12, abs=0)
    # Greedy strides cannot beat the best of all paths, whose worst stride this is.
    assert plan.threshold >= min(max(twin.stride_errors(path)) for path in all_paths(end, steps)) * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_threshold_is_the_optimum_where_farther_prefixes_are_better(seed: int) -> None:
    """A random walk x_{j+1} = x_j + a_j f_j of orthogonal steps: err² of a stride is the sum of a_i² it did not see."""
    rng = np.random.default_rng(seed)
    end = int(rng.integers(6, 30))
    steps = int(rng.integers(1, 6))
    lengths = rng.uniform(0.1, 2.0, end)
    rows = np.tril(np.ones((end + 1, end + 1)))
    rows[:, 1:] *= lengths
    unseen = np.concatenate([[0.0], np.cumsum(lengths**2)])  # err²(s → j) = unseen[j] - unseen[s + 1]
    least = np.full((steps + 1, end + 1), np.inf)
    least[0, 0] = 0
    for k, j in itertools.product(range(1, steps + 1), range(1, end + 1)):
        worst = (max(least[k - 1, s], max(unseen[j] - unseen[s + 1], 0.0)) for s in range(j))
        least[k, j] = min(worst)
    plan = path_planning.plan_path(3.0 * np.eye(end + 1), rows, steps, samples_count=4)
    assert plan.threshold == pytest.approx(1.5 * np.sqrt(least[:, end].min()), rel=1e-12)
    assert plan.max_stride_error <= plan.threshold


# --- easy, short and degenerate trajectories --------------------------------------------------------------------------


def test_paths_that_arrive_early_are_lengthened() -> None:
    """Data that is one Gaussian: all outputs and states are multiples of the noise, and any path is exact."""
    r, rows, count = smooth(60, 0)
    r[:, 1:] = r[:, :1] * np.linspace(1, 0.1, 60)
    plan = path_planning.plan_path(r, rows, 8, samples_count=count)
    assert plan.threshold == 0
    assert plan.max_stride_error == 0
    strides = np.diff([*plan.path, 60])
    assert len(plan.path) == 8
    assert strides.max() <= 2 * strides.min() + 1


def test_short_paths_with_an_error_are_lengthened_too() -> None:
    short = 0
    for seed in range(12):
        r, rows, count = dense(12, seed)
        twin = Twin(r, rows, count)
        threshold, path = twin.least_threshold(5)
        greedy, _ = twin.greedy(5, threshold)
        assert greedy is not None
        short += threshold > 0 and len(greedy) < 5
        assert planned((r, rows, count), 5).path == path
    assert short > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", [1, 2, 3, 4, 15, 16, 17])
def test_one_step_and_every_step(family: Family, end: int) -> None:
    problem = family(end, end)
    twin = Twin(*problem)
    one = planned(problem, 1)
    assert one.path == (0,)
    assert one.threshold == pytest.approx(twin.errors((0,))[-1], rel=1e-12, abs=0)
    assert planned(problem, end).path == tuple(range(end))


def test_collinear_outputs_add_nothing() -> None:
    r, rows, count = smooth(30, 3)
    r[:, 11:] = r[:, 10:11] * np.linspace(1, 2, 20)
    plan = path_planning.plan_path(r, rows, 6, samples_count=count)
    assert np.isfinite(plan.stride_errors).all()
    assert plan.threshold == pytest.approx(Twin(r, rows, count).least_threshold(6)[0], rel=1e-12)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e30])
def test_errors_scale_with_the_trajectory(factor: float) -> None:
    r, rows, _ = mixture(30, 1)
    plan, scaled = path_planning.plan_path(r, rows, 5), path_planning.plan_path(factor * r, rows, 5)
    assert scaled.path == plan.path
    assert scaled.stride_errors == pytest.approx([factor * error for error in plan.stride_errors], rel=1e-9)


def test_errors_are_root_mean_squares() -> None:
    r, rows, count = smooth(20, 0)
    lengths, means = path_planning.plan_path(r, rows, 4), path_planning.plan_path(r, rows, 4, samples_count=count)
    assert means.path == lengths.path
    for name in ("threshold", "max_stride_error", "deployed_error"):
        assert getattr(means, name) == pytest.approx(getattr(lengths, name) / np.sqrt(count), rel=1e-14)


@given(st.integers(1, 20), st.integers(0, 10_000), st.sampled_from(FAMILIES), st.data())
@settings(max_examples=40, deadline=None)
def test_every_plan_is_a_path_within_its_threshold(end: int, seed: int, family: Family, data: st.DataObject) -> None:
    problem = family(end, seed)
    steps = data.draw(st.integers(1, end))
    plan = planned(problem, steps)
    assert len(plan.path) == steps
    assert plan.path[0] == 0
    assert all(a < b for a, b in itertools.pairwise((*plan.path, end)))
    path, _ = Twin(*problem).greedy(steps, (plan.threshold or 0.0) * (1 + 1e-12))
    assert path is not None


# --- refinement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_refined_paths_are_better_and_within_the_bound(family: Family, seed: int) -> None:
    problem = family(40, seed)
    r, rows, count = problem
    plan = planned(problem, 6)
    found = path_planning.refine_all(r, rows, plan.path, samples_count=count, slack=1.5)
    deployed = [each.deployed_error for each in found]
    assert deployed == sorted(deployed)
    assert len({each.path for each in found}) == len(found) <= 4
    assert deployed[0] <= plan.deployed_error
    for each in found:
        assert each.max_stride_error <= 1.5 * plan.max_stride_error * (1 + 1e-12)
        assert each == path_planning.measure_path(r, rows, each.path, samples_count=count)
    assert path_planning.refine_all(r, rows, plan.path, samples_count=count, slack=1.5, keep=1) == found[:1]


@pytest.mark.parametrize("seed", range(4))
def test_no_move_of_one_node_improves_a_refined_path(seed: int) -> None:
    r, rows, count = mixture(30, seed)
    start = path_planning.plan_path(r, rows, 5, samples_count=count)
    path = path_planning.refine_all(r, rows, start.path, samples_count=count, slack=2.0, beam=0)[0]
    twin = Twin(r, rows, count)
    for k in range(1, 5):
        for node in range(path.path[k - 1] + 1, (*path.path, 30)[k + 1]):
            moved = (*path.path[:k], node, *path.path[k + 1 :])
            within = max(twin.stride_errors(moved)) <= 2.0 * start.max_stride_error
            assert not within or twin.deployed_error(moved) >= path.deployed_error * (1 - 1e-6)


def test_a_beam_finds_at_least_what_moves_find() -> None:
    gains = []
    for seed in range(6):
        r, rows, count = mixture(60, seed)
        start = path_planning.plan_path(r, rows, 7, samples_count=count).path
        alone, beam = (path_planning.refine_all(r, rows, start, samples_count=count, beam=width)[0] for width in (0, 8))
        gains.append(beam.deployed_error / alone.deployed_error)
    assert max(gains) <= 1
    assert min(gains) < 1


def test_deployed_error_is_the_least_squares_error_of_the_sample() -> None:
    r, rows, count = smooth(25, 2)
    plan = path_planning.measure_path(r, rows, (0, 4, 9, 20), samples_count=count)
    assert plan.deployed_error == pytest.approx(Twin(r, rows, count).deployed_error((0, 4, 9, 20)), rel=1e-12)
    assert plan.threshold is None


def test_uniform_path() -> None:
    assert path_planning.uniform_path(100, 5) == (0, 20, 40, 60, 80)
    assert path_planning.uniform_path(10, 4) == (0, 2, 5, 7)
    assert path_planning.uniform_path(7, 7) == tuple(range(7))


# --- the interface ----------------------------------------------------------------------------------------------------


def test_planning_leaves_the_interpreter_to_others() -> None:
    r, rows, _ = smooth(400, 0)
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.0005):  # to go on after it, the thread needs the interpreter's lock
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    path_planning._C.improve(
        r, rows, list(path_planning.uniform_path(400, 20)), np.inf, 8, 1
    )  # a good part of a second
    during = ticks - before
    done.set()
    thread.join()
    assert during > 10


def test_any_layout_of_numbers_is_accepted() -> None:
    r, rows, _ = smooth(12, 0)
    expected = path_planning.plan_path(r, rows, 4)
    wide = np.zeros((26, 26))
    wide[::2, ::2] = r
    for variant in (np.asfortranarray(r), r.tolist(), wide[::2, ::2]):
        assert path_planning.plan_path(variant, rows, 4) == expected
    assert path_planning.plan_path(r.astype(np.float32), rows.astype(np.float32), 4).path == expected.path


def test_arguments_are_not_written_to() -> None:
    r, rows, _ = smooth(12, 0)
    r.flags.writeable = rows.flags.writeable = False
    path_planning.refine_all(r, rows, path_planning.plan_path(r, rows, 4).path)


def with_value(array: Array, index: tuple[int, int], value: float) -> Array:
    changed = array.copy()
    changed[index] = value
    return changed


R, ROWS, _ = smooth(6, 0)


@pytest.mark.parametrize(
    ("r", "rows", "steps", "message"),
    [
        (R[:, :-1], ROWS, 3, r"r has shape \(7, 6\), expected \(T\+1, T\+1\)"),
        (R, ROWS[:5, :5], 3, r"r has shape \(7, 7\) and rows \(5, 5\)"),
        (R[:1, :1], ROWS[:1, :1], 1, r"r has shape \(1, 1\)"),
        (R[None], ROWS, 3, "r has shape"),
        ([["a", "b"], ["c", "d"]], ROWS, 3, "r is not an array of numbers"),
        (with_value(R, (1, 2), np.nan), ROWS, 3, r"r\[1, 2\] is nan, expected finite"),
        (R, with_value(ROWS, (3, 0), np.inf), 3, r"rows\[3, 0\] is inf"),
        (with_value(R, (0, 0), 1e200), ROWS, 3, r"r has values up to 1e\+200"),
        (with_value(R, (4, 1), 1.0), ROWS, 3, r"r has values below its diagonal.*numpy.triu"),
        (R, with_value(ROWS, (2, 3), 0.5), 3, r"rows\[2, 3\] is 0.5, expected 0: state 2 cannot use output 2"),
        (R, ROWS, 0, "steps is 0; expected a whole number of at least 1"),
        (R, ROWS, 7, "steps is 7, expected at most 6"),
        (R, ROWS, 2.5, "steps is 2.5; expected a whole number"),
        (R, ROWS, True, "steps is True; expected a whole number"),
    ],
)
def test_unusable_input_is_named(r: Array, rows: Array, steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        path_planning.plan_path(r, rows, steps)


@pytest.mark.parametrize("path", [(), (1, 2), (0, 0), (0, 3, 2), (0, 6), (0, -1), (0, 1.5)])
def test_unusable_paths_are_named(path: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="path"):
        path_planning.measure_path(R, ROWS, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slack": 0.5}, "slack is 0.5, expected at least 1"),
        ({"slack": float("nan")}, "slack is nan"),
        ({"beam": -1}, "beam is -1"),
        ({"keep": 0}, "keep is 0"),
        ({"samples_count": 0}, "samples_count is 0"),
    ],
)
def test_unusable_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        path_planning.refine_all(R, ROWS, (0, 2), **options)  # type: ignore[arg-type]
