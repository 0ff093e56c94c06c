"""One PlanScheduler in several threads: each has a run of its own, and a run may go from thread to thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from many_threads import hasty, in_threads  # noqa: F401
from plan_runs import DDIM, DPM, NOISE, SCHEDULE, network, reference, sampled
from torch import Tensor

from olss_fast import PlanScheduler, capture, solvers
from olss_fast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
PLANS = [capture(DPM, 5), solvers.ddim(SCHEDULE, 4), capture(DDIM, 7)]


def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """In a thread of its own, which then ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def one_step(scheduler: PlanScheduler, timestep: Any, sample: Tensor) -> Tensor:
    result: Tensor = scheduler.step(network(sample, timestep), timestep, sample).prev_sample
    return result


def steps_of(scheduler: PlanScheduler, steps: int, noise: Tensor, factor: float = 1.0) -> Iterator[Tensor]:
    """A run that stops after every step, and multiplies what came by `factor`."""
    scheduler.set_timesteps(steps)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = one_step(scheduler, timestep, sample)
        sample = sample if factor == 1.0 else sample * factor
        yield sample


def test_every_thread_has_its_run() -> None:
    scheduler = PlanScheduler(PLANS)
    noises = [NOISE.roll(i, -1) for i in range(6)]
    alone = [sampled(PlanScheduler(PLANS), (5, 4, 7)[i % 3], noise) for i, noise in enumerate(noises)]
    found = in_threads(lambda i: sampled(scheduler, (5, 4, 7)[i % 3], noises[i % 6]), 60)
    assert sum(not torch.equal(each, alone[i % 6]) for i, each in enumerate(found)) == 0


def test_timesteps_that_were_set_once_serve_all_threads() -> None:
    scheduler = PlanScheduler(PLANS)
    scheduler.set_timesteps(5)
    expected = [reference(PLANS[0], NOISE.roll(i, -1)) for i in range(8)]
    together = threading.Barrier(8, timeout=60)

    def run(i: int) -> Tensor:
        together.wait()
        sample = NOISE.roll(i, -1)
        for timestep in scheduler.timesteps:
            sample = one_step(scheduler, timestep, sample)
        return sample

    for each, right in zip(in_threads(run, 8), expected, strict=True):
        torch.testing.assert_close(each, right, rtol=1e-10, atol=1e-10)
    assert scheduler.step_index is None  # of this thread, which made no step


@pytest.mark.parametrize("factor", [1.0, 0.9], ids=["as returned", "changed"])
@pytest.mark.parametrize("lasting", [True, False], ids=["a pool", "a thread a step"])
def test_runs_go_from_thread_to_thread(factor: float, lasting: bool) -> None:
    """Three at once, with changed samples too: what they step through says whose they are."""
    scheduler = PlanScheduler(PLANS)
    alone = [list(steps_of(PlanScheduler(PLANS), steps, NOISE, factor))[-1] for steps in (5, 4, 7)]
    going = [steps_of(scheduler, steps, NOISE, factor) for steps in (5, 4, 7)]
    ends: list[Any] = [None] * 3
    pool = ThreadPoolExecutor(2)
    while any(each is not None for each in going):
        for i, each in enumerate(going):
            if each is not None:
                row = pool.submit(next, each, None).result() if lasting else elsewhere(next, each, None)
                ends[i], going[i] = (ends[i], None) if row is None else (row, each)  # type: ignore[call-overload]
    pool.shutdown()
    for end, expected in zip(ends, alone, strict=True):
        assert torch.equal(end, expected)


def test_a_run_inside_another() -> None:
    """As of a network, or a callback, that calls the pipeline that it is called by."""
    scheduler = PlanScheduler(PLANS)
    expected = sampled(scheduler, 5)
    inner = None
    for row in steps_of(scheduler, 5, NOISE):
        inner, last = sampled(scheduler, 4), row
    assert torch.equal(last, expected)
    assert inner is not None
    assert torch.equal(inner, sampled(PlanScheduler(PLANS), 4))


def test_what_a_thread_reads_is_its_own() -> None:
    scheduler = PlanScheduler(PLANS)
    scheduler.set_timesteps(5)

    def other() -> tuple[int, int, int | None]:
        before = len(scheduler.timesteps)
        sampled(scheduler, 7)
        return before, len(scheduler.timesteps), scheduler.step_index

    assert elsewhere(other) == (5, 7, 7)
    assert (len(scheduler.timesteps), scheduler.step_index, scheduler.num_inference_steps) == (5, None, 5)


def test_numbers_that_may_be_of_any_run_are_refused() -> None:
    """A thread that has set no timesteps, in the middle of others' runs, with a sample that none of them returned."""
    scheduler = PlanScheduler(PLANS)
    scheduler.set_timesteps(5)
    timesteps = scheduler.timesteps.tolist()
    sample = one_step(scheduler, timesteps[0], NOISE)
    elsewhere(one_step, scheduler, timesteps[0], NOISE)  # begins another
    with pytest.raises(InputError, match="a thread that has set no timesteps"):
        elsewhere(one_step, scheduler, timesteps[3], sample * 2)
    for timestep in timesteps[1:]:  # the very sample that was returned says which run it is
        sample = elsewhere(one_step, scheduler, timestep, sample)
    torch.testing.assert_close(sample, reference(PLANS[0], NOISE), rtol=1e-10, atol=1e-10)


def test_a_start_part_of_the_way_in_another_thread() -> None:
    scheduler = PlanScheduler(PLANS)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)

    def run() -> Tensor:
        sample = NOISE
        for timestep in scheduler.timesteps[2:]:
            sample = one_step(scheduler, timestep, sample)
        return sample

    expected = reference(capture(DPM, 5, begin=2), NOISE)
    for found in (elsewhere(run), run(), elsewhere(run)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_copy_is_of_the_thread_that_makes_it() -> None:
    scheduler = PlanScheduler(PLANS)
    scheduler.set_timesteps(5)
    sample = one_step(scheduler, scheduler.timesteps[0], NOISE)

    def other() -> PlanScheduler:
        scheduler.set_timesteps(4)
        return copy.deepcopy(scheduler)

    assert elsewhere(other).num_inference_steps == 4
    again = copy.deepcopy(scheduler)
    for timestep in again.timesteps[1:]:
        sample = one_step(again, timestep, sample)
    assert torch.equal(sample, sampled(scheduler, 5))


def test_histories_go_with_their_timesteps() -> None:
    """Threads that come and go leave nothing behind."""
    scheduler = PlanScheduler(PLANS)
    scheduler.set_timesteps(5)
    for _ in range(20):
        elsewhere(sampled, scheduler, 5)
    assert len(scheduler._sessions._of_timesteps) <= 3  # set here, set last, and one whose thread may not have ended
    scheduler.set_timesteps(5)
    for _ in range(20):
        elsewhere(lambda: [one_step(scheduler, timestep, NOISE) for timestep in scheduler.timesteps])
    assert len(scheduler._sessions._of_timesteps[scheduler.timesteps]) <= 2
