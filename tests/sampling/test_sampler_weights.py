"""Graphs and the weights that they read: what changes in place is honoured, what is replaced is noticed.

The network may be a module, or a module behind a bound method, a partial or a decorator.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_graphs import use_fake_graphs
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule, solvers
from olss_fast.network import module_of
from olss_fast.sampling.sampler import Sampler

PLAN = solvers.ddim(NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012), 3)


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(5, 5, dtype=dtype)

    def forward(self, x: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.tanh(self.mix(x))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_graphs(monkeypatch)


def test_weights_that_change_in_place_are_honoured(net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, PLAN, backend="graph")
    before = sampler(noise)
    with torch.no_grad():
        net.mix.weight.mul_(1.1)
    changed = sampler(noise)
    assert sampler.stats().captures == 1
    assert not torch.allclose(before, changed, rtol=1e-3)


WRAPPED: dict[str, Callable[[Net], Any]] = {
    "itself": lambda net: net,
    "bound method": lambda net: net.forward,
    "partial": lambda net: functools.partial(net, scale=0.5),
    "partial of a bound method": lambda net: functools.partial(functools.partial(net.forward), scale=0.5),
    "decorated": lambda net: torch.no_grad()(net.forward),
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


def replace_parameter(net: Net) -> str:
    net.mix.weight = torch.nn.Parameter(0.9 * net.mix.weight.detach())
    return "mix.weight"


def replace_module(net: Net) -> str:
    """As libraries of adapters do."""
    net.mix = torch.nn.Sequential(net.mix, torch.nn.Tanh())
    return "mix"


def replace_bias(net: Net) -> str:
    net.mix.bias = None
    return "mix.bias"


@pytest.mark.parametrize("replace", [replace_parameter, replace_module, replace_bias])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_is_replaced_is_noticed_behind_any_wrapper(
    wrapped: str, replace: Callable[[Net], str], net: Net, noise: Tensor, fake_graphs: None
) -> None:
    network = WRAPPED[wrapped](net)
    sampler = Sampler(network, PLAN, backend="graph")
    for _ in range(2):
        sampler(noise)
    assert sampler.stats().captures == 1
    name = replace(net)
    got = sampler(noise)
    assert sampler.stats().captures == 2
    assert re.fullmatch(rf"captured again, (_orig_mod\.)?{name} was replaced", sampler.stats().reason)
    torch.testing.assert_close(got, olss_fast.sample(network, PLAN, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapped_network_is_handed_its_own_dtype_on_its_own_device(wrapped: str, noise: Tensor) -> None:
    seen: list[torch.dtype] = []
    net = Net(torch.float64)
    net.mix.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    sampler = Sampler(WRAPPED[wrapped](net), PLAN, backend="fused")
    assert sampler.device == torch.device("cpu")
    assert sampler(noise).dtype == noise.dtype
    olss_fast.sample(WRAPPED[wrapped](net), PLAN, noise)
    assert set(seen) == {torch.float64}


@pytest.mark.parametrize("network", [lambda x, t: x, functools.partial(torch.mul), len, None])
def test_no_module_is_seen_where_there_is_none(network: Any) -> None:
    assert module_of(network) is None
