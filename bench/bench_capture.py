"""What `capture` takes at 50 steps beyond what the scheduler itself takes for them: `pytest bench/bench_capture.py -s`.

Both are the processor's time, the scheduler's on a small float32 sample with a network that costs nothing.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from scheduler_runs import SHAPE, stepping

from olss_fast import capture

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = {"CMStochasticIterativeScheduler": 40, "ConsistencyDecoderScheduler": 2}  # as many as they take; others 50
LINEAR = {
    "CMStochasticIterativeScheduler": {"clip_denoised": False},
    "DDIMParallelScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMParallelScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "HeliosScheduler": {"stages": 1},
    "UnCLIPScheduler": {"clip_sample": False},
}
ARGUMENTS = {"SCMScheduler": {"intermediate_timesteps": None}}
CLASSES = [
    *LINEAR,
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler", "DDPMWuerstchenScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    *("FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeunDiscreteScheduler", "IPNDMScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler"),
    *("LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PNDMScheduler", "SASolverScheduler", "SCMScheduler"),
    *("TCDScheduler", "UniPCMultistepScheduler"),
]
LARGEST = 1.0  # seconds
FEW = 20  # steps, of the capture that is timed again and again


def run_seconds(scheduler: Any, steps: int, arguments: dict[str, Any]) -> float:
    """The scheduler by itself: set_timesteps, and scale_model_input and step for every timestep."""
    state = torch.randn(SHAPE)
    started = time.process_time()
    scheduler.set_timesteps(steps, **arguments)
    whole = type(scheduler).__name__ not in ("SCMScheduler", "DDPMWuerstchenScheduler")  # which end at the clean sample
    timesteps = scheduler.timesteps if whole else scheduler.timesteps[:-1]
    advance = stepping(scheduler, timesteps, {})
    scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
    for i, timestep in enumerate(timesteps):
        state = advance(scaled(state, timestep), i, state)
    return time.process_time() - started


def capture_seconds(scheduler: Any, steps: int, arguments: dict[str, Any]) -> float:
    started = time.process_time()
    capture(scheduler, steps, **arguments)
    return time.process_time() - started


def excess(name: str) -> tuple[float, float]:
    """Least of three, after a short run each: seconds beyond the scheduler's own, and those."""
    scheduler = getattr(diffusers.schedulers, name)(**LINEAR.get(name, {}))
    settings = (STEPS.get(name, 50), ARGUMENTS.get(name, {}))
    rounds = range(1 if name == "LMSDiscreteScheduler" else 3)  # LMS takes a second of quadratures
    own = min(run_seconds(scheduler, *settings) for _ in rounds)
    return min(capture_seconds(scheduler, *settings) for _ in rounds) - own, own


@pytest.mark.benchmark(timer=time.process_time)
def bench_capture_of_every_class(benchmark: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: excess(name) for name in CLASSES}
        scheduler = diffusers.DPMSolverMultistepScheduler()
        benchmark.pedantic(capture, args=(scheduler, 50), rounds=5, warmup_rounds=1)
    slowest = max(found, key=lambda name: found[name][0])
    benchmark.extra_info.update(
        largest_excess_s=found[slowest][0], slowest=slowest, its_own_run_s=found[slowest][1], classes=len(found)
    )
    for name, (seconds, own) in sorted(found.items(), key=lambda item: -item[1][0])[:5]:
        print(f"\n{name}: {seconds:.3f} s beyond its own {own:.3f} s", end="")
    print(f"\nlargest of {len(found)} classes: {found[slowest][0]:.3f} s")
    assert len(found) == 35
    assert found[slowest][0] <= LARGEST


def bench_capture(versus: Callable[..., Any]) -> None:
    """One scheduler, as often as it takes: a capture, and what it stands for, the scheduler's own run."""
    scheduler = diffusers.DPMSolverMultistepScheduler()
    plan = capture(scheduler, FEW)
    counts = {"columns": plan.columns, "evaluations": plan.nfe}
    own = copy.deepcopy(scheduler)
    versus(
        lambda: capture(scheduler, FEW),
        lambda: run_seconds(own, FEW, {}),
        name="the scheduler's own run",
        counts=counts,
    )
