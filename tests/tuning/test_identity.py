"""What was asked, as a table: whatever could change an answer changes it, what is made again alike does not."""

from __future__ import annotations

import functools
import json
import math
import os
import runpy
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import olss_fast
from olss_fast.support.identity import Identity, differences, identity, moving

LEVEL = 1.0
TABLE = {"level": torch.ones(3)}


class Net(nn.Module):
    """A network with everything that may differ."""

    level = 1.0

    def __init__(self, weight: float = 1.0, shift: float = 0.0, table: float = 0.0, plain: object = 1) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2)])
        with torch.no_grad():
            self.inner[0].weight.fill_(weight)  # type: ignore[operator]
            self.inner[0].bias.fill_(0.0)  # type: ignore[operator]
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("table", torch.full((3,), table), persistent=False)
        self.plain = plain

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.level


class Other(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.level * 2


@dataclass
class Settings:
    scale: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.scale


def behind(network: Any) -> Any:
    return lambda x, t: network(x, t)


def hooked(scale: float) -> Net:
    net = Net()
    net.inner[0].register_forward_hook(lambda module, given, output: output * scale)
    return net


def overridden(scale: float) -> Net:
    net = Net()
    net.forward = lambda x, t: x * scale  # type: ignore[method-assign]
    return net


def with_default(scale: float) -> Any:
    def network(x: Tensor, t: Tensor, *, scale: float = scale) -> Tensor:
        return x * scale

    return network


def decorated(network: Any) -> Any:
    return torch.no_grad()(behind(network))


def cyclic(scale: float) -> Any:
    first: dict[str, Any] = {"scale": [scale]}
    first["self"] = [first]
    return first


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reading(scale: float) -> Any:
    """A function that reads `scale` through a module of somebody's own."""
    module, mine = types.ModuleType("somebodys"), {"__name__": "somebodys"}
    module.scale = scale  # type: ignore[attr-defined]
    exec("def network(x, t):\n    return x * own.scale", mine)
    mine["own"] = module  # type: ignore[assignment]
    return mine["network"]


SCHEDULES = [olss_fast.NoiseSchedule.from_betas(np.linspace(1e-4, end, 1000), label="the same") for end in (0.02, 0.03)]
PAIRS: dict[str, tuple[Any, Any]] = {
    "parameter": (lambda: Net(), lambda: Net(weight=1.0000001)),
    "buffer": (lambda: Net(), lambda: Net(shift=0.5)),
    "buffer that is not saved": (lambda: Net(), lambda: Net(table=0.5)),
    "attribute": (lambda: Net(), lambda: Net(plain=2)),
    "attribute inside": (lambda: Net(plain=[{"a": 1}]), lambda: Net(plain=[{"a": 2}])),
    "training": (lambda: Net(), lambda: Net().eval()),
    "dtype": (lambda: Net(), lambda: Net().double()),
    "class": (lambda: Net(), lambda: Other()),
    "hook": (lambda: hooked(1.0), lambda: hooked(2.0)),
    "forward of one object": (lambda: overridden(1.0), lambda: overridden(2.0)),
    "closure": (lambda: behind(Net()), lambda: behind(Net(shift=0.5))),
    "closure of a decorated function": (lambda: decorated(Net()), lambda: decorated(Net(shift=0.5))),
    "code": (lambda: lambda x, t: x + 1, lambda: lambda x, t: x - 1),
    "constant": (lambda: lambda x, t: x * 1, lambda: lambda x, t: x * 2),
    "method that is called": (lambda: lambda x, t: x.sin(), lambda: lambda x, t: x.cos()),
    "default": (lambda: with_default(1.0), lambda: with_default(2.0)),
    "name of a module": (lambda: reading(1.0), lambda: reading(2.0)),
    "library function": (lambda: torch.sin, lambda: torch.cos),
    "bound method": (lambda: Net().forward, lambda: Net(shift=0.5).forward),
    "bound method of slots": (lambda: Slotted(1.0).network, lambda: Slotted(2.0).network),
    "partial": (lambda: functools.partial(torch.mul, other=1.0), lambda: functools.partial(torch.mul, other=2.0)),
    "dataclass": (lambda: Settings(), lambda: Settings(more={"scale": 1})),
    "mapping of tensors": (lambda: {"a": {"b": torch.zeros(2)}}, lambda: {"a": {"b": torch.ones(2)}}),
    "numpy array": (lambda: np.zeros(2), lambda: np.ones(2)),
    "numpy objects": (lambda: np.array([Settings(1.0)]), lambda: np.array([Settings(2.0)])),
    "long list": (lambda: [0.0] * 999 + [1.0], lambda: [0.0] * 999 + [2.0]),
    "set": (lambda: {"a", "b"}, lambda: {"a", "c"}),
    "cycle": (lambda: cyclic(1.0), lambda: cyclic(2.0)),
    "complex tensor": (lambda: torch.ones(2) * 1j, lambda: (torch.ones(2) * 1j).conj()),
    "generator": (lambda: generator(0), lambda: generator(1)),
    "schedule of the same description": (lambda: SCHEDULES[0], lambda: SCHEDULES[1]),
    "number's type": (lambda: 1, lambda: True),
}


def differing(first: Identity, second: Identity) -> list[str]:
    return differences(first.digests, second.digests, [])


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_is_seen_and_what_is_made_alike_is_the_same(name: str) -> None:
    first, other = PAIRS[name]
    assert differing(identity({"x": first()}), identity({"x": other()}))
    if name not in ("code", "constant", "method that is called"):  # two lambdas on one line
        assert differing(identity({"x": first()}), identity({"x": first()})) == []


def test_the_place_is_named() -> None:
    first, second = identity({"network": behind(Net())}), identity({"network": behind(Net(weight=2.0, plain=3))})
    assert differing(first, second) == ["network.network.inner.0.weight", "network.network.plain"]


def test_a_global_that_a_function_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return x * LEVEL * TABLE["level"] * math.pi

    before = identity({"network": network})
    monkeypatch.setitem(TABLE, "level", torch.zeros(3))
    assert differing(before, identity({"network": network})) == ["network.TABLE['level']"]
    monkeypatch.setitem(globals(), "LEVEL", 2.0)
    assert differing(before, identity({"network": network})) == ["network.LEVEL", "network.TABLE['level']"]


def test_an_attribute_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity({"network": Net()})
    monkeypatch.setattr(Net, "level", 2.0)
    assert differing(before, identity({"network": Net()})) == ["network.(code).level"]


def test_two_weights_that_become_one_object() -> None:
    def tied(same: bool) -> list[Any]:
        first = Settings()
        return [first, first if same else Settings(), Net()]

    assert differing(identity({"x": tied(True)}), identity({"x": tied(False)}))


class Counting(nn.Module):
    """Counts, keeps what it made, remembers its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = 0
        self.cache: dict[tuple[int, ...], list[Tensor]] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.cache.setdefault(tuple(x.shape), [torch.ones_like(x)])
        self.last = x
        return self.weight * x


def test_what_moves_when_a_network_is_asked_is_told_from_what_does_not() -> None:
    network, second = Counting(), Counting()
    before = identity({"network": network})
    network(torch.ones(2), torch.ones(2))
    moved = moving(before, identity({"network": network}, before))
    assert moved == ["network.cache", "network.calls", "network.last"]
    for size in range(3, 6):
        network(torch.ones(size), torch.ones(size))
    assert differences(before.digests, identity({"network": network}).digests, moved) == []
    with torch.no_grad():
        second.weight.fill_(2.0)
    assert differences(before.digests, identity({"network": second}).digests, moved) == ["network.weight"]


def test_a_tensor_that_was_written_is_read_again() -> None:
    network = Net()
    before = identity({"network": network})
    assert moving(before, identity({"network": network}, before)) == []
    with torch.no_grad():
        network.inner[0].weight[0, 0] = 5.0  # type: ignore[index, operator]
    assert moving(before, identity({"network": network}, before)) == ["network.inner.0.weight"]


@pytest.mark.parametrize("value", [torch.device("cpu"), torch.zeros(2, device="meta"), torch.eye(3).to_sparse()])
def test_what_cannot_be_looked_into_is_told_by_its_kind(value: Any) -> None:
    assert differing(identity({"x": value}), identity({"x": value})) == []


def test_an_object_that_breaks_when_it_is_looked_into() -> None:
    class Broken:
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("no")

    assert identity({"x": Broken()}).digests.keys() == {"x"}


PROGRAM = """
import functools, json, diffusers, torch, olss_fast
from olss_fast.support.identity import identity
class Net(torch.nn.Module):
    names = {"a", "b", "c", "d"}
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(8, 2)
        self.kinds = {"x", "y", "z"}
        for each in self.parameters():
            each.data.fill_(1.0)
    def forward(self, x, t):
        return x if t in {1, 2, 3} and "a" in self.names else self.inner(x, x, x)[0]
net = Net()
net.register_forward_hook(print)
unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
for each in unet.parameters():
    each.data.fill_(1.0)
parts = {"net": net, "function": torch.no_grad()(lambda x, t: net(x, t)), "partial": functools.partial(net, t=1)}
parts |= {"unet": unet, "scheduler": diffusers.DDIMScheduler(), "schedule": olss_fast.NoiseSchedule.named("linear")}
said = json.dumps(identity(parts).digests)
print(said)
"""


def test_another_process_says_the_same(tmp_path: Path) -> None:
    """Addresses, the order of sets and the numbers of hooks are of a process; none of them is told."""
    pytest.importorskip("diffusers")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    Net().register_forward_hook(print)
    here = runpy.run_path(str(program), run_name="__main__")["said"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    assert len(json.loads(here)) > 1000
    assert there.stdout.strip() == here
