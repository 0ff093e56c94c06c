"""The point-mass diagnostic: a plan applied to data with a known exact network output.

If all data is one point m, the state at levels (a, s) is x = a m + s ε, and the exact raw output of the network is

    epsilon       ε                                              = ( 0, 1)
    sample        m                                              = ( 1, 0)
    v_prediction  (a ε − s m) / √(a² + s²)                       = (−s, a) / √(a² + s²)
    flow          ε − m                                          = (−1, 1)
    edm           F = (m − c_skip x) / c_out, x = m + (s/a) ε    = ( s/σ_d, −a σ_d) / √(s² + a² σ_d²)

as (signal, noise). (v: Salimans and Ho 2022, appendix D; F: Karras et al. 2022, table 1; a, s are the levels of the
network input, so for edm a is c_in.) With a consistent solver row i reproduces (alphas[i], sigmas[i]).

With fresh noises, ε of the state is a unit mixture of the initial noise and the z drawn so far. So the noise part is a
vector over [initial noise, z_1 … z_Z], and its length (root of the sum of squares) is compared with sigmas[i].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from olss_fast.errors import PlanError

if TYPE_CHECKING:
    from olss_fast.plan.plan import Floats, Plan

ExactOutput = Callable[[float, float], tuple[float, float]]


def point_mass_residual(plan: Plan) -> Floats:
    """(signal, noise) of every row minus (alphas, sigmas), (S+1, 2), in the unit of the levels.

    Raises PlanError if metadata["prediction_type"] is missing or unknown (and "sigma_data" for edm), and if
    rows[0, 0], the scale of the initial noise, is 0.
    """
    exact_output = exact_output_of(plan)
    outputs = [exact_output(*levels) for levels in zip(plan.alphas.tolist(), plan.sigmas.tolist(), strict=True)]
    return levels_of_rows(plan, outputs[: plan.nfe]) - np.stack([plan.alphas, plan.sigmas], axis=1)


def levels_of_rows(plan: Plan, outputs: Sequence[tuple[float, float]]) -> Floats:
    """The actual (signal, noise) of each row, (S+1, 2), if evaluation i returns `outputs[i]` = (signal, noise).

    The first row starts from (alphas[0], sigmas[0]). PlanError if rows[0, 0] is 0.
    """
    if plan.rows[0, 0] == 0:
        raise PlanError("rows[0, 0] is 0; the first network input must contain the initial noise x_T")
    basis = _initial_basis(plan)
    found = np.empty((plan.nfe + 1, 2))
    for row in range(plan.nfe + 1):
        state = plan.rows[row] @ basis
        found[row] = state[0], _noise_level(state[1:])
        if row < plan.nfe:
            signal, noise = outputs[row]
            basis[plan.output_slice(row), 0] = signal
            basis[plan.output_slice(row), 1:] = noise * _unit_noise(state[1:])
    return found


def _initial_basis(plan: Plan) -> Floats:
    """(columns, 1 + 1 + Z): signal, initial noise and fresh noises of every column; outputs still 0."""
    basis = np.zeros((plan.columns, 2 + plan.noises))
    basis[0, :2] = np.array([plan.alphas[0], plan.sigmas[0]]) / plan.rows[0, 0]
    basis[plan.noise_slice, 2:] = np.eye(plan.noises)
    return basis


def _noise_level(noise: Floats) -> float:
    # Without fresh noises the sign is meaningful (a row with minus sigma ε is wrong); a mixture only has a length.
    return float(noise[0]) if noise.size == 1 else float(np.linalg.norm(noise))


def _unit_noise(noise: Floats) -> Floats:
    """ε of a state: the direction of its noise; the initial noise if there is none or no other."""
    length = float(np.linalg.norm(noise))
    if noise.size == 1 or length == 0:
        initial: Floats = np.eye(noise.size)[0]
        return initial
    return noise / length


def exact_output_of(plan: Plan) -> ExactOutput:
    """(alpha, sigma) -> signal and noise of the exact output at alpha m + sigma eps. PlanError if unknown."""
    prediction = plan.metadata.get("prediction_type")
    kind = (prediction or "").removeprefix("-")
    if kind == "edm":
        exact = edm_output(_sigma_data(plan))
    elif kind in EXACT_OUTPUTS:
        exact = EXACT_OUTPUTS[kind]
    else:
        raise PlanError(
            f"metadata['prediction_type'] is {prediction!r}; expected one of {', '.join([*EXACT_OUTPUTS, 'edm'])}: "
            "set it with plan.replace(metadata={...})"
        )
    sign = 1.0 if kind == prediction else -1.0
    return lambda alpha, sigma: (sign * exact(alpha, sigma)[0], sign * exact(alpha, sigma)[1])


def _v_prediction(alpha: float, sigma: float) -> tuple[float, float]:
    length = math.hypot(alpha, sigma)
    return -sigma / length, alpha / length


def edm_output(sigma_data: float) -> ExactOutput:
    """F of Karras et al. 2022 for data of standard deviation `sigma_data`."""

    def exact(alpha: float, sigma: float) -> tuple[float, float]:
        length = math.hypot(sigma, alpha * sigma_data)
        return sigma / (sigma_data * length), -alpha * sigma_data / length

    return exact


EXACT_OUTPUTS: dict[str, ExactOutput] = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": _v_prediction,
    "flow": lambda alpha, sigma: (-1.0, 1.0),
}


def _sigma_data(plan: Plan) -> float:
    text = plan.metadata.get("sigma_data")
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise PlanError(f"metadata['sigma_data'] is {text!r}; prediction type edm needs a positive number, such as 0.5")
    return value
