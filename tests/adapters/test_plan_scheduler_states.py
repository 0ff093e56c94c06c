"""What a pipeline holds between two steps of a PlanScheduler is the state of the scheduler its plan was captured from:
at every start, every stop and every noising, in every class that can be captured.

So a run may be cut anywhere and go on with either of the two.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from plain_schedulers import PlainExploding
from plan_runs import BETAS, NOISE, SCHEDULE, network, run
from scheduler_kinds import KINDS
from scheduler_runs import DRAWS_FLOAT32, stepping
from torch import Tensor

from olss_fast import NoiseSchedule, PlanScheduler, capture, solvers
from olss_fast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = {"ConsistencyDecoderScheduler": 2, "PNDMScheduler": 4}  # of the others 3
FLOAT32 = 5e-6  # of the largest state so far: the tables of most schedulers, and the states of some, are float32
ENDS_AT_CLEAN = ("SCMScheduler", "DDPMWuerstchenScheduler")  # their last timestep is none of the loop's


def options(name: str) -> list[dict[str, Any]]:
    """Configs of a class: every spacing with its first prediction type, and Karras sigmas."""
    kind = KINDS[name]
    first = {} if kind.predictions[0] is None else {"prediction_type": kind.predictions[0]}
    base = {**kind.config, **first, **({"num_train_timesteps": 100} if name.startswith("KDPM2") else {})}  # else slow
    configs = [{**base, "timestep_spacing": spacing} if spacing else base for spacing in kind.spacings]
    parameters = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters
    return configs + [{**base, "use_karras_sigmas": True}] * ("use_karras_sigmas" in parameters)


CASES = [(name, config) for name in KINDS for config in options(name)]


def case_id(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(str(each) for each in value.values())


class Pair:
    """A scheduler and the PlanScheduler of its plan, both with their timesteps set."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        steps, arguments = STEPS.get(name, 3), KINDS[name].arguments
        self.own = getattr(diffusers.schedulers, name)(**config)
        self.ours = PlanScheduler(capture(self.own, steps, **arguments))
        self.check_amplitude()
        for scheduler in (self.own, self.ours):
            scheduler.set_timesteps(steps, **arguments)
        self.check_amplitude()
        self.timesteps = self.own.timesteps[:-1] if name in ENDS_AT_CLEAN else self.own.timesteps
        self.order = getattr(self.own, "order", 1)
        self.starts = range(0, len(self.timesteps), self.order)
        for start in self.starts:  # once, for all copies
            self.ours.set_begin_index(start)
        self.ours.set_timesteps(steps, **arguments)
        self.noise = NOISE.float() if name in DRAWS_FLOAT32 else NOISE

    def check_amplitude(self) -> None:
        expected = getattr(self.own, "init_noise_sigma", None)  # flows have none, ConsistencyDecoder not yet
        assert expected is None or self.ours.init_noise_sigma == pytest.approx(float(expected), rel=1e-6)

    def begun(self, begin: int | None) -> tuple[Any, PlanScheduler]:
        own, ours = copy.deepcopy(self.own), copy.deepcopy(self.ours)
        if begin is not None:
            ours.set_begin_index(begin)
            if hasattr(own, "set_begin_index"):
                own.set_begin_index(begin)
        return own, ours

    def states(self, scheduler: Any, begin: int, stop: int) -> list[Tensor]:
        """What a pipeline holds, from the start on and after each step up to timestep `stop`."""
        takes = "generator" in inspect.signature(scheduler.step).parameters
        noises = {"generator": torch.Generator().manual_seed(7)} if takes else {}
        step = stepping(scheduler, self.timesteps, noises)
        if isinstance(scheduler, PlanScheduler):  # takes what every scheduler takes

            def step(output: Tensor, index: int, state: Tensor) -> Tensor:
                return scheduler.step(output, self.timesteps[index], state, **noises).prev_sample  # type: ignore

        held = [self.noise * (1.0 if begin else float(getattr(scheduler, "init_noise_sigma", 1.0)))]
        for index in range(begin, stop):
            scaled = getattr(scheduler, "scale_model_input", lambda state, _: state)(held[-1], self.timesteps[index])
            held.append(step(network(scaled, self.timesteps[index]), index, held[-1]))
        return held


