"""What a scheduler costs besides the network: `pytest bench/bench_scheduler.py -s`.

Host time: a run of 20 steps on the CPU, divided by 20; PlanScheduler and diffusers' schedulers take turns, in one
thread, and only its processor time counts. Before timing, PlanScheduler must agree with the scheduler its plan was
captured from. The small tensor tells what the host does; at 4 x 64 x 64 the CPU computes as well.

Of these only the ratios of `bench_run` are compared with the baseline: a whole run, set_timesteps included.

Operators: with fake CUDA tensors, of a step on an accelerator (see tests/helpers/kernel_counts.py): nothing is timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from kernel_counts import Counts, count, count_sampler

from olss_fast import PlanScheduler, capture

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.logging.set_verbosity_error()

STEPS = 20
ROUNDS = 150
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PEERS = {
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(**BETAS),
    "UniPC": diffusers.UniPCMultistepScheduler(**BETAS),
    "DDIM": diffusers.DDIMScheduler(**BETAS, clip_sample=False),
    "Euler": diffusers.EulerDiscreteScheduler(**BETAS),
}
OURS = "PlanScheduler"
BUDGET = 25.0  # microseconds a step
LEAST = {"DPM++ 2M": 4.0, "UniPC": 12.0}  # times the host time of ours


def schedulers() -> dict[str, Any]:
    return {OURS: PlanScheduler(capture(PEERS["DPM++ 2M"], STEPS)), **copy.deepcopy(PEERS)}


def run(scheduler: Any, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The scheduler's share of a pipeline's loop."""
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def microseconds(scheduler: Any, sample: torch.Tensor, output: torch.Tensor) -> float:
    scheduler.set_timesteps(STEPS)
    started = time.thread_time()
    run(scheduler, sample, output)
    return 1e6 * (time.thread_time() - started) / STEPS


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 64, 64)], ids=str)
@torch.no_grad()
def bench_host_time(benchmark: Any, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    tensors = torch.randn(shape), torch.randn(shape)
    contenders = schedulers()
    for scheduler in contenders.values():
        scheduler.set_timesteps(STEPS)
    found, expected = (run(contenders[name], *tensors) for name in (OURS, "DPM++ 2M"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32, outputs that no network would write
    ours = contenders[OURS]
    benchmark.pedantic(
        run, setup=lambda: (ours.set_timesteps(STEPS), ((ours, *tensors), {}))[1], rounds=ROUNDS, warmup_rounds=5
    )
    if benchmark.disabled:
        return
    rounds = [{name: microseconds(each, *tensors) for name, each in contenders.items()} for _ in range(ROUNDS)]
    best = {name: min(each[name] for each in rounds) for name in contenders}
    times = {name: value / best[OURS] for name, value in best.items()}
    benchmark.extra_info.update(microseconds_a_step=best, times_ours=times, budget=BUDGET)
    print(f"\n{shape}: " + ", ".join(f"{name} {value:.1f} us ({times[name]:.1f}x)" for name, value in best.items()))
    if shape == (1, 4, 8, 8):
        assert best[OURS] <= BUDGET
        assert all(times[name] >= least for name, least in LEAST.items())


RUNS = [((1, 4, 8, 8), "DPM++ 2M"), ((1, 4, 8, 8), "UniPC"), ((1, 4, 64, 64), "DPM++ 2M")]


@pytest.mark.parametrize(("shape", "peer"), RUNS, ids=str)
@torch.no_grad()
def bench_run(versus: Callable[..., Any], shape: tuple[int, ...], peer: str) -> None:
    tensors = torch.randn(shape), torch.randn(shape)
    ours, reference = (schedulers()[name] for name in (OURS, peer))

    def whole(scheduler: Any) -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        return run(scheduler, *tensors)

    if peer == "DPM++ 2M":  # that of the plan
        torch.testing.assert_close(whole(ours), whole(reference), rtol=1e-4, atol=1e-4)
    versus(lambda: whole(ours), lambda: whole(reference), name=f"diffusers {peer}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def bench_operators_of_a_step(exactly: Callable[..., Any], benchmark: Any, dtype: torch.dtype) -> None:
    counts = {name: count(scheduler, STEPS, dtype) for name, scheduler in schedulers().items()}
    exactly(lambda: {what: sum(getattr(step, what) for step in counts[OURS]) for what in vars(Counts())})
    print(f"\n{dtype!s:16}{'kernels':>10}{'syncs':>8}{'uploads':>9}   a step, mean of {STEPS}")
    for name, steps in counts.items():
        means = {what: sum(getattr(step, what) for step in steps) / len(steps) for what in vars(Counts())}
        benchmark.extra_info[name] = means
        print(f"{name:16}{means['kernels']:10.1f}{means['syncs']:8.2f}{means['uploads']:9.2f}")
    sampler = count_sampler(capture(PEERS["DPM++ 2M"], STEPS), guided=True, dtype=dtype)
    assert sampler == Counts(kernels=STEPS + 1, syncs=0, uploads=0)
    benchmark.extra_info["Sampler"] = {what: value / STEPS for what, value in vars(sampler).items()}
    means = benchmark.extra_info["Sampler"]
    print(f"{'Sampler':16}{means['kernels']:10.1f}{means['syncs']:8.2f}{means['uploads']:9.2f}   guidance included")
    for step in counts[OURS]:
        assert step.kernels <= 3
        assert step.syncs == step.uploads == 0
