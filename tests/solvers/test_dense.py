"""Dense output against the closed form: data N(0, s^2), whose trajectory and outputs are known at every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from olss_fast import NoiseSchedule, solvers
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.solvers.dense import dense, is_dense

SCALE = 0.5  # s
SCHEDULES = {
    "epsilon": NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "v_prediction": NoiseSchedule.named("linear", prediction_type="v_prediction"),
    "sample": NoiseSchedule.named("linear", prediction_type="sample"),
    "flow": NoiseSchedule.flow(3.0),
    "edm": NoiseSchedule.edm(),
}


def exact(schedule: NoiseSchedule, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Network inputs and raw outputs (G,) of the trajectory from x_T = 1."""
    (alpha, sigma, _), (first, last, _) = schedule.levels(times), schedule.levels(schedule.first)
    spread, start = np.hypot(alpha * SCALE, sigma), np.hypot(first * SCALE, last)
    state = schedule.start_amplitude(schedule.first) * spread / start
    a, b, _, _ = schedule.prediction_maps(times)
    x0 = alpha * SCALE**2 / spread**2 * state
    return np.asarray(state * schedule.input_scale(times)), np.asarray((x0 - a * state) / b)


def basis(plan: Plan, schedule: NoiseSchedule) -> np.ndarray:
    """[x_T | f_0 ..] (1 + S,) of a run from x_T = 1."""
    columns = np.zeros(plan.columns)
    columns[0] = 1.0
    for i, time in enumerate(plan.timesteps):
        alpha, sigma, _ = schedule.levels(time)
        state = float(plan.rows[i] @ columns) / float(schedule.input_scale(time))
        a, b, _, _ = schedule.prediction_maps(time)
        columns[1 + i] = (alpha * SCALE**2 / np.hypot(alpha * SCALE, sigma) ** 2 * state - a * state) / b
    return columns


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_states_and_outputs_in_between_are_as_good_as_the_run(name: str, spacing: str) -> None:
    """Within a half more; the run's own error is that of its states at its own evaluations."""
    schedule = SCHEDULES[name]
    times = schedule.timesteps(60, "trailing")
    plan = solvers.dpm_solver_pp(schedule, 50, order=3, spacing=spacing)
    rows, columns = dense(plan, schedule, times), basis(plan, schedule)
    own = np.abs(plan.rows[:-1] @ columns - exact(schedule, plan.timesteps)[0]).max()
    inputs, outputs = exact(schedule, times)
    assert np.abs(rows.inputs @ columns - inputs).max() < 1.5 * own
    assert np.abs(rows.outputs @ columns - outputs).max() < 1.5 * own


@pytest.mark.parametrize("name", SCHEDULES)
def test_at_its_own_evaluations_a_run_is_itself(name: str) -> None:
    schedule = SCHEDULES[name]
    plan = solvers.unipc(schedule, 12, order=2, spacing="logsnr")
    rows = dense(plan, schedule, plan.timesteps)
    np.testing.assert_allclose(rows.inputs, plan.rows[:-1], atol=1e-12)
    np.testing.assert_allclose(rows.outputs, np.eye(plan.columns)[1:], atol=1e-12)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "exploding", "edm"])
def test_a_run_is_read_in_another_schedule(name: str) -> None:
    """At equal noise: states in the other's scale, outputs of its prediction type."""
    other = NoiseSchedule.named("linear", prediction_type="sample")
    noisiest = float(np.exp(-other.lam(other.first)))
    theirs = {
        "epsilon": NoiseSchedule.named("linear"),
        "v_prediction": SCHEDULES["v_prediction"],
        "exploding": NoiseSchedule.ve(0.01, noisiest, unit_input=True),
        "edm": NoiseSchedule.edm(0.01, noisiest),
    }[name]
    times = other.timesteps(60, "trailing")
    plan = solvers.dpm_solver_pp(theirs, 50, order=3, spacing="logsnr")
    rows, columns = dense(plan, theirs, times, other), basis(plan, theirs)
    own = np.abs((plan.rows[:-1] @ columns - exact(theirs, plan.timesteps)[0]) / theirs.input_scale(plan.timesteps))
    norm = np.hypot(theirs.alpha(plan.timesteps), theirs.sigma(plan.timesteps))
    inputs, outputs = exact(other, times)
    assert np.abs(rows.inputs @ columns - inputs).max() < 1.5 * (own / norm).max()
    assert np.abs(rows.outputs @ columns - outputs).max() < 1.5 * (own / norm).max()


def test_just_before_an_evaluation_it_meets_it() -> None:
    """Whatever the error of a step of a first-order solver: the state has no jump."""
    schedule = SCHEDULES["flow"]
    plan = solvers.ddim(schedule, 6)
    columns = basis(plan, schedule)
    before = dense(plan, schedule, plan.timesteps[1:] + 1e-6).inputs @ columns
    np.testing.assert_allclose(before, plan.rows[1:-1] @ columns, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda schedule: solvers.heun(schedule, 9),
        lambda schedule: solvers.euler_ancestral(schedule, 9),
        lambda schedule: solvers.ddim(schedule, timesteps=[900.0, 500.0, 20.0]),
        lambda schedule: solvers.ddim(schedule, 9, spacing="leading"),
    ],
)
def test_runs_that_are_not_known_in_between(make: Callable[[NoiseSchedule], Plan]) -> None:
    schedule = SCHEDULES["epsilon"]
    assert not is_dense(make(schedule), schedule)
    with pytest.raises(InputError, match="its run is not known"):
        dense(make(schedule), schedule, [500.0])
