"""What capture refuses, and that it says why: schedulers that are no plans, and arguments that make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from olss_fast.errors import InputError, ScheduleError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from plain_schedulers import Described  # noqa: E402

from olss_fast.capturing.capturing import LINEARITY, capture  # noqa: E402
from olss_fast.support.arguments import MAX_EVALUATIONS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAN, INF = float("nan"), float("inf")


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{**SD, "clip_sample": False, "timestep_spacing": "trailing", **config})


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


# --- bounds and grids -------------------------------------------------------------------------------------------------


class Counting(Described):
    """Says whether anything was run."""

    asked = 0

    def set_timesteps(self, num_inference_steps: int = 0, timesteps: Any = None, sigmas: Any = None) -> None:
        type(self).asked += 1
        super().set_timesteps(num_inference_steps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 10**9},
        {"steps": MAX_EVALUATIONS + 1},
        {"timesteps": range(MAX_EVALUATIONS, -1, -1)},
        {"sigmas": torch.linspace(1, 0, MAX_EVALUATIONS + 1)},
    ],
    ids=str,
)
def test_plans_too_large_are_refused_before_anything_is_run(arguments: dict[str, Any]) -> None:
    Counting.asked = 0
    with pytest.raises(InputError, match=f"at most {MAX_EVALUATIONS} evaluations"):
        capture(Counting(), **arguments)
    assert Counting.asked == 0


def test_the_bound_holds_for_evaluations_too() -> None:
    with pytest.raises(InputError, match=r"HeunDiscreteScheduler is 2001; .* at most 2000"):
        capture(diffusers.HeunDiscreteScheduler(**SD), 1001)
    with pytest.raises(InputError, match="at most 2000"):
        capture(diffusers.HeunDiscreteScheduler(**SD, num_train_timesteps=4000), 2000)


GRIDS = [
    ("timesteps", [NAN, 500], r"timesteps\[0\] is nan"),
    ("timesteps", [INF, 500], r"timesteps\[0\] is inf"),
    ("timesteps", [], r"timesteps is \[\]; expected a list of at least one number"),
    ("timesteps", ["a"], "expected a list of at least one number"),
    ("timesteps", [True, False], "expected a list of at least one number"),
    ("timesteps", [[900, 500]], "expected a list of at least one number"),
    ("timesteps", [[900], [500, 3]], "expected a list of numbers"),
    ("timesteps", 500, "expected a list of at least one number"),
    ("timesteps", torch.empty(2, device="meta"), "expected a list of numbers"),
    ("timesteps", [5000, 500], r"timesteps\[0\] is 5000; .* from 0 to 1000"),
    ("timesteps", [500, -3], r"timesteps\[1\] is -3"),
    ("timesteps", [500, 500], "does not fall between steps 0 and 1, at timesteps 500 and 500"),
    ("timesteps", [900, 400, 500], "does not fall between steps 1 and 2, at timesteps 400 and 500"),
    ("sigmas", [NAN, 0.5], r"sigmas\[0\] is nan"),
    ("sigmas", [], "expected a list of at least one number"),
    ("sigmas", [0.9, -0.5], r"sigmas\[1\] is -0.5"),
]


@pytest.mark.parametrize(("name", "grid", "message"), GRIDS, ids=lambda value: str(value)[:25])
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_unusable_grids(kind: str, name: str, grid: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(getattr(diffusers, kind)(), **{name: grid})


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("grid", [[500, 500], [400, 500]])
def test_noise_must_fall(kind: str, grid: list[int]) -> None:
    with pytest.raises(InputError, match=f"the noise of {kind} does not fall between steps 0 and 1"):
        capture(getattr(diffusers, kind)(), timesteps=grid)


def test_flow_has_no_sigma_above_1() -> None:
    with pytest.raises(InputError, match=r"sigmas\[0\] is 1e\+30; .* from 0 to 1"):
        capture(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas=[1e30, 0.5])
    with pytest.raises(InputError, match="does not fall between steps 0 and 1"):
        capture(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas=[0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_arguments": [1]}, r"step_arguments is \[1\]; expected a mapping"),
        ({"step_arguments": "eta"}, "step_arguments is 'eta'; expected a mapping"),
        ({"device": "meta"}, "device is 'meta'; coefficients are computed on the CPU"),
        ({"device": "no such device"}, "device is 'no such device'"),
        ({"device": 1.5}, "device is 1.5"),
        ({"mu": NAN}, "mu is nan; expected a finite number"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 5, **arguments)


@pytest.mark.parametrize(
    "timesteps", [None, torch.empty(3, device="meta"), torch.empty(0), torch.tensor([NAN]), torch.ones(2, 2), "abc"]
)
def test_timesteps_that_a_scheduler_leaves_unusable(timesteps: Any) -> None:
    class Silent(Described):
        def set_timesteps(self, num_inference_steps: int) -> None:
            self.timesteps = timesteps

    with pytest.raises(ScheduleError, match=r"after set_timesteps its timesteps are .*; expected one row"):
        capture(Silent(), 3)


# --- what is found out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: torch.where(x.abs() > 1e4, 0.5 * x, x),
        lambda x: torch.where(x.abs() < 0.01, 0.5 * x, x),
        lambda x: x if x.abs().max() < 1e4 else 0.5 * x,
        lambda x: x if x.abs().max() > 1.0 else 0.5 * x,
        lambda x: x.clamp(-1e5, 1e5),
    ],
)
def test_branches_at_large_and_small_values(fault: Any) -> None:
    scheduler = Described()
    scheduler.fault = fault  # type: ignore[assignment]
    with pytest.raises(ScheduleError, match="not linear"):
        capture(scheduler, 3)


def test_equal_timesteps_are_named_as_the_cause() -> None:
    """1,000 steps of its 999 rounded times: two of them are the same, and the second-order formula divides by 0."""
    scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(ScheduleError, match=r"evaluation 501; timesteps 499 and 500 are both 500, .*fewer steps"):
        capture(scheduler, 1000)
    assert capture(scheduler, 500).nfe == 500
