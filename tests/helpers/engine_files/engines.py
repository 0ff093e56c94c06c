"""Tiny networks as engines: each structure is compiled once a session, and every test may have an engine of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from made_plans import split
from shared_builds import FOLDER, once
from torch import Tensor, nn

import olss_fast
from olss_fast import Engine, NoiseSchedule, Plan, Profile, solvers
from olss_fast.engine.manifest import FORMAT
from olss_fast.support import container

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
CACHE = FOLDER / "cache"


def folded(plan: Plan, scale: float) -> Plan:
    """`split`, with the guidance scale written down."""
    return split(plan, scale).replace(metadata={**plan.metadata, "guidance_scale": str(scale)})


GUIDED = {
    "two": solvers.ddim(SCHEDULE, 2),
    "three": solvers.unipc(SCHEDULE, 3),
    "stochastic": solvers.ddim(SCHEDULE, 4, eta=1.0),
    "split": folded(solvers.ddim(SCHEDULE, 5), 1.5),  # the default scale of the guided engine
}
UNGUIDED = {name: plan for name, plan in GUIDED.items() if plan.branches == 1}


class TinyNetwork(nn.Module):
    """Convolutions at full and half size that see the time, and the class where there are classes.

    `frequencies` is a buffer that no state_dict holds, `out` shares its weight with `back`, `idle` is never used.
    """

    def __init__(self, classes: int = 0, channels: int = 2, width: int = 4) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.back, self.out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.out.weight = self.back.weight
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.time = nn.Linear(4, width)
        self.classes = nn.Embedding(classes + 1, width) if classes else None
        self.idle = nn.Linear(2, 2)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]), persistent=False)

    def embedded(self, timestep: Tensor) -> Tensor:
        angles = timestep.to(self.frequencies.dtype)[:, None] / 300 * self.frequencies
        return self.time(torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        seen = self.embedded(timestep)
        if self.classes is not None:
            seen = seen + self.classes(labels)
        return self.body(x, seen)

    def body(self, x: Tensor, seen: Tensor) -> Tensor:
        fine = torch.tanh(self.into(x) + seen[:, :, None, None])
        coarse = self.back(torch.tanh(self.down(fine)))
        return self.last(self.out(fine + nn.functional.interpolate(coarse, scale_factor=2.0)))


class NestedNetwork(TinyNetwork):
    """Conditioning as SDXL has it: a mapping of tensors, one that belongs to no sample, and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, 4)

    def forward(self, x: Tensor, timestep: Tensor, added: Mapping[str, Tensor], gain: float = 1.0) -> Tensor:  # type: ignore[override]
        seen = self.embedded(timestep) + self.text(added["text"]) * added["strength"][:, None]
        return self.body(x, seen) * added["table"] * gain


@dataclass(frozen=True)
class Tiny:
    """What a kind of engine is built from. unconditional: None where it is built without guidance."""

    network: TinyNetwork
    shapes: Any
    plans: Mapping[str, Plan]
    conditioning: dict[str, Any] = field(default_factory=dict)
    unconditional: dict[str, Any] | None = None
    guidance_scale: float = 1.0

    def build(self, **changes: Any) -> Engine:
        """As an engine; `changes` are of the arguments of `olss_fast.build`."""
        arguments = {
            "shapes": self.shapes,
            "conditioning": self.conditioning,
            "unconditional": self.unconditional,
            "guidance_scale": self.guidance_scale,
            "cache": CACHE,
            "progress": False,
        }
        return olss_fast.build(**{"network": self.network, "plan": self.plans, **arguments, **changes})


TEXT = torch.linspace(-1, 1, 6).reshape(2, 3)


def tiny(kind: str) -> Tiny:
    """A new network of this kind, always with the same weights:

    guided      classes, batches of 1 to 4, 8…16 × 8…24 pixels in steps of 4; the default scale is 1.5
    plain       no conditioning; one fixed shape
    nested      conditioning in a mapping, guided; batches of 1 to 3
    bfloat16, float16     "plain" with weights of that dtype
    float64     so are these, and they lie in channels_last order
    """
    torch.manual_seed(0)
    if kind == "guided":
        shapes = Profile((1, 2, 8, 8), (2, 2, 12, 8), (4, 2, 16, 24), (1, 1, 4, 4))
        labels = torch.tensor([0, 1])
        return Tiny(TinyNetwork(3).eval(), shapes, GUIDED, {"labels": labels}, {"labels": 3}, 1.5)
    if kind == "nested":
        added = {"text": TEXT, "strength": torch.ones(2), "table": torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)}
        without = {"added": {**added, "text": torch.zeros(1, 3), "strength": 1.0}, "gain": 0.5}
        example = {"added": added, "gain": 0.5}
        shapes = Profile((1, 2, 8, 8), (2, 2, 8, 8), (3, 2, 8, 8))
        return Tiny(NestedNetwork().eval(), shapes, UNGUIDED, example, without, 2.0)
    network = TinyNetwork().eval()
    if kind != "plain":
        network = network.to(getattr(torch, kind))
    if kind == "float64":
        network = network.to(memory_format=torch.channels_last)
    return Tiny(network, (2, 2, 8, 8), UNGUIDED)


@functools.cache
def engine_file(kind: str) -> Path:
    """An engine file of this kind, for all to read."""
    return once(f"{kind}.olss", lambda path: tiny(kind).build().save(path))


@functools.cache
def tiny_engine(kind: str) -> Engine:
    """An engine of this kind, for all to run; who changes its weights loads one of their own from `engine_file`."""
    return olss_fast.load_engine(engine_file(kind))


def noise_for(kind: str, samples: int | None = None, *size: int) -> Tensor:
    """Noise in the profile of this kind of engine: at its `opt`, or of so many samples and this height and width."""
    parts = tiny(kind)
    batch, channels, *own = Profile.of(parts.shapes).opt
    shape = (samples or batch, channels, *(size or own))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(parts.network.into.weight.dtype)


class Compiled(Exception):
    """The compiler was called."""


def compiles(*arguments: Any) -> dict[str, bytes]:
    raise Compiled


def code_of(kind: str) -> dict[str, bytes]:
    """Compiled once, to stand for what the compiler would give again."""
    _, blobs = container.read(engine_file(kind), FORMAT)
    return {"network.so": bytes(blobs["code/network.so"].data)}
