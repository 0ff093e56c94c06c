"""What capture promises beside the rows: levels, noise columns, metadata, refusals, recapture, the table of classes."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from olss_fast import solvers
from olss_fast.errors import InputError, ScheduleError
from olss_fast.noise_schedule import NoiseSchedule
from olss_fast.plan import Plan

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from olss_fast.capturing import LINEARITY, capture, recapture  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[1]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOAT32_TABLES = 1e-4  # levels from float32 tables, amplified by the 1 / alpha = 160 of the first step


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{**SD, "clip_sample": False, "timestep_spacing": "trailing", **config})


# --- levels -----------------------------------------------------------------------------------------------------------


def load_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scheduler_table", ROOT / "tools" / "scheduler_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load_table()
PAGE = (ROOT / "docs" / "schedulers.md").read_text(encoding="utf-8")
CAPTURED = re.findall(r"^\| (\w+) \| \d+ \|", PAGE, flags=re.MULTILINE)
LEFT_BEHIND = {"IPNDMScheduler"}  # diffusers loses all signal where it divides by alpha = 0; its rows show it


@pytest.mark.parametrize("name", CAPTURED)
def test_rows_have_the_levels_they_claim(name: str) -> None:
    config = TABLE.CONFIG.get(name, {})
    scheduler = getattr(diffusers.schedulers, name)
    config = config | dict.fromkeys(TABLE.clipping_options(scheduler(**config)), False)
    plan = capture(scheduler(**config), TABLE.STEPS_OF_CLASS.get(name, 20), **TABLE.ARGUMENTS.get(name, {}))
    assert plan.sigmas[-1] <= plan.sigmas[:-1].min() + FLOAT32_TABLES
    if "prediction_type" in plan.metadata:
        residual = np.abs(plan.point_mass_residual())
        assert (residual.max() > 0.1) == (name in LEFT_BEHIND)
        assert name in LEFT_BEHIND or residual.max() <= FLOAT32_TABLES


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_levels_are_those_of_the_training_schedule(name: str, spacing: str) -> None:
    scheduler = getattr(diffusers, name)(**SD, timestep_spacing=spacing)
    plan = capture(scheduler, 7)
    alpha, sigma, _ = NoiseSchedule.from_diffusers(scheduler).levels(plan.timesteps)
    np.testing.assert_allclose(plan.alphas[:-1], alpha, atol=1e-5)  # float32 tables
    np.testing.assert_allclose(plan.sigmas[:-1], sigma, atol=1e-5)
    assert plan.sigmas[-1] <= 1e-5


def test_the_sample_keeps_the_noise_that_the_scheduler_leaves() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min")
    plan = capture(scheduler, 10)
    assert plan.sigmas[-1] == pytest.approx(0.0292, abs=1e-4)  # sqrt(0.00085)


def test_flow_with_a_shift_by_resolution() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plan = capture(scheduler, 6, mu=1.15)
    np.testing.assert_allclose(plan.sigmas[:-1], plan.timesteps / 1000, atol=1e-6)
    np.testing.assert_allclose(plan.alphas + plan.sigmas, 1.0, atol=1e-6)
    assert plan.metadata["prediction_type"] == "flow"


def test_inverted_flow_counts_time_toward_the_data() -> None:
    plan = capture(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 5)
    np.testing.assert_allclose(plan.alphas[:-1], plan.timesteps / 1000, atol=1e-6)
    assert "prediction_type" not in plan.metadata  # the velocity points the other way
    assert (plan.alphas[-1], plan.sigmas[-1]) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_levels_that_cannot_be_known_are_refused() -> None:
    with pytest.raises(ScheduleError, match="noise levels of Plain are not known"):
        capture(Plain(), 3)


class Plain:
    """The least interface of a scheduler: Euler from 1 to 0, with nothing said about levels."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        return (sample - timestep * model_output / len(self.timesteps),)


class Described(Plain):
    """Plain with a config and add_noise, and a fault on request."""

    config = {"prediction_type": "epsilon"}  # noqa: RUF012
    fault = staticmethod(lambda sample: sample)

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        return (self.fault(super().step(model_output, timestep, sample)[0]),)

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        return original_samples + timesteps.double() * noise


