"""Captured plans equal schedulers with other options than the default ones, from the start and from later on."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from olss_fast.errors import ScheduleError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from scheduler_runs import OWN_ROUNDING, check_plan, remember_quadratures  # noqa: E402

from olss_fast.capturing.capturing import capture  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTED = {"use_dynamic_shifting": True}
OWN = 1e-5
"""Bound in float32 where a third-order formula divides by small differences: DPM-Solver 3 and SASolver on steep grids.

Their own rounding again: the float64 runs meet IN_FLOAT64, or the same rounding where the class casts to float32."""

Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]  # class, config, set_timesteps arguments, step's


def case(name: str, config: dict[str, Any] | None = None, step: dict[str, Any] | None = None, **arguments: Any) -> Case:
    return name, config or {}, arguments, step or {}


SIGMAS = [
    case(name, {**SD, f"use_{sigmas}_sigmas": True})
    for name, sigmas in product(
        (
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "LMSDiscreteScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        ("karras", "exponential", "beta"),
    )
]
DPM = [
    case(
        name, {**SD, "algorithm_type": algorithm, "solver_order": order, "solver_type": kind, "final_sigmas_type": end}
    )
    for name, (algorithm, orders, ends), order, kind, end in (
        (name, algorithm, order, kind, end)
        for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
        for algorithm in (
            ("dpmsolver", (1, 2, 3), ("sigma_min",)),
            ("dpmsolver++", (1, 2, 3), ("zero", "sigma_min")),
            ("sde-dpmsolver", (1, 2), ("sigma_min",)),  # order 3 is a NameError in diffusers
            ("sde-dpmsolver++", (1, 2, 3), ("zero", "sigma_min")),
        )
        for order in algorithm[1]
        for kind in ("midpoint", "heun")
        for end in algorithm[2]
    )
    if (name, algorithm) != ("DPMSolverSinglestepScheduler", "sde-dpmsolver")
]
UNIPC = [
    case("UniPCMultistepScheduler", {**SD, "solver_order": order, "solver_type": kind, "predict_x0": x0, **end})
    for order, kind, x0 in product((1, 2, 3), ("bh1", "bh2"), (True, False))
    for end in ({"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "zero"})
    if end["final_sigmas_type"] == "sigma_min" or (kind == "bh2" and x0)  # the others end in inf * 0
]
ZERO_SNR = [
    case(name, {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction})
    for name, prediction in (
        *product(("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"), ("v_prediction", "sample")),
        *product(("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"), ("epsilon", "v_prediction")),
        ("EulerAncestralDiscreteScheduler", "v_prediction"),
        ("UniPCMultistepScheduler", "epsilon"),
        ("CogVideoXDDIMScheduler", "v_prediction"),
        ("CogVideoXDPMScheduler", "v_prediction"),
    )
]
REST = [
    case("DDIMScheduler", step={"eta": 0.5}),
    case("DDIMScheduler", step={"eta": 1.0, "use_clipped_model_output": True}),
    case("TCDScheduler", step={"eta": 0.7}),
    case("LMSDiscreteScheduler", step={"order": 2}),
    case("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}, step={"s_churn": 0.5, "s_noise": 1.1}),
    case("EDMEulerScheduler", step={"s_churn": 0.5}),
    case("DPMSolverMultistepScheduler", {**SD, "use_lu_lambdas": True}),
    case("DPMSolverMultistepScheduler", {**FLOW, **SHIFTED, "flow_shift": 5.0}, mu=0.8),
    case("UniPCMultistepScheduler", {**FLOW, "flow_shift": 5.0}),
    case("DEISMultistepScheduler", {**SD, "solver_order": 3}),
    case("SASolverScheduler", {**SD, "predictor_order": 3, "corrector_order": 4}),
    case("SASolverScheduler", {**SD, "predictor_order": 3, "corrector_order": 2, "algorithm_type": "noise_prediction"}),
    case("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    case("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    case(
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
        | {"prediction_type": "v_prediction"},
    ),
    case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    case("FlowMatchEulerDiscreteScheduler", SHIFTED, mu=1.15),
    case("FlowMatchEulerDiscreteScheduler", {**SHIFTED, "time_shift_type": "linear"}, mu=1.15),
    case("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    case("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    case("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    case("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
    case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    case("FlowMatchLCMScheduler", {"shift": 3.0}),
    case("DDPMScheduler", {"variance_type": "fixed_large"}),
    case("DDPMScheduler", {"variance_type": "fixed_small_log"}),
    case("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    case("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    case("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "solver_order": 3}),
    case("EDMEulerScheduler", {"sigma_data": 1.0, "prediction_type": "v_prediction"}),
]


def case_id(value: Case) -> str:
    name, config, arguments, step = value
    facts = {key: text for key, text in config.items() if key not in SD} | arguments | step
    notes = [key if text is True else f"{text}" for key, text in facts.items()]
    return "-".join([name.removesuffix("Scheduler"), *notes])


def make(name: str, config: dict[str, Any]) -> Any:
    clips = name in ("DDIMScheduler", "DDPMScheduler")
    return getattr(diffusers, name)(**config, **({"clip_sample": False} if clips else {}))


@pytest.mark.parametrize("value", [*SIGMAS, *DPM, *UNIPC, *ZERO_SNR, *REST], ids=case_id)
def test_options(value: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_quadratures(monkeypatch)
    name, config, arguments, step = value
    scheduler = make(name, config)
    third = config.get("solver_order") == 3 or name == "SASolverScheduler"
    bound = OWN if third and name not in OWN_ROUNDING else None
    check_plan(scheduler, 3, step=step, bound=bound, **arguments)
    plan = check_plan(scheduler, 8, step=step, bound=bound, begin=4, **arguments)
    assert plan.rows[0, 0] == 1.0
    assert np.count_nonzero(plan.rows[0]) == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DPMSolverMultistepScheduler", {"timesteps": [999, 700, 400, 50]}),
        ("DPMSolverSinglestepScheduler", {"timesteps": [999, 700, 400, 50]}),
        ("EulerDiscreteScheduler", {"timesteps": [999, 700, 400, 50]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 3.0, 0.5, 0.1, 0.0]}),
        ("EDMEulerScheduler", {"sigmas": torch.tensor([0.0, 0.3, 0.6, 1.0])}),  # taken as the ramp of the schedule
        ("HeunDiscreteScheduler", {"timesteps": [999, 700, 400, 50]}),
        ("DDPMScheduler", {"timesteps": [999, 700, 400, 50]}),
        ("LCMScheduler", {"timesteps": [999, 699, 399, 59]}),
        ("TCDScheduler", {"timesteps": [999, 699, 399, 59]}),
        ("CMStochasticIterativeScheduler", {"timesteps": [39, 20, 3]}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.7, 0.3]}),
        ("FlowMatchEulerDiscreteScheduler", {"timesteps": [1000.0, 700.0, 300.0]}),
        ("LTXEulerAncestralRFScheduler", {"sigmas": [1.0, 0.7, 0.3, 0.0]}),
        ("MiniMaxH3Scheduler", {"sigmas": [1.0, 0.7, 0.3, 0.0]}),
    ],
)
def test_grids_of_ones_own(name: str, arguments: dict[str, Any]) -> None:
    config = {"CMStochasticIterativeScheduler": {"clip_denoised": False}}.get(name, {})
    check_plan(make(name, config), None, **arguments)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_rounded_timesteps_may_repeat_at_the_start(name: str) -> None:
    """diffusers finds its place by timestep, so pipelines that do not call set_begin_index fail here; the plan is the
    run of those that do."""
    scheduler = make(name, {**SD, "use_beta_sigmas": True})
    plan = capture(scheduler, 50)
    assert plan.timesteps[0] == plan.timesteps[1]
    assert np.abs(plan.point_mass_residual()[-1]).max() < 1e-4  # float32 tables


def test_coefficients_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"not finite for the sample.*final_sigmas_type"):
        capture(make("UniPCMultistepScheduler", {**SD, "solver_type": "bh1", "final_sigmas_type": "zero"}), 5)
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ScheduleError, match="not finite for the input of evaluation 1"):
        capture(make("DDIMScheduler", config), 5)
