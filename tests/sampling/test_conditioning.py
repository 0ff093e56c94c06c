"""Conditioning in dicts, lists, tuples, dataclasses: answers as with every tensor by a name of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_tunings import LEAST
from torch import Tensor, nn

import olss_fast
from olss_fast import NoiseSchedule, Profile, solvers
from olss_fast.compiling.arguments import flatten
from olss_fast.compiling.request import checked_request
from olss_fast.errors import InputError, NetworkError
from olss_fast.tuning.compare import compare

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
PLAN = solvers.dpm_solver_pp(SCHEDULE, 4, order=2)
SAMPLES = 12
NOISE = torch.randn((SAMPLES, 2, 2, 2), generator=torch.Generator().manual_seed(0))
NAMES = ("a", "b", "c", "d", "table")


@dataclass(frozen=True)
class Extra:
    c: Any
    note: str = "kept"


class Pair(NamedTuple):
    d: Any
    nothing: None = None


def values(seed: int) -> dict[str, Tensor]:
    """Four tensors of the samples, and one that belongs to none."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: 0.3 * torch.randn((SAMPLES, 2), generator=generator) for name in NAMES[:4]}
    return {**found, "table": torch.tensor([[1.0, 0.5]])}


def nested(v: Mapping[str, Any]) -> dict[str, Any]:
    return {"added": {"list": [v["a"], (v["b"],)], "extra": Extra(v["c"]), "pair": Pair(v["d"])}, "table": v["table"]}


class Flat(nn.Module):
    def forward(self, x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, table: Tensor) -> Tensor:
        return x * (0.5 + a + b * c)[:, :, None, None] + (d * table)[:, :, None, None]


class Nested(Flat):
    def forward(self, x: Tensor, t: Tensor, added: Mapping[str, Any], table: Tensor) -> Tensor:  # type: ignore[override]
        (a, (b,)), extra, pair = added["list"], added["extra"], added["pair"]
        assert isinstance(extra, Extra)
        assert isinstance(pair, Pair)
        assert (extra.note, pair.nothing) == ("kept", None)
        return super().forward(x, t, a, b, extra.c, pair.d, table)


def both(door: Callable[..., Any], **how: Any) -> tuple[Any, Any]:
    """What a door gives for the nested arguments, and for the flat ones."""
    given, without = values(1), {**values(2), "table": values(1)["table"]}
    first = door(Nested(), conditioning=nested(given), unconditional=nested(without), guidance_scale=1.5, **how)
    return first, door(Flat(), conditioning=given, unconditional=without, guidance_scale=1.5, **how)


@pytest.mark.parametrize("how", [{}, {"batch_size": 5}, {"doubled": False}])
def test_sample(how: dict[str, Any]) -> None:
    first, other = both(olss_fast.sample, plan=PLAN, noise=NOISE, **how)
    assert torch.equal(first, other)


def test_arrays_of_numpy_and_numbers_inside_are_taken_too() -> None:
    given = values(1)
    arrays = nested({name: each.numpy() for name, each in given.items()})
    expected = olss_fast.sample(Nested(), PLAN, NOISE, conditioning=nested(given))
    assert torch.equal(olss_fast.sample(Nested(), PLAN, NOISE, conditioning=arrays), expected)
    zeros = nested({name: torch.zeros(()) for name in NAMES})
    zeros["added"]["list"] = [0.0, (0,)]
    numbers = {"conditioning": nested(given), "unconditional": {**zeros, "table": given["table"]}}
    blank = {"conditioning": nested(given), "unconditional": nested({**given, **{n: given[n] * 0 for n in "abcd"}})}
    first, other = (olss_fast.sample(Nested(), PLAN, NOISE, guidance_scale=2.0, **each) for each in (numbers, blank))
    assert torch.equal(first, other)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_sampler(backend: str) -> None:
    def door(network: Any, **how: Any) -> list[Tensor]:
        sampler = olss_fast.Sampler(network, PLAN, backend=backend, **how)
        again = {name: torch.utils._pytree.tree_map(double, each) for name, each in how["conditioning"].items()}
        return [sampler(NOISE), sampler(NOISE, **again), sampler(NOISE)]

    first, other = both(door)
    assert all(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])  # what was written over the loop's copies came back


def double(leaf: Any) -> Any:
    if isinstance(leaf, Extra):
        return Extra(2 * leaf.c)
    return 2 * leaf if isinstance(leaf, Tensor) else leaf


def test_tune_and_compare() -> None:
    how = {"noise": NOISE, "schedule": SCHEDULE, "teacher_steps": 5, "progress": False}
    first, other = both(olss_fast.tune, steps=1, effort=LEAST, batch_size=4, **how)
    assert first.plans == other.plans
    assert [each.errors for each in first.report.candidates] == [each.errors for each in other.report.candidates]
    first, other = both(compare, steps=[2], batch_size=4, **how)
    assert [each.errors for each in first.candidates] == [each.errors for each in other.candidates]


