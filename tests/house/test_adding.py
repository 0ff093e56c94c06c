"""The executor and the adapter of docs/adding.md run as they stand there. (Solver and method: test_method_tables.py)"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_plans import split
from torch import Tensor

from olss_fast import NoiseSchedule, sample, solvers
from olss_fast.executors.reference import run

PAGE = (Path(__file__).parents[2] / "docs" / "adding.md").read_text(encoding="utf-8")
SCHEDULE = NoiseSchedule.named("linear")
NOISE = torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLANS = {
    "ddim": solvers.ddim(SCHEDULE, 5),
    "unipc": solvers.unipc(SCHEDULE, 6, order=3),
    "heun": solvers.heun(SCHEDULE, 5),
    "two networks": solvers.dpm_solver_pp(SCHEDULE, 4).replace(models=[0, 1, 1, 0]),
}
ROUNDING = 1e-12  # of float64 sums in another order, carried through six answers of a network with slopes near 1


def far(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).abs().max() / expected.abs().max())


def defined(name: str) -> Any:
    """What the page's block defines under that name."""
    (block,) = [
        each
        for each in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        if f" {name}(" in each or f" {name}:" in each
    ]
    names: dict[str, Any] = {}
    exec(block, names)
    return names[name]


def network(x: Tensor, timestep: float, model: int = 0) -> Tensor:
    return torch.sin(x.roll(1, -1) + timestep / 300.0 + model)


def evaluate(x: Tensor, timestep: float, *, branches: int, model: int) -> Tensor:
    return torch.stack([network(x, timestep, model) * (1 + branch) for branch in range(branches)])


@pytest.mark.parametrize("name", PLANS)
def test_the_executor_of_the_page(name: str) -> None:
    plan = PLANS[name]
    expected = run(plan, evaluate, NOISE)
    assert far(defined("offloaded")(plan, evaluate, NOISE), expected) < ROUNDING


def test_the_executor_of_the_page_keeps_both_halves_apart() -> None:
    plan = split(PLANS["ddim"], 2.0)
    expected = run(plan, evaluate, NOISE)
    assert far(defined("offloaded")(plan, evaluate, NOISE), expected) < ROUNDING


@pytest.mark.parametrize("name", [name for name in PLANS if name != "two networks"])
def test_the_adapter_of_the_page(name: str) -> None:
    host = defined("HostSampler")(PLANS[name], NOISE)
    for timestep in host.timesteps:
        host.step(network(host.x, timestep))
    expected = sample(lambda x, t: network(x, float(t[0])), PLANS[name], NOISE)
    assert far(host.x, expected) < ROUNDING
