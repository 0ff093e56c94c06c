"""PlanScheduler asked for what it cannot do, with values that are none, or made from a damaged config: named errors."""

from __future__ import annotations

import copy
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from plan_runs import BETAS, DDIM, DPM, NOISE, SCHEDULE, network, reference, run, sampled

from olss_fast import NoiseSchedule, Plan, PlanScheduler, capture, solvers
from olss_fast.errors import InputError, OlssError, ScheduleError
from olss_fast.solvers.rederive import mismatch, truncate

pytestmark = pytest.mark.filterwarnings("ignore")
SINGLE = NOISE.float()


def ready(plan: Plan | None = None, steps: int = 5) -> PlanScheduler:
    scheduler = PlanScheduler(capture(DPM, steps) if plan is None else plan)
    scheduler.set_timesteps(steps)
    return scheduler


# --- arguments of step ------------------------------------------------------------------------------------------------


def test_step_arguments_are_those_of_the_capture() -> None:
    """TCD draws with its own default, 0.3, where nobody says otherwise; a plan of it takes no other value."""
    tcd = diffusers.TCDScheduler(**BETAS)
    default, given = capture(tcd, 4), capture(tcd, 4, step_arguments={"eta": 0.0})
    for plan, right, wrong in ((default, 0.3, 0.0), (given, 0.0, 0.3)):
        scheduler = ready(plan, 4)
        for eta in (None, right):
            scheduler.set_timesteps(4)
            run(scheduler, SINGLE, eta=eta)
        scheduler.set_timesteps(4)
        with pytest.raises(InputError, match=rf"eta={wrong}.*captured with eta={right}.*'eta': {wrong}"):
            run(scheduler, SINGLE, eta=wrong)
    scheduler = ready(capture(DDIM, 4, step_arguments={"eta": 1.0}), 4)
    with pytest.raises(InputError, match=r"captured with eta=1\.0"):
        run(scheduler, SINGLE, eta=0.0)
    with pytest.raises(InputError, match=r"captured with eta=0\.0"):
        run(ready(capture(DDIM, 4), 4), SINGLE, eta=1.0)


def test_arguments_that_the_captured_class_does_not_know() -> None:
    scheduler = ready(capture(diffusers.EulerDiscreteScheduler(**BETAS), 5))
    expected = run(scheduler, SINGLE)
    scheduler.set_timesteps(5)
    neutral = {"eta": 0.0, "s_churn": 0.0, "s_tmax": float("inf"), "s_noise": 1.0, "variance_noise": None}
    assert torch.equal(run(scheduler, SINGLE, **neutral), expected)
    scheduler.set_timesteps(5)  # pipelines hand eta to schedulers that have it; Euler never sees it
    assert torch.equal(run(scheduler, SINGLE, eta=1.0), expected)


@pytest.mark.parametrize("bad", [{"eta": np.zeros(3)}, {"eta": NOISE}, {"t": "x"}, {"eta": "much"}])
def test_unusable_step_arguments(bad: dict[str, Any]) -> None:
    for plan in (capture(DDIM, 5), solvers.ddim(SCHEDULE, 5)):
        with pytest.raises(InputError, match=next(iter(bad))) as caught:
            run(ready(plan), SINGLE, **bad)
        assert len(str(caught.value)) < 600  # no whole tensors


def test_prev_timestep_of_unclip() -> None:
    """Its pipelines say where each step goes: what was captured is taken, anything else is not."""
    original = diffusers.UnCLIPScheduler(clip_sample=False, variance_type="fixed_small_log")
    plan = capture(original, 5)
    scheduler = ready(plan)
    following = [*scheduler.timesteps[1:], None]
    streams = [torch.Generator().manual_seed(1) for _ in range(2)]
    original.set_timesteps(5)
    x = y = SINGLE
    for t, after in zip(scheduler.timesteps, following, strict=True):
        x = original.step(network(x, t), t, x, prev_timestep=after, generator=streams[0]).prev_sample
        y = scheduler.step(network(y, t), t, y, prev_timestep=after, generator=streams[1]).prev_sample
    assert (y - x).abs().max() <= 1e-5 * x.abs().max()  # float32 on both sides; it begins by dividing by 5e-5
    for wrong in (scheduler.timesteps[2], torch.tensor(3)):
        with pytest.raises(InputError, match="prev_timestep"):
            ready(plan).step(SINGLE, scheduler.timesteps[0], SINGLE, prev_timestep=wrong)


