"""Everything under other defaults of torch: whatever is made here says its own dtype and device.

A default device "meta", whose tensors hold no numbers, stands for any that the caller did not mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from plan_runs import BETAS, NOISE, SCHEDULE, sampled
from small_tunings import LITTLE
from torch import Tensor

import olss_fast
from olss_fast import PlanScheduler, Sampler, capture, demo, solvers
from olss_fast.cli.model import draw_noise
from olss_fast.kernels import StepState, lincomb, start, step
from olss_fast.tuning.compare import compare

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.logging.set_verbosity_error()

CAPTURED = [
    diffusers.UniPCMultistepScheduler(**BETAS),
    diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    diffusers.DEISMultistepScheduler(**BETAS),
    diffusers.PNDMScheduler(**BETAS),
    diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    diffusers.LMSDiscreteScheduler(**BETAS),
    diffusers.LCMScheduler(**BETAS),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
]
CPU = torch.device("cpu")
START = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(6, 6)
        torch.nn.init.orthogonal_(self.mix.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        return torch.tanh(self.mix(x)) + (t / 1000.0)[:, None] * x + (0.0 if shift is None else shift[:, None])


NET = Net()
GUIDED = {"conditioning": {"shift": np.float32([0.1] * 24)}, "unconditional": {"shift": 0.25}, "guidance_scale": 2.0}
PIPE = tiny_pipelines.unet2d(diffusers.DDIMPipeline)


def captured() -> list[Any]:
    return [capture(copy.deepcopy(each), 5).rows for each in CAPTURED]


def slot() -> list[Tensor]:
    """Runs of PlanScheduler, and noise that it adds between and at the plan's times."""
    found = []
    for original in CAPTURED[:2]:
        scheduler = PlanScheduler(capture(original, 5), original)
        scheduler.set_timesteps(5)
        times = [scheduler.timesteps[2:3], torch.tensor([333, 777], device=CPU)]
        found += [scheduler.add_noise(NOISE[: len(each)].float(), NOISE[: len(each)].float(), each) for each in times]
        found += [scheduler.sigmas, sampled(scheduler, 5, NOISE.float())]
    return found


def loops() -> list[Tensor]:
    stochastic = solvers.ddim(SCHEDULE, 4, eta=1.0)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    sampler = Sampler(NET, solvers.unipc(SCHEDULE, 4), backend="fused", **GUIDED)
    return [
        olss_fast.sample(NET, solvers.unipc(SCHEDULE, 4), START, **GUIDED),
        olss_fast.sample(NET, stochastic, START, generator=generators[0]),
        sampler(START),
        Sampler(NET, stochastic, backend="fused")(START, generator=generators[1]),
    ]


def tuned() -> list[Any]:
    settings = {"noise": START, "schedule": SCHEDULE, "steps": [2], "teacher_steps": 8, "progress": False}
    result = olss_fast.tune(NET, effort=LITTLE, **settings)
    report = compare(NET, plans=result.plans.values(), **settings)
    return [result.plans[2].rows, [each.mean for each in report.candidates]]


def accelerated() -> list[Any]:
    pipe = copy.deepcopy(PIPE)
    plan = capture(pipe.scheduler, 3)
    olss_fast.accelerate(pipe, plan)
    return [pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images]


def operators() -> list[Tensor]:
    state = StepState.empty(torch.zeros(2, 6, device=CPU, dtype=torch.float32), START.new_zeros(2), steps=2)
    state.rows.copy_(START[:3, :3])
    state.column(0).copy_(START[:2])
    start(state)
    step(START[2:4].contiguous(), state)
    return [lincomb([START, START], [0.1, 0.7]), state.x]


def embedded() -> list[Any]:
    model = demo.load("cpu")
    with torch.no_grad():
        noise = draw_noise(model, 2, 0)
        times = torch.full((2,), 500.0, dtype=torch.float32, device=CPU)
        output = model.network(noise, times, class_labels=torch.tensor([1, 2], device=CPU))
        return [output, *demo.classifier("cpu")(output)]


WAYS = [captured, slot, loops, tuned, accelerated, operators, embedded]


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    return {way.__name__: way() for way in WAYS}


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(request.param)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_results_are_the_same(way: Callable[[], list[Any]], usual: dict[str, Any], default: None) -> None:
    for found, expected in zip(way(), usual[way.__name__], strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