def test_a_store_knows_what_lies_inside(tmp_path: Any) -> None:
    def tune(given: dict[str, Tensor]) -> None:
        how = {"noise": NOISE, "schedule": SCHEDULE, "teacher_steps": 3, "steps": 1, "effort": LEAST}
        olss_fast.tune(Nested(), conditioning=nested(given), store=tmp_path, progress=False, **how)

    tune(values(1))
    tune(values(1))
    with pytest.raises(olss_fast.errors.StoreError, match=r"conditioning\.added\['extra'\]\.c"):
        tune({**values(1), "c": values(3)["c"]})


def test_build_hands_on_the_same() -> None:
    """What is compiled, before it is: `forward(x, time, *tensors)` of the flattened arguments."""
    given, plans, profile = values(1), {"plan": PLAN}, Profile.of(NOISE.shape)
    request = checked_request(Nested().eval(), plans, profile, nested(given), None, None, None, None)
    assert list(request.tensors) == ["added.list.0", "added.list.1.0", "added.extra.c", "added.pair.d", "table"]
    assert request.fixed == {"added.extra.note": "'kept'", "added.pair.nothing": "None"}
    assert request.per_sample == [True, True, True, True, False]
    x, time, *tensors = request.inputs()
    assert torch.equal(request.flat(x, time, *tensors), Flat()(x, time, **given))
    assert list(flatten({"kept": [1, 2], "empty": {}, "in": {"a": {}}})) == ["kept", "empty", "in.a"]


RAGGED = {
    "list": ({"a": [torch.zeros(SAMPLES), torch.zeros(3, 2)]}, "conditioning['a'][1] has 3 samples, noise 12"),
    "tuple": (
        {"a": {"b": (torch.zeros(5), torch.zeros(SAMPLES))}},
        "conditioning['a']['b'][0] has 5 samples, noise 12",
    ),
    "dataclass": ({"a": Extra([np.zeros(7), np.zeros(12)])}, "conditioning['a'].c[0] has 7 samples, noise 12"),
}


@pytest.mark.parametrize("kind", RAGGED)
def test_a_ragged_list_is_refused_everywhere(kind: str) -> None:
    conditioning, message = RAGGED[kind]
    how = {"noise": NOISE, "schedule": SCHEDULE, "conditioning": conditioning}
    doors: list[Callable[[], Any]] = [
        lambda: olss_fast.sample(Nested(), PLAN, NOISE, conditioning=conditioning),
        lambda: olss_fast.Sampler(Nested(), PLAN, conditioning=conditioning)(NOISE),
        lambda: olss_fast.tune(Nested(), steps=1, **how),
        lambda: compare(Nested(), steps=[1], **how),
        lambda: olss_fast.build(Nested().eval(), PLAN, shapes=tuple(NOISE.shape), conditioning=conditioning),
    ]
    for door in doors:
        with pytest.raises(InputError) as refused:
            door()
        assert message in str(refused.value)


def test_lists_of_which_no_tensor_or_every_one_has_that_many_rows_are_handed_on() -> None:
    def network(x: Tensor, t: Tensor, rotary: tuple[Tensor, ...], blocks: list[Tensor]) -> Tensor:
        assert [len(each) for each in (*rotary, *blocks)] == [7, 5, 4, 1]
        return x * blocks[0][:, None, None, None]

    given = {"rotary": (torch.zeros(7, 2), torch.zeros(5, 2)), "blocks": [torch.ones(SAMPLES), torch.ones(1, 3)]}
    olss_fast.sample(network, PLAN, NOISE, conditioning=given, batch_size=4)


def test_a_network_that_fails_over_an_argument_inside_names_it() -> None:
    given = {**values(1), "c": torch.zeros(5, 2)}
    with pytest.raises(NetworkError, match=r"added\['extra'\]\.c has 5 rows; expected 12"):
        olss_fast.sample(Nested(), PLAN, NOISE, conditioning=nested(given))


def test_a_number_that_a_class_cannot_be_is_refused_everywhere() -> None:
    """It used to be rounded in `sample`, and to be refused by `build`."""
    how = {"conditioning": {"y": torch.zeros(SAMPLES, dtype=torch.int64)}, "unconditional": {"y": 1.5}}
    how["guidance_scale"] = 2.0
    doors: list[Callable[[], Any]] = [
        lambda: olss_fast.sample(Flat(), PLAN, NOISE, **how),
        lambda: olss_fast.Sampler(Flat(), PLAN, **how)(NOISE),
        lambda: olss_fast.build(Flat().eval(), PLAN, shapes=tuple(NOISE.shape), **how),
    ]
    for door in doors:
        with pytest.raises(InputError, match=r"unconditional\['y'\] is 1\.5, which is no torch\.int64"):
            door()