def test_two_values_for_consistency_models() -> None:
    scheduler = ready()
    first, second = scheduler.step(SINGLE, scheduler.timesteps[0], SINGLE, return_dict=False)
    assert first is second


def test_schedulers_whose_timesteps_end_with_the_clean_image() -> None:
    """Pipelines of SCMScheduler drop the last timestep, so there has to be one to drop."""
    original = diffusers.SCMScheduler()
    original.set_timesteps(2)
    scheduler = ready(capture(original, 2), 2)
    torch.testing.assert_close(scheduler.timesteps, original.timesteps.float())
    streams = [torch.Generator().manual_seed(1) for _ in range(2)]
    x = y = SINGLE
    for t, ours in zip(original.timesteps[:-1], scheduler.timesteps[:-1], strict=True):
        x, x0 = original.step(network(x, t), t, x, generator=streams[0], return_dict=False)
        y, y0 = scheduler.step(network(y, t), ours, y, generator=streams[1], return_dict=False)
    torch.testing.assert_close(y0, x0, rtol=1e-5, atol=1e-5)


# --- arguments of set_timesteps, set_begin_index and add_noise --------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"num_inference_steps": [5]},
        {"num_inference_steps": np.zeros(5)},
        {"num_inference_steps": "5"},
        {"timesteps": 5},
        {"timesteps": (t for t in (3, 2, 1))},
        {"timesteps": ["x"]},
        {"timesteps": [900, float("nan")]},
        {"sigmas": []},
        {"num_inference_steps": 5, "mu": "x"},
        {"num_inference_steps": 5, "mu": NOISE},
    ],
)
@pytest.mark.parametrize("kind", ["captured", "analytic"])
def test_unusable_arguments_of_set_timesteps(asked: dict[str, Any], kind: str) -> None:
    scheduler = PlanScheduler(capture(DPM, 5) if kind == "captured" else solvers.ddim(SCHEDULE, 5))
    with pytest.raises(InputError, match=list(asked)[-1]) as caught:
        scheduler.set_timesteps(**asked)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("five", [np.int64(5), np.array(5), torch.tensor(5)])
def test_whole_numbers_of_any_kind(five: Any) -> None:
    scheduler = PlanScheduler(capture(DPM, 5))
    scheduler.set_timesteps(five)
    assert scheduler.num_inference_steps == 5


def test_a_scheduler_without_mu() -> None:
    with pytest.raises(InputError, match=r"with begin=0, mu=1\.0|mu=1\.0"):
        ready().set_timesteps(5, mu=1.0)


def test_begin_index() -> None:
    scheduler = ready()
    scheduler.set_begin_index(np.int64(2))
    torch.testing.assert_close(run(scheduler, NOISE, begin=2), reference(capture(DPM, 5, begin=2), NOISE))
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(1)
    for refused in (7, "a", None, NOISE):
        with pytest.raises(InputError, match="cannot begin at index") as caught:
            scheduler.set_begin_index(refused)
        assert len(str(caught.value)) < 200
        assert scheduler.begin_index == 1


@pytest.mark.parametrize("told", [12345, float("nan"), torch.tensor(12345), "x", None, [1, 2], torch.empty(0)])
def test_a_first_timestep_that_is_nowhere(told: Any) -> None:
    with pytest.raises(InputError, match="timestep"):
        ready().step(SINGLE, told, SINGLE)


def test_a_first_timestep_in_half_precision() -> None:
    """937 is 936 in bfloat16: still the timestep it was rounded from."""
    scheduler = ready(solvers.ddim(SCHEDULE, 5))
    rounded = scheduler.timesteps.to(torch.bfloat16)[2].clone()
    assert rounded.float() != scheduler.timesteps[2]
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 5), DDIM)
    scheduler.set_timesteps(5)
    scheduler.step(SINGLE, rounded, SINGLE)
    assert scheduler.step_index == 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_nothing_is_computed_in(dtype: torch.dtype) -> None:
    scheduler = ready()
    with pytest.raises(InputError, match="floating-point tensor"):
        scheduler.step(SINGLE, scheduler.timesteps[0], SINGLE.to(dtype))
    with pytest.raises(OlssError, match="model_output of step 0"):
        scheduler.step(SINGLE.to(dtype), scheduler.timesteps[0], SINGLE)


