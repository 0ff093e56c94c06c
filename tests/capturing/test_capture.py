"""What capture promises beside the rows: levels, noise columns, metadata, recapture, the table of classes."""

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
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from plain_schedulers import Described, Plain, PlainDdim, PlainExploding, PlainFlow, PlainVelocity, Wrapped  # noqa: E402

from olss_fast.capturing.capturing import capture, recapture  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
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
CAPTURED = re.findall(r"^\| (\w+) \| \d+ \| \d+ \|", PAGE, flags=re.MULTILINE)
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


def beyond_one(kind: Any, **config: Any) -> Any:
    """A flow scheduler as Cosmos 2 sets it up."""
    scheduler = kind(use_karras_sigmas=True, **config)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    return scheduler


def test_flow_beyond_sigma_1_is_variance_exploding() -> None:
    """x + (sigma' - sigma) f has signal 1 and noise sigma if f is the noise; the signal 1 - sigma is no level."""
    scheduler = beyond_one(diffusers.FlowMatchEulerDiscreteScheduler)
    plan = capture(scheduler, 6)
    scheduler.set_timesteps(6)
    np.testing.assert_allclose(plan.sigmas, scheduler.sigmas, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(plan.alphas, 1.0)
    assert plan.metadata["prediction_type"] == "epsilon"
    assert np.abs(plan.point_mass_residual()).max() <= 1e-5  # float32 sigmas of up to 80
    with pytest.raises(ScheduleError, match="sigma_max 80"):
        NoiseSchedule.from_diffusers(scheduler)
    part = recapture(plan, begin=4)
    np.testing.assert_allclose(part.sigmas[:-1], plan.sigmas[4:-1])
    assert capture(scheduler, sigmas=[80.0, 20.0, 1.0, 0.5]).nfe == 4


@pytest.mark.parametrize(
    ("kind", "config"),
    [(diffusers.FlowMatchLCMScheduler, {}), (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True})],
)
def test_flow_beyond_sigma_1_that_noises_anew_is_refused(kind: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="begins at sigma 80, where the signal 1 - sigma of a flow is negative"):
        capture(beyond_one(kind, **config), 6)


def test_levels_that_cannot_be_known_are_refused() -> None:
    with pytest.raises(ScheduleError, match="noise levels of Plain are not known"):
        capture(Plain(), 3)


def test_any_object_with_the_interface_is_captured() -> None:
    plan = capture(Described(), 4)
    assert plan.nfe == 4
    np.testing.assert_allclose(plan.rows[-1, 1:], -np.array([1.0, 0.75, 0.5, 0.25]) / 4)
    with pytest.raises(InputError, match="no scheduler Described"):
        recapture(plan, begin=1)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "prediction"),
    [(PlainFlow, "flow"), (PlainExploding, "epsilon"), (PlainDdim, "epsilon"), (PlainVelocity, "v_prediction")],
)
def test_tables_of_a_plain_scheduler_are_read(kind: Any, prediction: str, steps: int) -> None:
    plan = capture(kind(), steps)
    assert plan.metadata["prediction_type"] == prediction
    assert np.abs(plan.point_mass_residual()).max() < 1e-9  # float64 tables
    assert (plan.alphas[-1], plan.sigmas[-1]) == pytest.approx((1.0, 0.0), abs=1e-9)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_predictions_are_found_without_a_config(name: str) -> None:
    """A wrapper that passes on everything but the config: the same plan."""
    scheduler = getattr(diffusers, name)()
    plan, expected = capture(Wrapped(scheduler), 5), capture(scheduler, 5)
    assert plan == expected
    assert plan.metadata["prediction_type"] == expected.metadata["prediction_type"]
    np.testing.assert_array_equal(plan.sigmas, expected.sigmas)


def test_a_prediction_that_is_not_known_is_left_open() -> None:
    scheduler = Described()
    scheduler.config = {}  # type: ignore[misc]
    plan = capture(scheduler, 4)
    assert "prediction_type" not in plan.metadata
    assert (plan.alphas[-1], plan.sigmas[-1]) == (1.0, 0.0)
    scheduler.config = None  # type: ignore[assignment, misc]
    assert capture(scheduler, 4) == plan


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


# --- metadata and recapture -------------------------------------------------------------------------------------------


def test_metadata() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    plan = capture(scheduler, 5)
    assert plan.metadata["method"] == "captured"
    assert solvers.display_name(plan) == "EulerDiscreteScheduler (linspace, karras)"
    assert NoiseSchedule.from_diffusers(scheduler).metadata().items() <= plan.metadata.items()
    facts = json.loads(plan.metadata["scheduler"])
    scheduler.set_timesteps(5)
    scales = 1.0 / (scheduler.sigmas[:-1] ** 2 + 1.0) ** 0.5
    np.testing.assert_allclose(facts.pop("scales"), scales, rtol=1e-6)
    assert facts.pop("config") == {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    assert facts == {
        "class": "EulerDiscreteScheduler",
        "steps": 5,
        "arguments": {},
        "step_arguments": {},
        "begin": 0,
        "order": 1,
        "noised_by_index": True,
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


@pytest.mark.parametrize("steps", [2, 4])
def test_a_later_start_with_no_noise_left_to_take_away(steps: int) -> None:
    """DDIM's last step from timestep 0 to the level of timestep 0: image-to-image of little strength ends so."""
    scheduler = ddim(set_alpha_to_one=False, timestep_spacing="leading")
    plan = capture(scheduler, steps, begin=steps - 1)
    assert plan.timesteps.tolist() == [0.0]
    np.testing.assert_allclose(plan.rows, [[1.0, 0.0], [1.0, 0.0]], atol=1e-7)
    assert plan.sigmas[1] == pytest.approx(plan.sigmas[0], rel=1e-6)
    with pytest.raises(ScheduleError, match="does not run from noise to data"):
        capture(diffusers.DDIMInverseScheduler(**SD, clip_sample=False), 4, begin=2)


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
