"""Arguments of a wrong kind at the public doors: a named error that quotes what came, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import olss_fast
from olss_fast import NoiseSchedule, Plan, Sampler, solvers
from olss_fast.errors import InputError, NetworkError, OlssError, PlanError, ScheduleError

SCHEDULE = NoiseSchedule.named("linear")
PLAN = solvers.ddim(SCHEDULE, 3)
NOISE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, 4)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        output: Tensor = 0.1 * x + self.classes(y)
        return output


def never(x: Tensor, timestep: Tensor) -> Tensor:
    pytest.fail("the network was called")


WRONG: dict[str, tuple[Callable[[], Any], type[OlssError], str]] = {
    "no plan": (lambda: olss_fast.sample(never, None, NOISE), InputError, "plan is None; expected a Plan"),
    "a path": (
        lambda: olss_fast.sample(never, "five.safetensors", NOISE),
        InputError,
        "plan is a str 'five.safetensors'; expected a Plan: read plan files with Plan.load",
    ),
    "plans": (lambda: Sampler(never, [PLAN]), InputError, r"plan is a list \[Plan"),
    "half a sample": (lambda: olss_fast.sample(never, PLAN, NOISE, batch_size=2.5), InputError, "batch_size is 2.5"),
    "truth": (lambda: olss_fast.sample(never, PLAN, NOISE, batch_size=True), InputError, "batch_size is True"),
    "text": (lambda: olss_fast.sample(never, PLAN, NOISE, batch_size="2"), InputError, "batch_size is '2'"),
    "none": (lambda: olss_fast.sample(never, PLAN, NOISE, batch_size=0), InputError, "batch_size is 0; .*at least 1"),
    "no schedule": (lambda: solvers.ddim(None, 4), InputError, "schedule is None; expected a NoiseSchedule"),
    "plan as schedule": (lambda: solvers.heun(PLAN, 4), InputError, "schedule is a Plan Plan"),
    "eta": (lambda: solvers.ddim(SCHEDULE, 4, eta="x"), InputError, "eta is 'x'; expected a number from 0 to 1"),
    "eta NaN": (lambda: solvers.ddim(SCHEDULE, 4, eta=float("nan")), InputError, "eta is nan"),
    "start": (lambda: solvers.unipc(SCHEDULE, 4, start="x"), InputError, "start is 'x'; expected a positive amplitude"),
    "spacing": (lambda: solvers.ddim(SCHEDULE, 4, spacing=["x"]), ScheduleError, r"spacing \['x'\] is unknown"),
    "steps": (lambda: NoiseSchedule.named("linear", num_train_timesteps="x"), ScheduleError, "timesteps is 'x'"),
    "half a step": (lambda: NoiseSchedule.named("linear", num_train_timesteps=9.5), ScheduleError, "is 9.5"),
    "beta": (lambda: NoiseSchedule.named("linear", beta_start="x"), ScheduleError, "beta_start is 'x'"),
    "prediction": (
        lambda: NoiseSchedule.named("linear", prediction_type=["v"]),
        ScheduleError,
        r"prediction_type \['v'\] is unknown",
    ),
    "shift": (lambda: NoiseSchedule.flow("x"), ScheduleError, "shift is 'x'; expected a number"),
    "sigma": (lambda: NoiseSchedule.ve(None), ScheduleError, "sigma_min is None"),
    "sigma_data": (lambda: NoiseSchedule.edm(sigma_data="x"), ScheduleError, "sigma_data is 'x'"),
    "timestep": (lambda: SCHEDULE.levels("x"), ScheduleError, "timestep cannot be read as numbers"),
    "begin": (lambda: SCHEDULE.begun_at("x"), ScheduleError, "timestep is 'x'"),
    "evaluation": (lambda: PLAN.output_slice("x"), PlanError, "evaluation 'x' was asked for"),
    "width": (lambda: PLAN.describe(width="x"), InputError, "width is 'x'"),
    "cache": (
        lambda: olss_fast.build(Net().eval(), PLAN, shapes=(2, 4), conditioning={"y": torch.arange(2)}, cache=3.5),
        InputError,
        "cache is 3.5; expected True, False or a folder",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_has_a_named_error(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_numbers_of_numpy_are_numbers() -> None:
    expected = olss_fast.sample(lambda x, t: 0.1 * x, PLAN, NOISE)
    assert torch.equal(olss_fast.sample(lambda x, t: 0.1 * x, PLAN, NOISE, batch_size=np.int64(6)), expected)
    assert solvers.ddim(SCHEDULE, 4, eta=np.float32(0)) == solvers.ddim(SCHEDULE, 4)
    assert NoiseSchedule.named("linear", num_train_timesteps=np.int32(1000)).first == SCHEDULE.first


LABELS = torch.arange(6) // 2


def by_sample(network: Any, plan: Plan, **how: Any) -> Tensor:
    return olss_fast.sample(network, plan, NOISE, **how)


def by_sampler(network: Any, plan: Plan, **how: Any) -> Tensor:
    return Sampler(network, plan, **how)(NOISE)


@pytest.mark.parametrize("run", [by_sample, by_sampler])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"conditioning": {"y": torch.arange(3)}}, "y has 3 rows; expected 6, one for each sample"),
        (
            {"conditioning": {"y": torch.tensor([0, 1, 2, 3, 4, 9])}},
            "y holds numbers from 0 to 9, and the network's classes has the entries 0 to 4",
        ),
        (
            {"conditioning": {"y": LABELS}, "unconditional": {"y": torch.tensor([5])}, "guidance_scale": 2.0},
            "y holds numbers from 5 to 5, and the network's classes has the entries 0 to 4",
        ),
    ],
)
def test_conditioning_that_the_network_cannot_take_is_named(run: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message) as caught:
        run(Net(), PLAN, **how)
    assert isinstance(caught.value.__cause__, (IndexError, RuntimeError))


@pytest.mark.parametrize("run", [by_sample, by_sampler])
def test_errors_of_the_networks_own_stay_what_they_are(run: Any) -> None:
    def broken(x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match=r"^its own$"):
        run(broken, PLAN, conditioning={"y": torch.arange(6)})