def test_timesteps_of_add_noise() -> None:
    scheduler = PlanScheduler(capture(DPM, 5), DPM)
    scheduler.set_timesteps(5)
    listed = scheduler.add_noise(SINGLE, SINGLE, [3, 5])
    assert torch.equal(listed, scheduler.add_noise(SINGLE, SINGLE, torch.tensor([3, 5])))
    for wrong in (None, "x", [1, 2, 3], [[1], [2, 3]]):
        with pytest.raises(InputError, match="add_noise"):
            scheduler.add_noise(SINGLE, SINGLE, wrong)
    with pytest.raises(InputError, match=r"noise of shape \(2, 3"):
        scheduler.add_noise(SINGLE, SINGLE[:, :3], 3)


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_a_mapping_of_plans() -> None:
    plans = {4: solvers.ddim(SCHEDULE, 4), 6: solvers.unipc(SCHEDULE, 6)}
    assert PlanScheduler(plans).plans == tuple(plans.values())
    with pytest.raises(InputError, match="no plan"):
        PlanScheduler({})


def test_length_and_alphas_cumprod() -> None:
    assert len(PlanScheduler(capture(DPM, 2))) == len(DPM) == 1000
    assert len(PlanScheduler(solvers.ddim(SCHEDULE, 2))) == 1000
    assert not hasattr(PlanScheduler(solvers.ddim(SCHEDULE, 2), {}), "alphas_cumprod")


def test_step_arguments_in_a_compiled_loop() -> None:
    torch._dynamo.reset()
    scheduler = ready(capture(DDIM, 3), 3)
    expected = run(scheduler, SINGLE)

    def loop(sample: torch.Tensor) -> torch.Tensor:
        for timestep in scheduler.timesteps:
            output = torch.sin(sample.roll(1, -1) + timestep / 300.0)
            sample = scheduler.step(output, timestep, sample, eta=0.0, return_dict=False)[0]
        return sample

    scheduler.set_timesteps(3)
    found = torch.compile(loop, fullgraph=True, backend="eager")(SINGLE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_in_the_middle_of_a_run_with_gradients() -> None:
    """The copy goes on alone, and its gradients reach the same start."""
    scheduler = ready(solvers.dpm_solver_pp(SCHEDULE, 5))
    start = NOISE.clone().requires_grad_()
    sample = start
    for timestep in scheduler.timesteps[:2]:
        sample = scheduler.step(network(sample, timestep), timestep, sample).prev_sample
    again, middle = copy.deepcopy(scheduler), sample
    found = []
    for each in (scheduler, again):
        sample = middle
        for timestep in each.timesteps[2:]:
            sample = each.step(network(sample, timestep), timestep, sample).prev_sample
        found.append(torch.autograd.grad(sample.sum(), start, retain_graph=True)[0])
    assert torch.equal(found[0], found[1])
    assert found[0].abs().max() > 0


class Mine(diffusers.DPMSolverMultistepScheduler):
    """A class that diffusers does not have."""


def test_classes_that_cannot_be_derived_again() -> None:
    own = Mine(**BETAS)
    with pytest.raises(InputError, match=r"Mine, and only classes of diffusers.*capture.*begin=2"):
        ready(capture(own, 5)).set_begin_index(2)
    part = capture(own, 5, begin=2)  # as the message says
    scheduler = ready(part)
    assert len(scheduler.timesteps) == 5
    scheduler.set_begin_index(2)
    torch.testing.assert_close(run(scheduler, NOISE, begin=2), reference(part, NOISE))
    with pytest.raises(InputError, match=r"begin=0"):
        ready(part).set_begin_index(0)


# --- damaged configs --------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Any] = {
    "trained_betas": "xx",
    "beta_start": "xx",
    "beta_end": None,
    "num_train_timesteps": "a",
    "steps_offset": [1],
    "beta_start ": 10**400,
    "num_train_timesteps ": 30_000_000,
    "num_train_timesteps  ": -1,
    "num_train_timesteps   ": None,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_training_schedules(name: str) -> None:
    changed = {**DPM.config, name.strip(): DAMAGE[name]}
    with pytest.raises(ScheduleError, match=name.strip()):
        PlanScheduler(solvers.ddim(SCHEDULE, 3), changed)
    with pytest.raises(ScheduleError, match=name.strip()):
        NoiseSchedule.from_diffusers(changed)
    with pytest.raises(ScheduleError, match=name.strip()):  # of the plan itself, where another scheduler is given
        altered(DPM, config={name.strip(): DAMAGE[name]}).set_begin_index(1)


def altered(scheduler: Any, config: dict[str, Any] | None = None, **facts: Any) -> PlanScheduler:
    """A PlanScheduler of a captured plan whose facts somebody altered."""
    plan = capture(DPM, 3)
    known = json.loads(plan.metadata["scheduler"])
    known = {**known, **facts, "config": {**known["config"], **(config or {})}}
    made = PlanScheduler(plan.replace(metadata={**plan.metadata, "scheduler": json.dumps(known)}), scheduler)
    made.set_timesteps(3)
    return made


def test_an_unknown_kind_of_schedule_is_named_when_it_is_needed() -> None:
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 3), {**DPM.config, "beta_schedule": "nope"})
    with pytest.raises(InputError, match="noise schedule"):
        scheduler.set_timesteps(timesteps=[900, 500, 100])
    with pytest.raises(InputError, match="nope"):
        altered(DPM, config={"beta_schedule": "nope"}).set_begin_index(1)


