"""Analytic solvers: orders of convergence, exact invariants, explicit times, candidates and names, bad input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from olss_fast import solvers
from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import SPACINGS, NoiseSchedule
from olss_fast.solvers.exponential import Space, fit_weights, lagrange_rule, midpoint_rule, moments
from olss_fast.solvers.tape import Tape, levels_of
from olss_fast.solvers.unipc import predict_and_correct

SD = {"beta_start": 0.00085, "beta_end": 0.012}
VP = NoiseSchedule.named("linear")
SCHEDULES = {
    "vp_epsilon": VP,
    "vp_v": NoiseSchedule.named("scaled_linear", **SD, prediction_type="v_prediction"),
    "vp_sample": NoiseSchedule.named("linear", prediction_type="sample"),
    "cosine": NoiseSchedule.named("squaredcos_cap_v2"),
    "zero_snr": NoiseSchedule.named("scaled_linear", **SD, prediction_type="v_prediction", zero_terminal_snr=True),
    "ve": NoiseSchedule.ve(0.01, 100),
    "ve_v": NoiseSchedule.ve(0.002, 700, prediction_type="v_prediction", timestep="quarter_log", unit_input=True),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(shift=3.0),
}


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]


# --- order of convergence on Gaussian data N(0, s^2), where the exact state is known --------------------------------


def states_on_gaussian_data(plan: Plan, schedule: NoiseSchedule, spread: float) -> np.ndarray:
    """(S,) the state at each evaluation when the network is exact for data N(0, spread^2) and x_T = 1."""
    times = plan.timesteps
    alpha, sigma, _ = schedule.levels(times)
    a, b, c, d = schedule.prediction_maps(times)
    variance = (alpha * spread) ** 2 + sigma**2
    basis = np.zeros(plan.columns)
    basis[0] = 1.0
    states = np.zeros(plan.nfe)
    for i in range(plan.nfe):
        x = states[i] = plan.rows[i] @ basis / schedule.input_scale(times)[i]
        x0, eps = alpha[i] * spread**2 / variance[i] * x, sigma[i] / variance[i] * x
        basis[plan.output_slice(i)] = (x0 - a[i] * x) / b[i] if abs(b[i]) > abs(d[i]) else (eps - c[i] * x) / d[i]
    return states


def error_at_the_last_evaluation(
    solver: Callable[..., Plan], settings: dict[str, Any], schedule: NoiseSchedule, nodes: int
) -> float:
    """Relative error of the last network input, on times uniform in log-SNR down to sigma / alpha = 0.4.

    Not of the sample: its last step, on to no noise at all, is of order 1 by convention and has a limit of its own.
    """
    spread = 0.5
    lams = np.linspace(-4.3, 0.9, nodes)
    plan = solver(schedule, timesteps=schedule.timestep_of_lam(lams), **settings)
    alpha, sigma, _ = schedule.levels(plan.timesteps)
    exact = np.sqrt(((alpha * spread) ** 2 + sigma**2) / ((alpha[0] * spread) ** 2 + sigma[0] ** 2))
    states = states_on_gaussian_data(plan, schedule, spread)
    return float(abs(states[-1] / (states[0] * exact[-1]) - 1.0))


ORDERS: list[tuple[Callable[..., Plan], dict[str, Any], int]] = [
    (solvers.ddim, {}, 1),
    (solvers.euler, {}, 1),
    (solvers.heun, {}, 2),
    (solvers.dpm_solver, {"order": 2}, 2),
    (solvers.dpm_solver, {"order": 3}, 3),
    (solvers.dpm_solver, {"order": 3, "variant": "exact"}, 3),
    (solvers.dpm_solver, {"order": 2, "space": "data"}, 2),
    (solvers.dpm_solver, {"order": 3, "space": "data"}, 3),
    (solvers.dpm_solver_pp, {"order": 1}, 1),
    (solvers.dpm_solver_pp, {"order": 2}, 2),
    (solvers.dpm_solver_pp, {"order": 2, "variant": "exact"}, 2),
    (solvers.dpm_solver_pp, {"order": 3}, 2),  # as published: see solvers/dpm_solver_pp.py
    (solvers.dpm_solver_pp, {"order": 3, "variant": "exact"}, 3),
    *((solvers.unipc, {"order": p, "variant": v}, p) for p in (1, 2, 3) for v in ("bh1", "bh2")),
    (solvers.deis, {"order": 1}, 1),
    (solvers.deis, {"order": 2}, 2),
    (solvers.deis, {"order": 3}, 3),
    (solvers.pndm, {}, 2),
    (solvers.pndm, {"runge_kutta": True}, 2),
    (solvers.ipndm, {"order": 1}, 1),
    (solvers.ipndm, {"order": 2}, 2),
    (solvers.ipndm, {"order": 4}, 2),
]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("kind", ["vp_epsilon", "ve", "edm", "flow"])
@pytest.mark.parametrize(("solver", "settings", "order"), ORDERS, ids=name_of)
def test_order_of_convergence(solver: Callable[..., Plan], settings: dict[str, Any], order: int, kind: str) -> None:
    # 6 k + 1 nodes: whole groups for the singlestep solvers of either order.
    counts = np.array([31, 61, 121])
    errors = np.array([error_at_the_last_evaluation(solver, settings, SCHEDULES[kind], n) for n in counts])
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(counts - 1))
    assert slopes[-1] > order - 0.2, f"errors {errors}, slopes {slopes}"
    assert errors[-1] < 0.5


def test_only_the_exact_third_order_of_dpm_solver_pp_counts_curvature_fully() -> None:
    exact = solvers.dpm_solver_pp(VP, timesteps=[900, 700, 500, 300, 100], order=3, variant="exact")
    published = solvers.dpm_solver_pp(VP, timesteps=[900, 700, 500, 300, 100], order=3)
    # First the rows up to the second evaluation agree (order 1), then they part.
    np.testing.assert_array_equal(exact.rows[:2], published.rows[:2])
    assert np.abs(exact.rows[3] - published.rows[3]).max() > 1e-3


# --- exponential integration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", Space)
@pytest.mark.parametrize("h", [1e-6, 0.3, 4.0, 18.0])
def test_moments_equal_the_closed_form(space: Space, h: float) -> None:
    k = space.value
    zeroth = k * -np.expm1(-k * h)
    first = k * (1.0 - zeroth / h)  # by parts
    expected = [zeroth, first]
    tolerance = 1e-12 if h > 0.1 else 1e-9
    np.testing.assert_allclose(moments(h, space, 2), expected, rtol=tolerance, atol=1e-10 * abs(zeroth))


def test_lagrange_weights_integrate_polynomials_exactly() -> None:
    h, ratios = 0.7, [-0.4, -1.1, 1.0]
    weights = lagrange_rule(h, ratios, Space.DATA)
    for power in (1, 2, 3):
        assert weights @ np.power(ratios, power) == pytest.approx(moments(h, Space.DATA, 4)[power], rel=1e-12)
    np.testing.assert_array_equal(midpoint_rule(h, [-0.5], Space.DATA), -moments(h, Space.DATA, 1))


def test_coinciding_nodes_are_flagged_not_raised() -> None:
    assert np.all(np.isinf(fit_weights([-0.5, -0.5], np.array([1.0, 1.0]))))


# --- exact invariants ----------------------------------------------------------------------------------------------


def test_unipc_reference_vector() -> None:
    """UniPC-3 (bh2), 5 steps, sigma geometric from 80 to 0.002: the coefficients of an independent prototype."""
    schedule = NoiseSchedule.ve(0.002, 80.0)
    tape = Tape(schedule, 5, start=80.0)
    sample = predict_and_correct(tape, levels_of(schedule, np.geomspace(80, 0.002, 6)), 3, midpoint_rule)
    np.testing.assert_allclose(sample[1:], [-65.4737, -11.5211, -2.7994, -0.1880, -0.01568], atol=6e-5)
    assert sample[0] == pytest.approx(80.0, rel=1e-14)  # x_T kept once: the state starts at 80 x_T
    assert sample[1:].sum() == pytest.approx(0.002 - 80.0, rel=1e-14)


def test_variance_exploding_epsilon_solvers_keep_x_t_and_sum_to_the_noise_removed() -> None:
    for plan in solvers.candidates(NoiseSchedule.ve(), 7):
        assert plan.rows[-1, 0] == pytest.approx(plan.rows[0, 0], rel=1e-12), solvers.display_name(plan)
        assert plan.rows[-1, 1:].sum() == pytest.approx(-plan.sigmas[0], rel=1e-12)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 8, 13])
def test_point_mass_is_exact(schedule: NoiseSchedule, nfe: int) -> None:
    for plan in solvers.candidates(schedule, nfe):
        # The coefficients themselves are rounded to 2^-53 of their size, which reaches 20,000 on the cosine schedule.
        allowed = max(1e-12, 1e-14 * np.abs(plan.rows).max())
        assert np.abs(plan.point_mass_residual()).max() <= allowed, solvers.display_name(plan)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_fresh_noise_keeps_the_point_mass_levels(schedule: NoiseSchedule, eta: float) -> None:
    for solver in (solvers.ddim, solvers.euler_ancestral):
        plan = solver(schedule, 6, eta=eta)
        assert plan.noises == 5
        assert plan.nfe == 6
        assert np.abs(plan.point_mass_residual()).max() <= max(1e-12, 1e-14 * np.abs(plan.rows).max())
        assert np.all(plan.rows[0, plan.noise_slice] == 0)
        assert np.any(plan.rows[1, plan.noise_slice] != 0)


def test_solvers_that_coincide_give_equal_plans(schedule: NoiseSchedule) -> None:
    reference = solvers.ddim(schedule, 6)
    for plan in (
        solvers.euler(schedule, 6),
        solvers.ddim(schedule, 6, eta=0.0),
        solvers.dpm_solver_pp(schedule, 6, order=1),
        solvers.deis(schedule, 6, order=1),
        solvers.ipndm(schedule, 6, order=1),
    ):
        np.testing.assert_allclose(plan.rows, reference.rows, rtol=1e-9, atol=1e-9)
    assert solvers.euler(schedule, 6) == reference == solvers.deis(schedule, 6, order=1)
    assert solvers.euler_ancestral(schedule, 6) == solvers.ddim(schedule, 6, eta=1.0)


def test_levels_and_first_state(schedule: NoiseSchedule) -> None:
    plan = solvers.ddim(schedule, 5)
    scale = schedule.input_scale(plan.timesteps)
    np.testing.assert_allclose(plan.alphas[:-1], scale * schedule.alpha(plan.timesteps), rtol=1e-14)
    np.testing.assert_allclose(plan.sigmas[:-1], scale * schedule.sigma(plan.timesteps), rtol=1e-14)
    assert (plan.alphas[-1], plan.sigmas[-1]) == (1.0, 0.0)
    assert plan.rows[0, 0] == pytest.approx(np.hypot(plan.alphas[0], plan.sigmas[0]), rel=1e-12)
    assert solvers.ddim(schedule, 5, start=0.25).rows[0, 0] == pytest.approx(0.25 * scale[0], rel=1e-14)


# --- numbers of evaluations and explicit times -----------------------------------------------------------------------

EVERY: list[tuple[Callable[..., Plan], dict[str, Any]]] = [(solver, settings) for solver, settings, _ in ORDERS]


@pytest.mark.parametrize(("solver", "settings"), EVERY, ids=name_of)
def test_steps_is_the_number_of_evaluations(solver: Callable[..., Plan], settings: dict[str, Any]) -> None:
    for steps in (1, 2, 3, 4, 5, 6, 7, 13, 14, 20):
        if solver is solvers.pndm and (steps == 2 or (settings and steps < 13)):
            with pytest.raises(InputError, match=f"cannot take {steps}"):
                solver(VP, steps, **settings)
        else:
            assert solver(VP, steps, **settings).nfe == steps


@pytest.mark.parametrize("kind", ["vp_epsilon", "zero_snr", "edm", "flow"])
@pytest.mark.parametrize(("solver", "settings"), EVERY, ids=name_of)
def test_uneven_explicit_times_stay_well_conditioned(
    solver: Callable[..., Plan], settings: dict[str, Any], kind: str
) -> None:
    schedule = SCHEDULES[kind]
    span = schedule.first - schedule.last
    gaps = [1e-9, 0.1, 1e-6, 0.6, 1e-4, 0.2, 1e-9, 0.05]  # in units of the span, from the noise end
    times = schedule.first - span * np.cumsum([0.0, *gaps])
    if kind == "flow":
        times = times[1:]  # lam is floored next to the end, so the first two would coincide
    plan = solver(schedule, timesteps=times, **settings)
    # Runge-Kutta stages divide by the tiny signal of the first nodes several times over.
    allowed = 1e6 if "runge_kutta" in settings else 1e3
    assert np.abs(plan.rows).max() < allowed * np.abs(solvers.ddim(schedule, timesteps=times).rows).max()
    assert "spacing" not in plan.metadata


def test_explicit_times_equal_those_of_the_spacing() -> None:
    for spacing in SPACINGS:
        for solver in (solvers.ddim, solvers.dpm_solver_pp, solvers.unipc, solvers.deis, solvers.ipndm):
            times = VP.timesteps(6, spacing)
            assert solver(VP, timesteps=times) == solver(VP, 6, spacing=spacing)


def test_singlestep_groups_end_with_a_single_evaluation() -> None:
    from olss_fast.solvers.dpm_solver import group_orders

    assert group_orders(9, 3) == [1, 2, 3, 1, 2, 3, 1, 2, 1]
    assert group_orders(6, 2) == [1, 2, 1, 2, 1, 1]
    assert group_orders(1, 3) == [1]


def test_heun_asks_inner_nodes_twice() -> None:
    plan = solvers.heun(VP, timesteps=[900, 500, 100])
    np.testing.assert_array_equal(plan.timesteps, [900, 500, 500, 100, 100])
    np.testing.assert_array_equal(solvers.pndm(VP, timesteps=[900, 500, 100]).timesteps, [900, 500, 500, 100])


# --- candidates and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 10, 31, 100])
def test_candidates_are_distinct_and_complete(nfe: int) -> None:
    plans = solvers.candidates(VP, nfe)
    assert len(set(plans)) == len(plans)
    assert all(plan.nfe == nfe and plan.noises == 0 for plan in plans)
    names = [solvers.display_name(plan) for plan in plans]
    assert len(set(names)) == len(names)
    assert all({"method", "order", "spacing", "prediction_type", "schedule"} <= plan.metadata.keys() for plan in plans)
    if nfe >= 5:
        methods = {plan.metadata["method"] for plan in plans}
        expected = {"ddim", "heun", "dpm_solver", "dpm_solver_pp", "unipc", "deis", "pndm", "ipndm"}
        assert expected <= methods
        assert {plan.metadata["spacing"] for plan in plans} == set(SPACINGS)


def test_candidates_of_every_schedule(schedule: NoiseSchedule) -> None:
    for nfe in (1, 2, 4, 9):
        assert solvers.candidates(schedule, nfe)


def test_candidates_are_fast() -> None:
    solvers.candidates(VP, 10)
    best = np.inf
    for _ in range(3):
        before = time.process_time()
        solvers.candidates(VP, 10)
        best = min(best, time.process_time() - before)
    assert best < 0.3


def test_candidates_refuse_counts_that_no_solver_can_take() -> None:
    with pytest.raises(InputError):
        solvers.candidates(VP, 0)
    short = NoiseSchedule.from_betas([0.1, 0.2, 0.4])
    assert {plan.metadata["spacing"] for plan in solvers.candidates(short, 9)} <= {"logsnr", "karras", "quadratic"}


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (solvers.dpm_solver_pp(VP, 5, order=2, spacing="logsnr"), "DPM-Solver++ 2M (logsnr)"),
        (solvers.dpm_solver_pp(VP, 5, order=3, variant="exact"), "DPM-Solver++ 3M exact (trailing)"),
        (solvers.dpm_solver(VP, 5, order=3), "DPM-Solver-3 (trailing)"),
        (solvers.dpm_solver(VP, 5, order=2, space="data"), "DPM-Solver++ 2S (trailing)"),
        (solvers.unipc(VP, 5, order=3, spacing="karras"), "UniPC-3 bh2 (karras)"),
        (solvers.pndm(VP, 5), "PLMS (trailing)"),
        (solvers.pndm(VP, 15, runge_kutta=True), "PNDM (trailing)"),
        (solvers.ipndm(VP, 5), "iPNDM-4 (trailing)"),
        (solvers.ddim(VP, 5, eta=0.5), "DDIM (eta 0.5, trailing)"),
        (solvers.euler_ancestral(VP, 5), "Euler ancestral (trailing)"),
        (solvers.deis(VP, timesteps=[900, 400, 10]), "DEIS-3"),
        (solvers.ddim(VP, 5).replace(metadata={"method": "olss {x}"}), "olss {x}"),
        (solvers.ddim(VP, 5).replace(metadata={}), "plan"),
    ],
)
def test_display_names(plan: Plan, name: str) -> None:
    assert solvers.display_name(plan) == name


def test_solvers_by_name() -> None:
    assert set(solvers.SOLVERS) == {
        *("ddim", "euler", "euler_ancestral", "heun", "dpm_solver", "dpm_solver_pp", "dpm_solver_pp_single"),
        *("unipc", "deis", "pndm", "ipndm"),
    }
    for name, solver in solvers.SOLVERS.items():
        plan = solver(VP, steps=5)
        assert (plan.nfe, plan.metadata["method"]) == (5, name)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: solvers.ddim(VP),
        lambda: solvers.ddim(VP, 5, timesteps=[1.0]),
        lambda: solvers.ddim(VP, 0),
        lambda: solvers.ddim(VP, 2.5),  # type: ignore[arg-type]
        lambda: solvers.heun(VP, 0),
        lambda: solvers.heun(VP, True),
        lambda: solvers.ddim(VP, timesteps=[]),
        lambda: solvers.ddim(VP, timesteps=[[900.0, 100.0]]),
        lambda: solvers.ddim(VP, timesteps=[900.0, np.nan]),
        lambda: solvers.ddim(VP, timesteps=[100.0, 900.0]),
        lambda: solvers.ddim(VP, timesteps=[900.0, 900.0]),
        lambda: solvers.ddim(VP, timesteps="many"),
        lambda: solvers.ddim(VP, 5, eta=1.5),
        lambda: solvers.ddim(VP, 5, eta=-0.1),
        lambda: solvers.ddim(VP, 5, start=0.0),
        lambda: solvers.dpm_solver_pp(VP, 5, order=4),
        lambda: solvers.dpm_solver_pp(VP, 5, variant="heun"),
        lambda: solvers.dpm_solver(VP, 5, order=1),
        lambda: solvers.dpm_solver(VP, 5, space="velocity"),
        lambda: solvers.unipc(VP, 5, variant="bh3"),
        lambda: solvers.deis(VP, 5, order=0),
        lambda: solvers.ipndm(VP, 5, order=5),
        lambda: solvers.pndm(VP, timesteps=[900, 500, 100], runge_kutta=True),
    ],
)
def test_nonsense_is_an_input_error(make: Callable[[], Plan]) -> None:
    with pytest.raises(InputError):
        make()


def test_times_outside_the_schedule_are_schedule_errors() -> None:
    with pytest.raises(ScheduleError, match="1200"):
        solvers.ddim(VP, timesteps=[1200.0, 500.0])
    with pytest.raises(ScheduleError, match="spacing"):
        solvers.ddim(VP, 5, spacing="uniform")
