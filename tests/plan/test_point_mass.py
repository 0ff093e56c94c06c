"""The point-mass diagnostic against DDIM plans written here from its definition, and against drawn noises."""

from __future__ import annotations

import numpy as np
import pytest

from olss_fast.errors import PlanError
from olss_fast.plan.plan import Plan

# Rounding: a row is a sum of about S terms of size up to rows ~ 1/alpha_0 = 15, so a few hundred units of 2e-16.
POINT_MASS_TOLERANCE = 1e-12
SIGMA_DATA = 0.5


def vp_levels(steps: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.append(np.linspace(1.5, 0.2, steps), 0.0)
    return np.cos(angle), np.sin(angle)


def flow_levels(steps: int) -> tuple[np.ndarray, np.ndarray]:
    sigma = np.append(np.linspace(0.99, 0.1, steps), 0.0)
    return 1 - sigma, sigma


def data_and_noise(prediction: str, alpha: float, sigma: float) -> np.ndarray:
    """2×2: (x0, eps) as combinations of (state, raw output), written from the definition of each prediction."""
    if prediction == "epsilon":  # x = α x0 + σ f
        return np.array([[1 / alpha, -sigma / alpha], [0, 1]])
    if prediction == "sample":
        return np.array([[0, 1], [1 / sigma, -alpha / sigma]])
    if prediction == "v_prediction":
        return np.array([[alpha, -sigma], [sigma, alpha]])
    if prediction == "flow":  # x = (1−σ) x0 + σ ε, f = ε − x0
        return np.array([[1, -sigma], [1, 1 - sigma]])
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA / np.sqrt(sigma**2 + SIGMA_DATA**2)
    return np.array([[c_skip, c_out], [(1 - c_skip) / sigma, -c_out / sigma]])


def ddim(prediction: str, alphas: np.ndarray, sigmas: np.ndarray, branches: int = 1, eta: float = 0.0) -> Plan:
    """DDIM (Song et al. 2021, equation 12) by recursion on coefficient vectors; noise of std eta·σ_next goes in."""
    steps = len(alphas) - 1
    outputs = 1 + steps * branches
    states = np.zeros((steps + 1, outputs + (steps if eta else 0)))
    states[0, 0] = sigmas[0]
    for i in range(steps):
        raw = np.zeros(states.shape[1])
        raw[1 + i * branches : 1 + (i + 1) * branches] = 1 / branches  # guidance 1/2: the mean of both branches
        clean, noise = data_and_noise(prediction, alphas[i], sigmas[i]) @ np.stack([states[i], raw])
        fresh = eta * sigmas[i + 1]
        states[i + 1] = alphas[i + 1] * clean + np.sqrt(sigmas[i + 1] ** 2 - fresh**2) * noise
        if eta:
            states[i + 1, outputs + i] = fresh
    metadata = {"prediction_type": prediction, "sigma_data": str(SIGMA_DATA)}
    return Plan(
        timesteps=np.arange(steps)[::-1],
        rows=states,
        alphas=alphas,
        sigmas=sigmas,
        branches=branches,
        metadata=metadata,
    )


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_consistent_solver_meets_the_point_mass(prediction: str, eta: float, branches: int) -> None:
    alphas, sigmas = flow_levels(6) if prediction == "flow" else vp_levels(6)
    residual = ddim(prediction, alphas, sigmas, branches, eta).point_mass_residual()
    assert residual.shape == (7, 2)
    assert np.abs(residual).max() < POINT_MASS_TOLERANCE


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_edm_meets_the_point_mass_with_its_input_scaling(eta: float) -> None:
    sigmas = np.array([80.0, 20, 5, 1, 0.1, 0])
    scale = np.append(1 / np.sqrt(sigmas[:-1] ** 2 + SIGMA_DATA**2), 1)  # rows are network inputs; the sample is not
    plan = ddim("edm", np.ones(6), sigmas, eta=eta)
    plan = plan.replace(rows=plan.rows * scale[:, None], alphas=scale, sigmas=sigmas * scale)
    # Unscaled coefficients reach sigma_max = 80, and so does what is left of cancelling them: 80 times more rounding.
    assert np.abs(plan.point_mass_residual()).max() < 80 * POINT_MASS_TOLERANCE


def test_fresh_noise_lies_in_the_states_as_the_diagnostic_says() -> None:
    """The same plan run with an exact network on drawn noises: the spread of each input is the level of its row."""
    alphas, sigmas = vp_levels(4)
    plan = ddim("epsilon", alphas, sigmas, eta=0.8)
    draws = 40_000
    basis = np.zeros((plan.columns, draws))
    generator = np.random.default_rng(0)
    basis[0] = generator.standard_normal(draws)
    basis[plan.noise_slice] = generator.standard_normal((plan.noises, draws))
    point = 2.0
    basis[0] += point * alphas[0] / plan.rows[0, 0]  # the exact state at the first level, not pure noise
    for i in range(plan.nfe):
        state = plan.rows[i] @ basis
        basis[1 + i] = (state - alphas[i] * point) / sigmas[i]
        # The standard error of a standard deviation over N draws is σ/√(2N) = 0.0035 σ; five of them.
        assert np.std(state) == pytest.approx(sigmas[i], rel=5 / np.sqrt(2 * draws))


def test_wrong_coefficient_shows_in_the_residual() -> None:
    plan = ddim("epsilon", *vp_levels(4))
    rows = plan.rows.copy()
    rows[4, 2] += 1e-3  # f_1 = ε carries (0, 1): only the noise of row 4 may move, by exactly this much
    residual = plan.replace(rows=rows).point_mass_residual()
    expected = np.zeros((5, 2))
    expected[4, 1] = 1e-3
    np.testing.assert_allclose(residual, expected, rtol=0, atol=POINT_MASS_TOLERANCE)


def test_missing_fresh_noise_and_flipped_noise_show_in_the_residual() -> None:
    stochastic = ddim("epsilon", *vp_levels(4), eta=1.0)
    rows = stochastic.rows.copy()
    rows[2, stochastic.noise_slice] = 0
    assert abs(stochastic.replace(rows=rows).point_mass_residual()[2, 1]) > 0.1
    plain = ddim("epsilon", *vp_levels(4))
    flipped = plain.rows * [[1], [1], [-1], [1], [1]]
    residual = plain.replace(rows=flipped).point_mass_residual()[2]
    np.testing.assert_allclose(residual, [-2 * plain.alphas[2], -2 * plain.sigmas[2]], atol=POINT_MASS_TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {}}, "'prediction_type'] is None; expected one of epsilon"),
        ({"metadata": {"prediction_type": "x"}}, "is 'x'; expected one of epsilon, sample, v_prediction, flow, edm"),
        ({"metadata": {"prediction_type": "edm"}}, "'sigma_data'] is None"),
        ({"metadata": {"prediction_type": "edm", "sigma_data": "nan"}}, "'sigma_data'] is 'nan'"),
        ({"metadata": {"prediction_type": "edm", "sigma_data": "half"}}, "'sigma_data'] is 'half'"),
        ({"rows": np.zeros((3, 3)), "metadata": {"prediction_type": "flow"}}, r"rows[0, 0] is 0"),
    ],
)
def test_diagnostic_says_what_it_lacks(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        ddim("epsilon", *vp_levels(2)).replace(**changes).point_mass_residual()
    assert message in str(caught.value)