def test_any_object_with_the_interface_is_captured() -> None:
    plan = capture(Described(), 4)
    assert plan.nfe == 4
    np.testing.assert_allclose(plan.rows[-1, 1:], -np.array([1.0, 0.75, 0.5, 0.25]) / 4)
    with pytest.raises(InputError, match="no scheduler Described"):
        recapture(plan, begin=1)


# --- noises -----------------------------------------------------------------------------------------------------------


def test_unused_draws_keep_their_column_between_used_ones() -> None:
    plan = capture(diffusers.CogVideoXDPMScheduler(), 4)
    used = plan.rows[:, plan.noise_slice].any(axis=0)
    # From its second step on it draws twice and uses the second draw; the last step only draws once, without effect.
    assert used.tolist() == [True, False, True, False, True]


def test_trailing_draws_without_effect_are_dropped() -> None:
    assert capture(diffusers.EulerAncestralDiscreteScheduler(**SD), 5).noises == 4


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randn(x.shape),
        lambda x: torch.randn(*x.shape),
        lambda x: torch.randn(size=x.shape, dtype=torch.float32),
        lambda x: torch.randn_like(x, dtype=torch.float32),
        lambda x: torch.normal(0.0, 1.0, x.shape),
        lambda x: torch.normal(torch.zeros(x.shape), 1.0),
        lambda x: torch.normal(torch.zeros_like(x), torch.ones(x.shape), generator=torch.Generator()),
        lambda x: diffusers.utils.torch_utils.randn_tensor(x.shape, generator=torch.Generator()),
        lambda x: diffusers.utils.torch_utils.randn_tensor(x.shape, generator=[torch.Generator()], dtype=torch.float16),
    ],
)
def test_every_way_to_draw_gaussian_noise(draw: Any) -> None:
    scheduler = Described()
    scheduler.fault = lambda x: x + draw(x) / 8  # type: ignore[assignment]
    plan = capture(scheduler, 2)
    np.testing.assert_array_equal(plan.rows[:, plan.noise_slice], [[0, 0], [1 / 8, 0], [1 / 8, 1 / 8]])


def test_ancestral_noise_is_ours() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="leading")
    plan = capture(scheduler, 6)
    ours = solvers.euler_ancestral(NoiseSchedule.from_diffusers(scheduler), timesteps=plan.timesteps)
    np.testing.assert_allclose(plan.rows, ours.rows[:, : plan.columns], atol=1e-5)  # float32 tables


# --- the scheduler is left alone, and nothing of it is rounded --------------------------------------------------------


