"""The network first, then the plan, and one name for conditioning everywhere; calls of older versions are taken too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule, Sampler, solvers
from olss_fast.engine.building import build
from olss_fast.errors import InputError
from olss_fast.onnx.export import export_onnx
from olss_fast.sampling.sampling import sample

PLAN = solvers.ddim(NoiseSchedule.named("linear"), 2)
NOISE = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
DOORS: list[Callable[..., Any]] = [sample, Sampler, build, export_onnx]


def network(x: Tensor, timestep: Tensor) -> Tensor:
    return 0.1 * x


@pytest.mark.parametrize("door", DOORS)
def test_one_order_and_one_name(door: Callable[..., Any]) -> None:
    names = list(inspect.signature(door).parameters)
    assert names[:2] == ["network", "plan"]
    assert "conditioning" in names
    assert "example" not in names


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample(PLAN, network, NOISE),
        lambda: sample(PLAN, network=network, noise=NOISE),
        lambda: Sampler(PLAN, network)(NOISE),
        lambda: Sampler(PLAN, network=network)(NOISE),
    ],
)
def test_the_old_order_works_and_the_warning_names_the_caller(call: Callable[[], Tensor]) -> None:
    with pytest.warns(DeprecationWarning, match="takes the network before the plan") as caught:
        found = call()
    assert [each.filename for each in caught] == [__file__]
    torch.testing.assert_close(found, sample(network, PLAN, NOISE))


@pytest.mark.parametrize("call", [build, export_onnx])
def test_the_old_name_of_conditioning(call: Callable[..., Any], tmp_path: Any) -> None:
    rest = {"shapes": (2, 4)} if call is build else {"path": tmp_path / "x.onnx", "shape": (2, 4)}
    with (
        pytest.warns(DeprecationWarning, match="takes conditioning= in place of example=") as caught,
        pytest.raises(InputError, match="conditioning must be a mapping of argument names to values, got list"),
    ):
        call(torch.nn.Identity().eval(), PLAN, example=[1], **rest)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.filterwarnings("error")
def test_the_new_form_does_not_warn() -> None:
    sample(network, PLAN, NOISE)
    Sampler(plan=PLAN, network=network)(NOISE)


def test_samplers_say_what_they_are() -> None:
    given = {"conditioning": {"y": 1}, "unconditional": {"y": 0}, "guidance_scale": 2.5}
    assert repr(Sampler(network, PLAN)) == f"Sampler(network, {PLAN!r}, backend='auto', device='any')"
    text = repr(Sampler(torch.nn.Linear(4, 4), PLAN, backend="fused", **given))
    assert text == f"Sampler(Linear, {PLAN!r}, guidance_scale=2.5, backend='fused', device='cpu')"
    assert repr(olss_fast.Sampler([network, network], PLAN)).startswith("Sampler(network, network, Plan(")
