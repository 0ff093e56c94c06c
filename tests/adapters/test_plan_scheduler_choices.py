"""What `set_timesteps` chooses is made once, and no run of it changes what the next one finds."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from plan_runs import DPM, NOISE, reference, run
from torch._subclasses.fake_tensor import FakeTensorMode

from olss_fast import PlanScheduler, capture
from olss_fast.capturing import capturing

pytestmark = pytest.mark.filterwarnings("ignore")
SHIFTED = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


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


def test_fake_tensors_do_not_stay() -> None:
    """A run that only counts memory or operators comes before the real one."""
    plan, image = capture(DPM, 5), torch.ones_like(NOISE)
    scheduler = PlanScheduler(plan)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scheduler.set_timesteps(5)
        sample = torch.empty_like(NOISE, dtype=torch.float32)
        scheduler.add_noise(sample, sample, 3)
        scheduler.step(sample, scheduler.timesteps[0], sample)
    scheduler.set_timesteps(5)
    assert type(scheduler.add_noise(image, image, 3)) is torch.Tensor
    found = run(scheduler, NOISE.float())
    torch.testing.assert_close(found.double(), reference(plan, NOISE), rtol=1e-4, atol=1e-4)  # float32 against float64