def test_the_scheduler_is_not_touched() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**SD)
    scheduler.set_timesteps(7)
    before = copy.deepcopy(scheduler.__dict__)
    capture(scheduler, 4)
    assert repr(scheduler.__dict__) == repr(before)
    random = torch.random.get_rng_state()
    capture(diffusers.DDPMScheduler(clip_sample=False), 4)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_states_are_not_rounded_where_the_scheduler_casts_to_float32() -> None:
    """EulerDiscrete casts its state to float32 and back. x_T only passes through additions of 0, so its coefficient
    after division by c_in must be the same float64 number in every row."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    plan = capture(scheduler, 8)
    scheduler.set_timesteps(8)
    scales = (scheduler.sigmas**2 + 1) ** 0.5
    unscaled = plan.rows[:-1, 0] * scales[:-1].double().numpy()
    np.testing.assert_allclose(unscaled, plan.rows[-1, 0], rtol=1e-15)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (object(), "no diffusers scheduler"),
        (diffusers.DDIMScheduler, "no diffusers scheduler"),
        (diffusers.DDIMScheduler(), "clip_sample=False"),
        (diffusers.DDIMScheduler(thresholding=True), "clip_sample=False, thresholding=False"),
        (diffusers.DDPMScheduler(), "clip_sample=False"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "thresholding=False"),
        (diffusers.UniPCMultistepScheduler(thresholding=True), "thresholding=False"),
        (diffusers.CMStochasticIterativeScheduler(), "clip_denoised=False"),
        (diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"), "fixed_small"),
        (diffusers.UnCLIPScheduler(clip_sample=False, variance_type="learned_range"), "fixed_small"),
        (diffusers.RePaintScheduler(), "needs the image and the mask"),
        (diffusers.VQDiffusionScheduler(num_vec_classes=5), "discrete tokens"),
        (diffusers.ScoreSdeVeScheduler(), "has no step"),
        (diffusers.KarrasVeScheduler(), "step takes model_output, sigma_hat"),
        (diffusers.DDIMInverseScheduler(clip_sample=False), "does not run from noise to data"),
        (diffusers.DPMSolverMultistepInverseScheduler(), "does not run from noise to data"),
        (diffusers.HeliosScheduler(), "stages=1"),
        (diffusers.IPNDMScheduler(), "a sample of zeros"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value.split()[0],
)
def test_schedulers_that_are_no_plans(scheduler: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        capture(scheduler, 1)


def test_what_is_advised_works() -> None:
    scheduler = diffusers.DDIMScheduler(thresholding=True)
    assert capture(scheduler.from_config(scheduler.config, clip_sample=False, thresholding=False), 3).nfe == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x.clamp(-1.5, 1.5), "not linear"),
        (lambda x: x + 1.0, "not linear"),
        (lambda x: x * x, "not linear"),
        (lambda x: x - x.mean(dim=(-1, -2), keepdim=True), "not linear"),
        (lambda x: x.flip(-1), "not linear"),
        (lambda x: x / x.abs().amax().clamp(min=1.0), "not linear"),
        (lambda x: torch.round(x, decimals=5), "not linear"),
        (lambda x: x.repeat(1, 2, 1, 1), "keeps the shape"),
        (lambda x: x + torch.rand(x.shape), "draws with torch.rand"),
        (lambda x: x + torch.randn(1), r"draws noise of shape \(1,\)"),
        (lambda x: x[7], "cannot be captured: at evaluation 0"),
    ],
)
def test_unknown_schedulers_are_found_out(fault: Any, message: str) -> None:
    scheduler = Described()
    scheduler.fault = fault  # type: ignore[assignment]
    with pytest.raises(ScheduleError, match=message):
        capture(scheduler, 3)


def test_a_wide_clipping_range_is_refused_as_well() -> None:
    with pytest.raises(ScheduleError, match="clip_sample=False"):
        capture(ddim(clip_sample=True, clip_sample_range=1e6), 3)


def test_the_bound_of_linearity_leaves_room_for_rounding_only() -> None:
    """DDIM with 1 / alpha = 160 at its first step and 50 steps stays four orders of magnitude below LINEARITY."""
    scheduler = Described()
    scheduler.fault = lambda x: x * (1.0 + 1e-13 * torch.sign(x))  # type: ignore[assignment]
    assert LINEARITY == 1e-9
    assert capture(scheduler, 3).nfe == 3
    scheduler.fault = lambda x: x * (1.0 + 1e-7 * torch.sign(x))  # type: ignore[assignment]
    with pytest.raises(ScheduleError, match="not linear"):
        capture(scheduler, 3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "5"])
def test_unusable_steps(steps: Any) -> None:
    with pytest.raises(InputError, match="steps is"):
        capture(ddim(), steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "steps is None"),
        ({"steps": 5, "sigmas": [1.0]}, "set_timesteps does not take sigmas; it takes num_inference_steps, device"),
        ({"steps": 5, "step_arguments": {"churn": 1}}, "step does not take churn"),
        ({"steps": 5, "begin": 5}, "begin is 5; expected a whole number from 0 to 4"),
        ({"steps": 5, "begin": -1}, "begin is -1"),
        ({"steps": 5, "begin": 1.0}, "begin is 1.0"),
        ({"steps": 5, "step_arguments": {"generator": torch.Generator()}}, "cannot be written down"),
    ],
)
def test_unusable_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(ddim(), **arguments)


def test_a_run_cannot_start_inside_a_step() -> None:
    with pytest.raises(InputError, match="multiple of 2"):
        capture(diffusers.HeunDiscreteScheduler(**SD), 5, begin=3)


def test_what_the_scheduler_rejects_is_said_in_its_words() -> None:
    with pytest.raises(ScheduleError, match="at set_timesteps, `num_inference_steps`: 2000 cannot be larger"):
        capture(ddim(), 2000)


# --- metadata and recapture -------------------------------------------------------------------------------------------


def test_metadata() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    plan = capture(scheduler, 5)
    assert plan.metadata["method"] == "captured"
    assert solvers.display_name(plan) == "EulerDiscreteScheduler (linspace, karras)"
    assert NoiseSchedule.from_diffusers(scheduler).metadata().items() <= plan.metadata.items()
    facts = json.loads(plan.metadata["scheduler"])
    assert facts.pop("config") == {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    assert facts == {
        "class": "EulerDiscreteScheduler",
        "steps": 5,
        "arguments": {},
        "step_arguments": {},
        "begin": 0,
        "order": 1,
    }


def test_saved_and_loaded(tmp_path: Path) -> None:
    plan = capture(ddim(), 5, step_arguments={"eta": 0.3})
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert recapture(again) == plan
    assert recapture(again, begin=2) == capture(ddim(), 5, begin=2, step_arguments={"eta": 0.3})


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_a_later_start(name: str) -> None:
    """Of a whole run, the rows from `begin` on; not equal for multistep solvers, which start anew."""
    plan = capture(getattr(diffusers, name)(**SD), 6)
    later = recapture(plan, begin=2)
    np.testing.assert_array_equal(later.timesteps, plan.timesteps[2:])
    np.testing.assert_allclose(later.alphas[:-1], plan.alphas[2:-1], rtol=1e-12)
    np.testing.assert_allclose(later.sigmas[:-1], plan.sigmas[2:-1], rtol=1e-12)
    assert np.array_equal(later.rows[0], np.eye(5)[0])
    if name == "EulerDiscreteScheduler":
        share = plan.rows[2:] - np.outer(later.rows[:, 0], plan.rows[2])  # what comes after row 2
        np.testing.assert_allclose(share[:, 3:], later.rows[:, 1:], atol=1e-12)
    assert recapture(later, begin=0) == plan


def test_other_arguments() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plan = capture(scheduler, 6, mu=0.5)
    assert recapture(plan, mu=1.15) == capture(scheduler, 6, mu=1.15)
    assert recapture(plan, steps=4) == capture(scheduler, 4, mu=0.5)
    grid = [1.0, 0.6, 0.2]
    custom = recapture(plan, sigmas=grid)
    assert custom == capture(scheduler, sigmas=grid, mu=0.5)
    assert recapture(custom, steps=6) == plan
    assert recapture(custom, sigmas=None, steps=6) == plan
    assert recapture(plan, steps=3, sigmas=grid) == custom
    array = capture(scheduler, sigmas=np.array(grid), mu=0.5)
    assert array == recapture(array) == custom


def test_learned_betas_survive() -> None:
    betas = np.linspace(1e-3, 1e-2, 50)
    scheduler = ddim(trained_betas=betas, num_train_timesteps=50)
    assert recapture(capture(scheduler, 5)) == capture(scheduler, 5)


def test_plans_that_cannot_be_derived_again() -> None:
    plan = capture(ddim(), 3)
    with pytest.raises(InputError, match="method is 'ddim'"):
        recapture(solvers.ddim(NoiseSchedule.from_diffusers(ddim()), 3))
    for text in ("", "[]", "{}", '{"class": 3}', "null"):
        with pytest.raises(InputError, match="not what capture writes"):
            recapture(plan.replace(metadata={**plan.metadata, "scheduler": text}))
    for name in ("NoScheduler", "SchedulerMixinX", "UNet2DModel", "logging"):
        text = plan.metadata["scheduler"].replace("DDIMScheduler", name)
        with pytest.raises(InputError, match=f"no scheduler {name}"):
            recapture(plan.replace(metadata={**plan.metadata, "scheduler": text}))


def test_a_scheduler_altered_by_hand_is_not_derived_again() -> None:
    scheduler = ddim()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.1
    plan = capture(scheduler, 3)
    with pytest.raises(InputError, match="makes other rows"):
        recapture(plan, begin=1)


# --- the table of classes ---------------------------------------------------------------------------------------------


def test_the_committed_table_is_what_the_tool_makes() -> None:
    if f"from diffusers {diffusers.__version__}." not in PAGE:
        pytest.skip(f"the table is not of diffusers {diffusers.__version__}: run python tools/scheduler_table.py")
    assert TABLE.page() == PAGE


def test_every_class_is_captured_or_refused_by_name() -> None:
    entries = [TABLE.entry(name) for name in TABLE.scheduler_classes()]
    assert [entry.name for entry in entries if entry.nfe] == CAPTURED
    for entry in entries:
        assert bool(entry.reason) != bool(entry.nfe)
        assert "Error" not in entry.reason  # of some other kind than ours
