"""PlanScheduler whose sample is changed between two steps, as inpainting and callbacks do; and choices of timesteps,
which are made once, and which no run changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from plan_runs import BETAS, DDIM, DPM, NOISE, learned, network, reference, run, sampled
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from olss_fast import Plan, PlanScheduler, capture
from olss_fast.capturing import capturing
from olss_fast.errors import InputError
from olss_fast.executors.increments import increments

pytestmark = pytest.mark.filterwarnings("ignore")

SHIFTED = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
LEVELS = {"timesteps": [3, 2, 1], "alphas": [0, 0.5, 0.9, 1], "sigmas": [1, 0.5, 0.1, 0]}


def anew(sample: Tensor) -> Tensor:
    return sample * 0.5 + 1.0


def in_place(sample: Tensor) -> Tensor:
    return sample.mul_(0.5).add_(1.0)


def through_data(sample: Tensor) -> Tensor:
    in_place(sample.data)
    return sample


def through_numpy(sample: Tensor) -> Tensor:
    array = sample.numpy()
    array *= 0.5
    array += 1.0
    return sample


EDITS = (anew, in_place, through_data, through_numpy)
ONE_STEP = (DDIM, diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.LCMScheduler(**BETAS))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("original", ONE_STEP, ids=lambda each: type(each).__name__)
def test_a_changed_sample_is_carried_on(original: Any, edit: Callable[[Tensor], Tensor], mode: Any) -> None:
    """These go from x_k and f_k (and a fresh noise) alone; so must their plans, however the sample was changed."""
    original = copy.deepcopy(original)
    original.set_timesteps(6)
    scheduler = PlanScheduler(capture(original, 6))
    scheduler.set_timesteps(6)
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    with mode():
        x = y = NOISE.float()
        for k, (told, timestep) in enumerate(zip(original.timesteps, scheduler.timesteps, strict=True)):
            x = original.step(network(x, timestep), told, x, generator=first).prev_sample
            y = scheduler.step(network(y, timestep), timestep, y, generator=second).prev_sample
            if k in (1, 3):
                x, y = anew(x), edit(y)
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_sample_of_a_plan_that_is_not_anchored(edit: Callable[[Tensor], Tensor]) -> None:
    """Row 2 has too little of x_T to form row 3 next to it: what differs from row 1 counts as another x_T."""
    plan = learned(Plan(**LEVELS, rows=[[1, 0, 0, 0], [0.5, 1, 0, 0], [1e-3, 1, 1, 0], [1, 1, 1, 1]]))
    assert not increments(plan.rows, plan.noise_slice.start).anchored
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(3)
    with torch.inference_mode():
        sample = edit(scheduler.step(NOISE, 3, NOISE).prev_sample)
        start = NOISE + 2 * (anew(1.5 * NOISE) - 1.5 * NOISE)
        sample = scheduler.step(NOISE, 2, sample).prev_sample
        torch.testing.assert_close(sample, 1e-3 * start + 2 * NOISE)
        torch.testing.assert_close(scheduler.step(NOISE, 1, sample).prev_sample, start + 3 * NOISE)


def test_an_equal_copy_of_the_sample_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = PlanScheduler(capture(DPM, 5))
        expected = sampled(scheduler, 5, NOISE.to(dtype))
        scheduler.set_timesteps(5)
        sample = NOISE.to(dtype)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(network(sample, timestep), timestep, sample).prev_sample.clone()
        assert torch.equal(sample, expected)


def test_a_change_that_no_column_can_carry() -> None:
    """Where row k takes nothing of x_T: refused if a later row does, else of no consequence."""
    rows = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]])
    for corner, refused in ((1.0, True), (0.0, False)):
        rows[2, 0] = corner
        scheduler = PlanScheduler(learned(Plan(rows=rows, **LEVELS)))
        scheduler.set_timesteps(3)
        sample = scheduler.step(NOISE, 3, NOISE).prev_sample + 1.0
        if refused:
            with pytest.raises(InputError, match="changed before step 1"):
                scheduler.step(NOISE, 2, sample)
        else:
            torch.testing.assert_close(scheduler.step(NOISE, 2, sample).prev_sample, 2 * NOISE)


# --- choices of timesteps ---------------------------------------------------------------------------------------------


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The changes of every plan that is captured again."""
    changes: list[dict[str, Any]] = []
    original = capturing.recapture
    monkeypatch.setattr(
        capturing, "recapture", lambda plan, **asked: (changes.append(asked), original(plan, **asked))[1]
    )
    return changes


def test_the_same_arguments_derive_one_plan(derived: list[dict[str, Any]]) -> None:
    scheduler = PlanScheduler(capture(SHIFTED, 4, mu=0.5))
    for mu, begin in [(0.5, 0), (0.7, 0), (0.7, 1), (0.7, 1), (0.9, 0), (0.7, 0)]:
        scheduler.set_timesteps(4, mu=mu)
        scheduler.set_begin_index(begin)
    again = copy.deepcopy(scheduler)  # as engines do for each request
    again.set_timesteps(4, mu=0.7)
    assert derived == [{"begin": 0, "mu": 0.7}, {"begin": 1}, {"begin": 0, "mu": 0.9}]


def test_a_run_leaves_the_choice_alone() -> None:
    """Pipelines write into `sigmas` and `timesteps`, and begin runs at later timesteps."""
    plan = capture(DPM, 5)
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(5)
    timesteps, sigmas = scheduler.timesteps.clone(), scheduler.sigmas.clone()
    scheduler.set_begin_index(2)
    run(scheduler, NOISE, begin=2)
    scheduler.timesteps.zero_()
    scheduler.sigmas.zero_()
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, timesteps)
    assert torch.equal(scheduler.sigmas, sigmas)
    torch.testing.assert_close(run(scheduler, NOISE), reference(plan, NOISE))


def test_fake_and_real_tensors_do_not_mix() -> None:
    """A run that only counts memory or operators comes before the real one, and after it."""
    plan, image = capture(DPM, 5), torch.ones_like(NOISE)
    scheduler = PlanScheduler(plan)
    for _ in range(2):
        with FakeTensorMode():
            scheduler.set_timesteps(5)
            sample = torch.empty(NOISE.shape)
            scheduler.add_noise(sample, sample, 3)
            scheduler.step(sample, scheduler.timesteps[0], sample)
        scheduler.set_timesteps(5)
        assert pickle.loads(pickle.dumps(scheduler)).plans == (plan,)
        scheduler.add_noise(image, image, 3)
    assert type(scheduler.add_noise(image, image, 3)) is torch.Tensor
    found = run(scheduler, NOISE.float())
    torch.testing.assert_close(found.double(), reference(plan, NOISE), rtol=1e-4, atol=1e-4)  # float32 against float64