def check_states(pair: Pair) -> None:
    for begin in pair.starts:
        own, ours = pair.begun(begin or None)
        expected, found = (pair.states(scheduler, begin, len(pair.timesteps)) for scheduler in (own, ours))
        largest = 0.0
        for k, (state, theirs) in enumerate(zip(found, expected, strict=True)):
            largest = max(largest, float(theirs.abs().max()))
            assert float((state - theirs).abs().max()) <= FLOAT32 * largest, f"begun at {begin}, after {k} steps"


def noiser(scheduler: Any) -> Callable[..., Tensor] | None:
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise  # type: ignore[no-any-return]
    scale = getattr(scheduler, "scale_noise", None)
    return scale and (lambda image, noise, timestep: scale(image, timestep, noise))


def check_noisings(pair: Pair) -> None:
    """Before the first step and after it, with a begin index and without, whatever timestep is told."""
    image, noise = NOISE, NOISE.flip(0)
    for begin, taken in [(None, 0)] + [(start, taken) for start in pair.starts for taken in (0, 1)]:
        own, ours = pair.begun(begin)
        for scheduler in (own, ours):
            pair.states(scheduler, begin or 0, (begin or 0) + taken)
        for timestep in pair.timesteps.split(1):
            expected = noiser(copy.deepcopy(own))(image, noise, timestep)  # type: ignore[misc]  # Heun's remembers
            found = ours.add_noise(image, noise, timestep)
            assert float((found - expected).abs().max()) <= FLOAT32 * float(expected.abs().max()), (begin, timestep)


@pytest.mark.parametrize(("name", "config"), CASES, ids=case_id)
def test_states_and_noisings_are_the_schedulers_own(name: str, config: dict[str, Any]) -> None:
    pair = Pair(name, config)
    check_states(pair)
    if noiser(pair.own) is not None:
        check_noisings(pair)
    for inside in set(range(len(pair.timesteps))) - set(pair.starts):
        with pytest.raises(InputError, match="inside a step"):
            pair.ours.set_begin_index(inside)


# --- schedulers and plans of other kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchLCMScheduler", {}),
        ("LTXEulerAncestralRFScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("LCMScheduler", {}),
    ],
    ids=case_id,
)
def test_noise_of_a_seed_is_the_schedulers_own_in_half_precision(name: str, config: dict[str, Any]) -> None:
    pair = Pair(name, config)
    # no multiple of 16 numbers, which all dtypes draw alike
    pair.noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).half()
    theirs, found = (pair.states(scheduler, 0, len(pair.timesteps))[-1].double() for scheduler in (pair.own, pair.ours))
    assert float((found - theirs).norm()) <= 0.01 * float(theirs.norm())