@pytest.mark.parametrize(
    "facts",
    [
        {"class": "SchedulerMixin"},
        {"class": "Plan"},
        {"class": 3},
        {"begin": 10**8},
        {"begin": float("inf")},
        {"order": 0},
        {"steps": 10**9},
        {"steps": "3"},
        {"arguments": []},
        {"arguments": {"steps": 10**9}},
        {"step_arguments": None},
    ],
)
def test_damaged_facts_of_a_captured_plan(facts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"\w"):
        altered(DPM, **facts).set_begin_index(1)


@pytest.mark.parametrize(
    "metadata",
    [
        {"begin": "100000000", "num_inference_steps": "100000003"},
        {"begin": "100000000"},
        {"num_inference_steps": "99999999999"},
        {"begin": "-1"},
        {"begin": "1e3"},
    ],
)
def test_metadata_that_speaks_of_absurd_runs(metadata: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(metadata))):
        PlanScheduler(solvers.ddim(SCHEDULE, 3).replace(metadata={"method": "olss", **metadata}))


def test_damaged_metadata_of_an_analytic_plan() -> None:
    plan = solvers.dpm_solver_pp(SCHEDULE, 5)
    with pytest.raises(InputError, match="metadata"):
        truncate(plan.replace(metadata={**plan.metadata, "order": "two"}), SCHEDULE, 2)
    assert mismatch(plan.replace(metadata={**plan.metadata, "schedule": ""}), SCHEDULE) is not None


def test_configs_of_all_schedulers_are_readable() -> None:
    """The checks of damaged configs refuse none that diffusers makes itself."""
    count = 0
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name)
        if (
            isinstance(kind, type)
            and issubclass(kind, diffusers.SchedulerMixin)
            and kind is not diffusers.SchedulerMixin
        ):
            try:
                config = kind().config
            except (TypeError, ImportError):  # needs arguments, or a package that is not there
                continue
            sampled(PlanScheduler(solvers.ddim(SCHEDULE, 2), config), 2, SINGLE)
            count += 1
    assert count > 30


def test_arguments_by_position_are_those_of_the_captured_scheduler() -> None:
    """The fourth of DDIM's step is eta, of Euler's s_churn; a generator is one in any place."""
    quiet = PlanScheduler(capture(DDIM, 3))
    churned = PlanScheduler(capture(DDIM, 3, step_arguments={"eta": 0.7}))
    analytic = PlanScheduler(solvers.ddim(SCHEDULE, 3))
    for scheduler in (quiet, churned, analytic):
        scheduler.set_timesteps(3)
    first = quiet.timesteps[0]
    right = quiet.step(NOISE, first, NOISE).prev_sample
    for arguments in ((0.0,), (0.0, False, None, None, True), (torch.Generator(),)):
        quiet.set_timesteps(3)
        assert torch.equal(quiet.step(NOISE, first, NOISE, *arguments).prev_sample, right)
    quiet.set_timesteps(3)
    with pytest.raises(InputError, match=r"eta=0\.7"):
        quiet.step(NOISE, first, NOISE, 0.7)
    with pytest.raises(InputError, match=r"6 arguments after the sample.*eta, use_clipped"):
        quiet.step(NOISE, first, NOISE, *[None] * 6)
    by_name = churned.step(NOISE, first, NOISE, eta=0.7, generator=torch.Generator().manual_seed(1)).prev_sample
    churned.set_timesteps(3)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(churned.step(NOISE, first, NOISE, 0.7, False, generator).prev_sample, by_name)
    assert analytic.step(NOISE, analytic.timesteps[0], NOISE, generator, False)[0].shape == NOISE.shape
