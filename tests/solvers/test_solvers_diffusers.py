"""Every solver that diffusers has gives the rows that `capture` gets from diffusers' scheduler.

diffusers keeps noise levels in float32; they are replaced by the float64 levels of the same times (checked to agree
first), which leaves 1e-6 to be met by the arithmetic of the schedulers' coefficients, partly in float32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest

from olss_fast import solvers
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from olss_fast.capturing.capturing import capture  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TOLERANCE = 1e-6


def after_set_timesteps(scheduler: Any, alter: Callable[[Any], None]) -> Any:
    """The scheduler, which from now on applies `alter` to itself (or to the copy that it is then) in set_timesteps."""

    def set_timesteps(self: Any, *arguments: Any, **named: Any) -> None:
        type(self).set_timesteps(self, *arguments, **named)
        alter(self)

    scheduler.set_timesteps = MethodType(set_timesteps, scheduler)
    return scheduler


def with_float64_levels(scheduler: Any, schedule: NoiseSchedule, times: np.ndarray) -> Any:
    """Replaces alphas_cumprod, and all but the last of sigmas (noise over signal; for flow, sigma) by those of `times`.

    The scheduler itself stays what it is.
    """
    scheduler = copy.deepcopy(scheduler)
    flow = schedule.prediction_type == "flow"
    alpha, sigma, _ = schedule.levels(times)

    def alter(altered: Any) -> None:
        if hasattr(altered, "alphas_cumprod") and not flow:
            altered.alphas_cumprod = torch.tensor(schedule.alpha(np.arange(len(altered.alphas_cumprod))) ** 2)
        if hasattr(altered, "sigmas"):
            exact = torch.tensor(np.append(sigma if flow else sigma / alpha, altered.sigmas[-1]))
            torch.testing.assert_close(altered.sigmas[:-1].double(), exact[:-1], rtol=1e-4, atol=1e-6)
            altered.sigmas = exact

    return after_set_timesteps(scheduler, alter)


def check(
    scheduler: Any,
    plan: Plan,
    schedule: NoiseSchedule,
    *,
    steps: int | None = None,
    last: bool = True,
    timestep_tolerance: float = 1e-6,
    **step_arguments: float,
) -> None:
    """Rows equal to TOLERANCE of the largest; `last=False` leaves out the sample."""
    exact = with_float64_levels(scheduler, schedule, plan.timesteps)
    captured = capture(exact, steps or plan.nfe, step_arguments=step_arguments)
    assert captured.nfe == plan.nfe
    assert np.abs(captured.timesteps - plan.timesteps).max() <= timestep_tolerance
    error = np.abs(padded(captured, plan) - padded(plan, captured))[: None if last else -1].max()
    assert error <= TOLERANCE * max(1.0, np.abs(plan.rows).max()), f"{solvers.display_name(plan)}: {error}"


def padded(plan: Plan, other: Plan) -> np.ndarray:
    """Rows with columns of zeros for noises that only the other plan draws, without effect."""
    return np.pad(plan.rows, ((0, 0), (0, max(0, other.columns - plan.columns))))


def times_of(scheduler: Any, steps: int) -> np.ndarray:
    """The evaluation times that the scheduler itself chooses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(steps)
    return np.asarray(scheduler.timesteps.double().numpy())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", [SD, LINEAR], ids=lambda betas: betas["beta_schedule"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim(spacing: str, betas: dict[str, Any], prediction: str) -> None:
    # diffusers' linspace is left out: it steps by N // steps whatever the grid is.
    scheduler = diffusers.DDIMScheduler(
        **betas, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, steps_offset=0
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    for steps in (1, 5, 10, 50):
        check(scheduler, solvers.ddim(schedule, steps, spacing=spacing), schedule)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_without_terminal_signal(prediction: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SD, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    check(scheduler, solvers.ddim(schedule, 10), schedule)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    check(scheduler, solvers.ddim(schedule, 8, eta=eta), schedule, eta=eta)


def start_of(schedule: NoiseSchedule, spacing: str, times: np.ndarray) -> float | None:
    """diffusers' Euler family starts from the noise part alone, but for leading spacing."""
    return None if spacing == "leading" else float(schedule.sigma(times[0]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_euler_and_heun(spacing: str, prediction: str) -> None:
    settings = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
    scheduler = diffusers.EulerDiscreteScheduler(**settings)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    times = times_of(scheduler, 8)
    start = start_of(schedule, spacing, times)
    check(scheduler, solvers.euler(schedule, timesteps=times, start=start), schedule)
    if prediction != "sample":  # not in diffusers' Heun
        scheduler = diffusers.HeunDiscreteScheduler(**settings)
        check(scheduler, solvers.heun(schedule, timesteps=times, start=start), schedule, steps=8)


def test_euler_ancestral() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="leading")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    check(scheduler, solvers.euler_ancestral(schedule, timesteps=times_of(scheduler, 6)), schedule)


@pytest.mark.parametrize("runge_kutta", [False, True])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_pndm(spacing: str, runge_kutta: bool) -> None:
    scheduler = diffusers.PNDMScheduler(
        **SD, timestep_spacing=spacing, skip_prk_steps=not runge_kutta, set_alpha_to_one=True
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    nfe = 19 if runge_kutta else 11
    check(scheduler, solvers.pndm(schedule, nfe, spacing=spacing, runge_kutta=runge_kutta), schedule, steps=10)


def test_ipndm() -> None:
    """diffusers' own schedule: x = sqrt(1 - b^2) x0 + b eps, timestep 2 / pi atan2(b, a), v prediction."""
    levels = np.array([0.97, 0.9, 0.8, 0.66, 0.5, 0.31, 0.12])

    def alter(scheduler: Any) -> None:
        scheduler.betas = torch.tensor([*levels, 0.0], dtype=torch.float64)
        scheduler.alphas = (1 - scheduler.betas**2).sqrt()

    scheduler = after_set_timesteps(diffusers.IPNDMScheduler(trained_betas=[*levels, 0.0]), alter)
    schedule = NoiseSchedule.from_alphas_cumprod(1 - levels[::-1] ** 2, prediction_type="v_prediction")
    plan = solvers.ipndm(schedule, timesteps=np.arange(len(levels))[::-1])
    np.testing.assert_allclose(capture(scheduler, len(levels)).rows, plan.rows, atol=1e-12)


STEPS = (5, 10, 20)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_pp(order: int, spacing: str, prediction: str) -> None:
    settings = {**SD, "prediction_type": prediction, "timestep_spacing": spacing, "solver_order": order}
    for steps in STEPS:
        for solver_type, variant in (("midpoint", "midpoint"), ("heun", "exact"))[: 2 if order == 2 else 1]:
            scheduler = diffusers.DPMSolverMultistepScheduler(
                **settings, solver_type=solver_type, final_sigmas_type="zero"
            )
            schedule = NoiseSchedule.from_diffusers(scheduler)
            times = times_of(scheduler, steps)
            check(scheduler, solvers.dpm_solver_pp(schedule, timesteps=times, order=order, variant=variant), schedule)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpm_solver_singlestep(solver_type: str, order: int) -> None:
    settings = {**SD, "solver_order": order, "solver_type": solver_type}
    variant = "midpoint" if solver_type == "midpoint" else "exact"
    for steps in (*STEPS, 9):
        # The noise-space algorithm cannot end without noise in diffusers: its sample is left out.
        for algorithm, space, final in (("dpmsolver++", "data", "zero"), ("dpmsolver", "noise", "sigma_min")):
            scheduler = diffusers.DPMSolverSinglestepScheduler(
                **settings, algorithm_type=algorithm, final_sigmas_type=final
            )
            schedule = NoiseSchedule.from_diffusers(scheduler)
            plan = solvers.dpm_solver(
                schedule, timesteps=times_of(scheduler, steps), order=order, variant=variant, space=space
            )
            check(scheduler, plan, schedule, last=final == "zero")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, variant: str, prediction: str) -> None:
    end = "zero" if variant == "bh2" else "sigma_min"  # bh1 computes inf * 0 = nan where no noise is left
    for steps in STEPS:
        scheduler = diffusers.UniPCMultistepScheduler(
            **SD, prediction_type=prediction, solver_order=order, solver_type=variant, final_sigmas_type=end
        )
        schedule = NoiseSchedule.from_diffusers(scheduler)
        plan = solvers.unipc(schedule, timesteps=times_of(scheduler, steps), order=order, variant=variant)
        check(scheduler, plan, schedule, last=end == "zero")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int) -> None:
    for steps in STEPS:
        scheduler = diffusers.DEISMultistepScheduler(**SD, solver_order=order)
        schedule = NoiseSchedule.from_diffusers(scheduler)
        plan = solvers.deis(schedule, timesteps=times_of(scheduler, steps), order=order)
        check(scheduler, plan, schedule, last=False)  # diffusers ends at the least noise, not at none


@pytest.mark.parametrize("order", [0, 1, 2, 3], ids=["euler", "1", "2", "3"])
def test_edm(order: int) -> None:
    settings = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    schedule = NoiseSchedule.edm()
    if order == 0:
        scheduler, plan = diffusers.EDMEulerScheduler(**settings), solvers.euler(schedule, 9, spacing="karras")
    else:
        scheduler = diffusers.EDMDPMSolverMultistepScheduler(**settings, solver_order=order, final_sigmas_type="zero")
        plan = solvers.dpm_solver_pp(schedule, 9, spacing="karras", order=order)
    check(scheduler, plan, schedule)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_and_heun(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    times = np.minimum(times_of(scheduler, 8), 1000.0)
    check(scheduler, solvers.euler(schedule, timesteps=times), schedule, timestep_tolerance=1e-3)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    check(scheduler, solvers.heun(schedule, timesteps=times), schedule, steps=8, timestep_tolerance=1e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_multistep(name: str, order: int) -> None:
    scheduler = getattr(diffusers, name)(
        use_flow_sigmas=True,
        flow_shift=3.0,
        prediction_type="flow_prediction",
        solver_order=order,
        final_sigmas_type="zero",
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    scheduler.set_timesteps(8)
    # These schedulers start from unit noise and round the network's timestep; the levels are those of `sigmas`.
    times = 1000.0 * scheduler.sigmas[:-1].double().numpy()
    solver = solvers.unipc if name.startswith("UniPC") else solvers.dpm_solver_pp
    plan = solver(schedule, timesteps=times, order=order, start=1.0)
    check(scheduler, plan, schedule, timestep_tolerance=1.0)