def test_flow_beyond_sigma_1() -> None:
    """Image and noise are mixed as the scheduler does, with a negative signal."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    own.register_to_config(sigma_max=80.0, sigma_min=0.002)
    ours = PlanScheduler(capture(own, 4), own)
    for scheduler in (own, ours):
        scheduler.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, own.sigmas, rtol=1e-6, atol=1e-5)
    expected = own.scale_noise(NOISE, own.timesteps[:2], NOISE.flip(0))
    torch.testing.assert_close(ours.scale_noise(NOISE, own.timesteps[:2], NOISE.flip(0)), expected, rtol=1e-6, atol=0)


def test_a_scheduler_of_ones_own_that_scales_its_input() -> None:
    own = PlainExploding()
    ours = PlanScheduler(capture(own, 4))
    for scheduler in (own, ours):
        scheduler.set_timesteps(4)
    assert ours.init_noise_sigma == 14.0
    state = theirs = 14.0 * NOISE
    for timestep in own.timesteps:
        theirs = own.step(network(own.scale_model_input(theirs, timestep), timestep), timestep, theirs)[0]
        state = ours.step(network(ours.scale_model_input(state, timestep), timestep), timestep, state).prev_sample
        torch.testing.assert_close(state, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [4, 7])
def test_other_plans_take_the_unit_of_the_slot(steps: int) -> None:
    """Analytic DDIM in the slot of EulerDiscreteScheduler holds Euler's states, which are the same sampler's."""
    own = diffusers.EulerDiscreteScheduler(**BETAS)
    own.set_timesteps(steps)
    plan = solvers.ddim(NoiseSchedule.from_diffusers(own), timesteps=own.timesteps.double().numpy())
    ours = PlanScheduler(plan, own)
    ours.set_timesteps(steps)
    assert ours.init_noise_sigma == pytest.approx(float((own.sigmas[0] ** 2 + 1.0) ** 0.5), rel=1e-5)
    for begin in (0, 2):
        for scheduler in (own, ours):
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(begin)
        noised = [
            scheduler.add_noise(NOISE, NOISE.flip(0), own.timesteps[begin : begin + 1]) for scheduler in (own, ours)
        ]
        torch.testing.assert_close(noised[1], noised[0], rtol=1e-5, atol=1e-5)
        expected, found = (run(scheduler, NOISE * 14.0, begin=begin) for scheduler in (own, ours))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # Euler interpolates sigma, we the log-SNR


def test_scale_model_input_takes_what_others_take() -> None:
    ours = PlanScheduler(capture(diffusers.EulerDiscreteScheduler(**BETAS), 3))
    ours.set_timesteps(3)
    first = ours.scale_model_input(NOISE, ours.timesteps[0], 5, is_first=True)
    torch.testing.assert_close(first, NOISE / (ours.init_noise_sigma**2 + 1.0) ** 0.5)
    plain = PlanScheduler(capture(diffusers.DDIMScheduler(clip_sample=False), 3))
    assert plain.scale_model_input(NOISE) is NOISE


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(**BETAS, clip_sample=False),
        diffusers.DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(**BETAS),
        diffusers.EDMEulerScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__ + scheduler.config.prediction_type,
)
def test_the_clean_image_that_a_step_predicts_is_the_schedulers(scheduler: Any) -> None:
    own, ours = copy.deepcopy(scheduler), PlanScheduler(capture(scheduler, 5))
    for each in (own, ours):
        each.set_timesteps(5)
    x = NOISE.double() * float(own.init_noise_sigma)
    for timestep in own.timesteps:
        output = torch.sin(own.scale_model_input(x, timestep))
        expected = own.step(output, timestep, x)
        found = ours.step(output, timestep, x)
        scale = expected.pred_original_sample.abs().max()  # 1e-5: the schedulers' tables are float32
        assert (found.pred_original_sample - expected.pred_original_sample).abs().max() <= 1e-5 * scale
        x = expected.prev_sample


def test_the_clean_image_of_a_plan_that_says_not_what_its_network_predicts() -> None:
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 3).replace(metadata={}))
    scheduler.set_timesteps(3)
    output = scheduler.step(NOISE, scheduler.timesteps[0], NOISE)
    assert not hasattr(output, "pred_original_sample")
    assert [*output] == ["prev_sample"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_outputs_of_steps_can_be_copied(copied: Any) -> None:
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 3))
    scheduler.set_timesteps(3)
    output = scheduler.step(NOISE, scheduler.timesteps[0], NOISE)
    assert torch.equal(copied(output).prev_sample, output.prev_sample)


@pytest.mark.parametrize("kind", [diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler])
def test_the_index_of_a_timestep_is_the_schedulers(kind: Any) -> None:
    own = kind(**BETAS)
    ours = PlanScheduler(capture(own, 5))
    for each in (own, ours):
        each.set_timesteps(5)
    assert [ours.index_for_timestep(t) for t in ours.timesteps.tolist()] == [
        own.index_for_timestep(t) for t in own.timesteps
    ]
    assert ours.index_for_timestep(torch.tensor(3.0), torch.tensor([7.0, 3.0])) == 1
    with pytest.raises(InputError, match="timestep"):
        ours.index_for_timestep(1234)


def test_a_plan_for_another_schedule_is_refused_beside_a_scheduler() -> None:
    other = diffusers.DDIMScheduler(beta_start=0.1, beta_end=0.2)
    with pytest.raises(InputError, match="does not fit this DDIMScheduler"):
        PlanScheduler(solvers.ddim(SCHEDULE, 3), other)
    PlanScheduler(solvers.ddim(SCHEDULE, 3), {**other.config, "_class_name": "DDIMScheduler"})  # taken at its word
