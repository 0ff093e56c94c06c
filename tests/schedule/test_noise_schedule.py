"""Noise schedules: levels, prediction maps, spacings, reading diffusers' configurations, and what bad input gets."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from olss_fast.errors import InputError, ScheduleError
from olss_fast.schedule.noise_schedule import BETA_SCHEDULES, SPACINGS, NoiseSchedule, beta_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "linear": NoiseSchedule.named("linear"),
    "scaled_linear": NoiseSchedule.named("scaled_linear", **SD, prediction_type="v_prediction"),
    "squaredcos": NoiseSchedule.named("squaredcos_cap_v2", prediction_type="sample"),
    "sigmoid": NoiseSchedule.named("sigmoid", prediction_type="flow"),
    "zero_snr": NoiseSchedule.named("scaled_linear", **SD, prediction_type="v_prediction", zero_terminal_snr=True),
    "short": NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.5, 0.9]),
    "edm": NoiseSchedule.edm(),
    "ve": NoiseSchedule.ve(),
    "ve_v": NoiseSchedule.ve(0.002, 700, prediction_type="v_prediction", timestep="quarter_log", unit_input=True),
    "ve_table": NoiseSchedule.from_sigmas(np.geomspace(0.01, 50, 200)),
    "flow": NoiseSchedule.flow(),
    "flow_3": NoiseSchedule.flow(shift=3.0),
}


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]


def inside(schedule: NoiseSchedule, count: int = 41) -> np.ndarray:
    """Timesteps spread over the range, off the grid, without the ends."""
    return np.linspace(schedule.first, schedule.last, count + 2)[1:-1] + 1e-4 * (schedule.last - schedule.first)


# --- levels --------------------------------------------------------------------------------------------------------


def test_alpha_is_the_root_of_alphas_cumprod_at_whole_timesteps() -> None:
    betas = beta_schedule("linear")
    expected = np.cumprod(1 - betas)
    schedule = NoiseSchedule.from_betas(betas)
    np.testing.assert_allclose(schedule.alpha(np.arange(1000)) ** 2, expected, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(np.arange(1000)) ** 2, 1 - expected, rtol=1e-12)


def test_betas_may_be_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    np.testing.assert_allclose(schedule.curve.lams, SCHEDULES["linear"].curve.lams, rtol=1e-9)  # type: ignore[attr-defined]


def test_levels_between_timesteps_interpolate_log_snr() -> None:
    schedule = SCHEDULES["linear"]
    assert schedule.lam(499.25) == pytest.approx(0.75 * schedule.lam(499) + 0.25 * schedule.lam(500), rel=1e-13)


def test_named_schedules_have_the_published_ends() -> None:
    # 1 - prod(1 - beta): Ho et al.'s schedule ends at 4.0e-5, Stable Diffusion's at 4.7e-3.
    assert SCHEDULES["linear"].alpha(999) ** 2 == pytest.approx(4.036e-5, rel=1e-3)
    assert SCHEDULES["scaled_linear"].alpha(999) ** 2 == pytest.approx(4.660e-3, rel=1e-3)
    # Nichol & Dhariwal: alpha_bar(t) = cos^2 normalised; away from the cap the product telescopes.
    bar = np.cos((np.array([501 / 1000, 0.0]) + 0.008) / 1.008 * np.pi / 2) ** 2
    assert SCHEDULES["squaredcos"].alpha(500) ** 2 == pytest.approx(bar[0] / bar[1], rel=1e-12)


def test_levels_agree_with_lam(schedule: NoiseSchedule) -> None:
    alpha, sigma, lam = schedule.levels(inside(schedule))
    np.testing.assert_allclose(np.log(alpha / sigma), lam, atol=1e-9)
    assert np.all(np.diff(lam) > 0)
    if schedule.curve.variance_exploding:
        assert np.all(alpha == 1)
    elif schedule.prediction_type == "flow" and schedule.curve.end == 0.0:
        np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-14)
    else:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


def test_timestep_of_lam_is_the_inverse_of_lam(schedule: NoiseSchedule) -> None:
    times = np.concatenate([[schedule.first], inside(schedule), [schedule.last]])
    np.testing.assert_allclose(schedule.timestep_of_lam(schedule.lam(times)), times, rtol=1e-9, atol=1e-9)


def test_functions_keep_the_shape_of_the_timestep(schedule: NoiseSchedule) -> None:
    times = inside(schedule, 6).reshape(2, 3)
    for function in (schedule.alpha, schedule.sigma, schedule.lam, schedule.input_scale):
        assert np.shape(function(times)) == (2, 3)
        assert np.shape(function(float(times[0, 0]))) == ()


def test_zero_terminal_snr_is_exact_and_lam_stays_finite() -> None:
    schedule = SCHEDULES["zero_snr"]
    assert schedule.alpha(999) == 0.0
    assert schedule.sigma(999) == 1.0
    assert np.isfinite(schedule.lam(999))
    assert schedule.lam(999) < schedule.lam(998)
    plain = NoiseSchedule.named("scaled_linear", **SD)
    assert schedule.alpha(0) == pytest.approx(plain.alpha(0), rel=1e-12)  # the first level is kept
    last_beta_one = NoiseSchedule.from_betas([0.1, 0.2, 1.0], prediction_type="sample")
    assert last_beta_one.alpha(2) == 0.0


def test_flow_starts_without_signal() -> None:
    schedule = SCHEDULES["flow"]
    assert schedule.alpha(1000) == 0.0
    assert np.isfinite(schedule.lam(1000))
    assert schedule.sigma(250) == 0.25


def test_edm_preconditioning_is_the_published_one() -> None:
    schedule, sigma = SCHEDULES["edm"], 3.0
    timestep = np.log(sigma) / 4
    a, b, _, _ = schedule.prediction_maps(timestep)
    assert schedule.sigma(timestep) == pytest.approx(sigma, rel=1e-14)
    assert schedule.input_scale(timestep) == pytest.approx(1 / np.sqrt(sigma**2 + 0.25), rel=1e-13)
    assert a == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-13)
    assert b == pytest.approx(sigma * 0.5 / np.sqrt(sigma**2 + 0.25), rel=1e-13)


# --- prediction maps -----------------------------------------------------------------------------------------------


def output_of(schedule: NoiseSchedule, timestep: np.ndarray, x0: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """What a network that knows x0 and eps writes, from the definition of each prediction type."""
    alpha, sigma, _ = schedule.levels(timestep)
    if schedule.prediction_type == "edm":
        variance = sigma**2 + schedule.sigma_data**2
        skip = schedule.sigma_data**2 / variance
        return (x0 - skip * (x0 + sigma * eps)) * np.sqrt(variance) / (sigma * schedule.sigma_data)
    return {
        "epsilon": eps,
        "sample": x0,
        "flow": eps - x0,
        "v_prediction": (alpha * eps - sigma * x0) / np.hypot(alpha, sigma),
    }[schedule.prediction_type]


def test_prediction_maps_recover_data_and_noise(schedule: NoiseSchedule) -> None:
    times = inside(schedule)
    x0, eps = np.random.default_rng(0).normal(size=(2, times.size))
    alpha, sigma, _ = schedule.levels(times)
    x, f = alpha * x0 + sigma * eps, output_of(schedule, times, x0, eps)
    a, b, c, d = schedule.prediction_maps(times)
    np.testing.assert_allclose(a * x + b * f, x0, atol=1e-9)
    np.testing.assert_allclose(c * x + d * f, eps, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_prediction_type_on_a_beta_schedule(prediction_type: str) -> None:
    test_prediction_maps_recover_data_and_noise(NoiseSchedule.named("linear", prediction_type=prediction_type))


# --- spacings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_fall_within_the_range(schedule: NoiseSchedule, spacing: str) -> None:
    for steps in (1, 2, 5, 37) if schedule.curve.end != -1.0 or schedule.first > 37 else (1, 2, 5):
        times = schedule.timesteps(steps, spacing)
        assert times.shape == (steps,)
        assert np.all(np.diff(times) < 0)
        assert schedule.last - 1e-9 <= times[-1]
        assert times[0] <= schedule.first + 1e-9
        if spacing != "leading":
            assert times[0] == pytest.approx(schedule.first, rel=1e-12)
        if spacing != "trailing" and steps > 1:
            assert times[-1] == pytest.approx(schedule.last, rel=1e-9, abs=1e-9)


def test_uniform_spacings_on_whole_timesteps() -> None:
    schedule = SCHEDULES["linear"]
    np.testing.assert_array_equal(schedule.timesteps(5, "trailing"), [999, 799, 599, 399, 199])
    np.testing.assert_array_equal(schedule.timesteps(5, "leading"), [800, 600, 400, 200, 0])
    np.testing.assert_array_equal(schedule.timesteps(4, "linspace"), [999, 666, 333, 0])
    np.testing.assert_array_equal(schedule.timesteps(1000, "trailing"), np.arange(1000)[::-1])
    offset = NoiseSchedule.named("linear", leading_offset=1)
    np.testing.assert_array_equal(offset.timesteps(5, "leading"), [801, 601, 401, 201, 1])


def test_logsnr_and_karras_and_quadratic_are_uniform_in_their_variable() -> None:
    schedule = SCHEDULES["scaled_linear"]
    variables = {
        "logsnr": schedule.lam,
        "karras": lambda t: (schedule.sigma(t) / schedule.alpha(t)) ** (1 / 7),
        "quadratic": np.sqrt,
    }
    for spacing, variable in variables.items():
        gaps = np.diff(variable(schedule.timesteps(9, spacing)))
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9, err_msg=spacing)


def test_shift_bends_uniform_flow_times() -> None:
    u = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(SCHEDULES["flow_3"].timesteps(4), 1000 * 3 * u / (1 + 2 * u))


# --- diffusers -----------------------------------------------------------------------------------------------------


def quiet(function, *args, **kwargs):  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas_equal_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule=name, beta_start=0.001, beta_end=0.02)
    betas = beta_schedule(name, 1000, 0.001, 0.02)
    np.testing.assert_allclose(betas, scheduler.betas.numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("as_config", [False, True])
def test_from_diffusers_beta_schedules(zero_snr: bool, as_config: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        **SD,
        rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="leading",
    )
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config) if as_config else scheduler)
    np.testing.assert_allclose(schedule.alpha(np.arange(1000)) ** 2, scheduler.alphas_cumprod.numpy(), atol=2e-6)
    assert schedule.prediction_type == "v_prediction"
    scheduler.set_timesteps(7)
    np.testing.assert_array_equal(schedule.timesteps(7, "leading"), scheduler.timesteps.numpy())


def test_from_diffusers_trained_betas_and_snr_shift() -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = np.linspace(0.01, 0.3, 30)
    trained = NoiseSchedule.from_diffusers(diffusers.DPMSolverMultistepScheduler(trained_betas=list(betas)))
    np.testing.assert_allclose(trained.alpha(np.arange(30)) ** 2, np.cumprod(1 - betas), rtol=1e-12)
    shifted = diffusers.CogVideoXDDIMScheduler(**SD, snr_shift_scale=3.0)
    alphas_cumprod = NoiseSchedule.from_diffusers(shifted).alpha(np.arange(1000)) ** 2
    np.testing.assert_allclose(alphas_cumprod, shifted.alphas_cumprod.numpy(), atol=2e-6)


@pytest.mark.parametrize("steps", [4, 7, 10, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_timesteps_equal_diffusers(spacing: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", **SD, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(
        NoiseSchedule.from_diffusers(scheduler).timesteps(steps, spacing), scheduler.timesteps.numpy()
    )


@pytest.mark.parametrize(("flag", "spacing"), [("use_karras_sigmas", "karras"), ("use_lu_lambdas", "logsnr")])
def test_sigma_spacings_equal_diffusers(flag: str, spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", **SD, final_sigmas_type="zero", **{flag: True}
    )
    scheduler.set_timesteps(8)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    times = schedule.timesteps(8, spacing)
    np.testing.assert_allclose(schedule.sigma(times) / schedule.alpha(times), scheduler.sigmas[:-1].numpy(), rtol=5e-5)


def test_from_diffusers_flow_and_edm_and_continuous() -> None:
    diffusers = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = NoiseSchedule.from_diffusers(flow)
    assert schedule.prediction_type == "flow"
    flow.set_timesteps(sigmas=list(np.linspace(1.0, 1 / 6, 6)))
    np.testing.assert_allclose(schedule.timesteps(6), flow.timesteps.numpy(), rtol=1e-6)
    edm = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=60.0, sigma_data=0.7)
    schedule = NoiseSchedule.from_diffusers(edm)
    edm.set_timesteps(6)
    assert schedule.prediction_type == "edm"
    assert schedule.metadata()["sigma_data"] == "0.7"
    np.testing.assert_allclose(schedule.timesteps(6, "karras"), edm.timesteps.numpy(), rtol=1e-6, atol=1e-6)
    video = diffusers.EulerDiscreteScheduler(
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
    )
    schedule = NoiseSchedule.from_diffusers(video)
    quiet(video.set_timesteps, 6)
    np.testing.assert_allclose(schedule.timesteps(6, "karras"), video.timesteps.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 0.5},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": "VQDiffusionScheduler"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "laplace"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "score"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "rescale_betas_zero_snr": True},
        3,
    ],
    ids=str,
)
def test_from_diffusers_refuses_what_it_does_not_know(config: object) -> None:
    with pytest.raises(ScheduleError):
        NoiseSchedule.from_diffusers(config)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoiseSchedule.from_betas([0.1, -0.1, 0.2]),
        lambda: NoiseSchedule.from_betas([0.1, 1.0, 0.2]),
        lambda: NoiseSchedule.from_betas([0.1]),
        lambda: NoiseSchedule.from_betas([[0.1, 0.2]]),
        lambda: NoiseSchedule.from_betas([0.1, np.nan]),
        lambda: NoiseSchedule.from_betas("linear"),
        lambda: NoiseSchedule.from_betas([0.1, 1.0]),  # no signal at the start, with epsilon prediction
        lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.6]),
        lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.9]),
        lambda: NoiseSchedule.from_alphas_cumprod([1.1, 0.5]),
        lambda: NoiseSchedule.from_alphas_cumprod([0.5, -0.1]),
        lambda: NoiseSchedule.from_betas([0.1, 0.2], prediction_type="noise"),
        lambda: NoiseSchedule.from_betas([0.1, 0.2], prediction_type="edm"),
        lambda: NoiseSchedule.from_sigmas([1.0, 0.5]),
        lambda: NoiseSchedule.from_sigmas([0.0, 0.5]),
        lambda: NoiseSchedule.named("cosine"),
        lambda: NoiseSchedule.named("linear", beta_start=0.5, beta_end=0.1),
        lambda: NoiseSchedule.named("linear", zero_terminal_snr=True),
        lambda: NoiseSchedule.edm(sigma_min=1.0, sigma_max=0.5),
        lambda: NoiseSchedule.edm(sigma_data=0.0),
        lambda: NoiseSchedule.ve(timestep="steps"),
        lambda: NoiseSchedule.flow(shift=0.0),
        lambda: NoiseSchedule.flow(prediction_type="epsilon"),
        lambda: SCHEDULES["linear"].timesteps(5, "cosine"),
        lambda: SCHEDULES["linear"].timesteps(1001),
        lambda: SCHEDULES["linear"].alpha(1000),
        lambda: SCHEDULES["linear"].alpha([5.0, np.nan]),
        lambda: SCHEDULES["flow"].alpha(0.0),
        lambda: SCHEDULES["edm"].timestep_of_lam(50.0),
    ],
)
def test_nonsense_is_a_schedule_error(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScheduleError):
        make()


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5", None])
def test_bad_step_counts_are_input_errors(steps: object) -> None:
    with pytest.raises(InputError, match="steps"):
        SCHEDULES["linear"].timesteps(steps)  # type: ignore[arg-type]


def test_range_error_quotes_the_culprit() -> None:
    with pytest.raises(ScheduleError, match=r"1005.*\[0, 999\]"):
        SCHEDULES["linear"].sigma([10.0, 1005.0])


def test_describe_and_metadata_name_the_prediction_type(schedule: NoiseSchedule) -> None:
    assert schedule.prediction_type in schedule.describe()
    assert "\n" not in schedule.describe()
    assert schedule.metadata()["prediction_type"] == schedule.prediction_type
    assert schedule.describe() in repr(schedule)
