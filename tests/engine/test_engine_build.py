"""`build`: what it refuses, and what its engines say about themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import GUIDED, SCHEDULE, Compiled, TinyNetwork, code_of, compiles, folded, noise_for, tiny, tiny_engine
from torch import Tensor

from olss_fast import Profile, build, solvers
from olss_fast.engine import building
from olss_fast.errors import BuildError, InputError, NetworkError, OlssError

PLAN = GUIDED["two"]
SHAPES = Profile((1, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": lambda x, time: x}, "network is a function; expected a torch.nn.Module in evaluation mode"),
        ({"network": TinyNetwork()}, "network is in training mode; .*call .eval()"),
        ({"plan": []}, r"plan is \[\]; expected a Plan, several, or several by name"),
        ({"plan": {}}, "plan is {}; expected a Plan"),
        ({"plan": None}, "plan is None; expected a Plan"),
        ({"plan": ["two"]}, "plan holds a str; expected Plans"),
        ({"plan": {"a": "two"}}, "plan is {'a': 'two'}; expected a Plan"),
        ({"plan": {"a/b": PLAN}}, "plans are named .*'a/b'.*; expected letters"),
        ({"plan": {3: PLAN}}, r"plans are named \[3\]; expected letters"),
        ({"plan": {"": PLAN}}, "plans are named"),
        ({"plan": folded(PLAN, 1.0)}, "keeps the unconditional and the conditional output apart: pass unconditional"),
        ({"plan": PLAN.replace(models=[0, 1])}, "uses network 1, but 1 came"),
        ({"shapes": (2,)}, r"min is \(2,\); expected a shape"),
        ({"shapes": None}, "min is None; expected a shape"),
        ({"shapes": (2, 2, 8.0, 8)}, r"min is \(2, 2, 8.0, 8\); expected a shape"),
        ({"shapes": (0, 2, 8, 8)}, r"min is \(0, 2, 8, 8\); expected a shape .* at least 1"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs the unconditional arguments too"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"dtype": torch.int32}, "dtype is torch.int32; expected one of torch.float16, torch.bfloat16, torch.float32"),
        ({"dtype": "float32x"}, "dtype is 'float32x'; expected one of"),
        ({"device": "meta"}, "device is 'meta', which torch cannot use"),
        ({"device": "nonsense"}, "device is 'nonsense', which torch cannot use"),
        ({"conditioning": [1]}, "conditioning must be a mapping of argument names to values, got list"),
        ({"conditioning": {3: 4}}, r"conditioning must be a mapping of argument names to values, got the keys \[3\]"),
        ({"conditioning": {"a.b": 4}}, "the network has an argument 'a.b'; expected Python names"),
        ({"unconditional": [1]}, "unconditional must be a mapping"),
        ({"unconditional": {"labels": 1}}, "unconditional has the keys .*'labels'.* but conditioning has"),
    ],
)
def test_arguments_that_cannot_be(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(building, "export", compiles)
    with pytest.raises(InputError, match=message):
        tiny("plain").build(**{"plan": PLAN, "shapes": SHAPES, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unconditional": {"labels": torch.tensor([0, 1])}}, r"the rows of unconditional\['labels'\] differ"),
        ({"unconditional": {"labels": torch.tensor([0, 1, 2])}}, r"unconditional\['labels'\] has shape \(3,\)"),
        (
            {"unconditional": {"labels": None}},
            "conditioning and unconditional differ in 'labels', which is not a tensor in both: .*give a tensor",
        ),
        ({"guidance_scale": 2.0}, "guidance_scale=1.5 folded into its coefficients"),
        ({"shapes": (3, 2, 8, 8), "conditioning": {"labels": torch.tensor([0, 1])}}, "cannot be called"),
    ],
)
def test_conditioning_that_cannot_be(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(building, "export", compiles)
    with pytest.raises((InputError, NetworkError), match=message):
        tiny("guided").build(**changes)


class Captioned(TinyNetwork):
    def forward(self, x: Tensor, timestep: Tensor, names: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep)


def test_arrays_of_text_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "export", compiles)
    names, network = np.array(["a", "b"]), Captioned().eval()
    with pytest.raises(Compiled):
        build(
            network,
            PLAN,
            shapes=SHAPES,
            conditioning={"names": names},
            unconditional={"names": names.copy()},
            cache=False,
        )
    with pytest.raises(InputError, match="differ in 'names', which is not a tensor in both"):
        build(
            network,
            PLAN,
            shapes=SHAPES,
            conditioning={"names": names},
            unconditional={"names": names[::-1]},
            cache=False,
        )


def test_a_tensor_of_no_sample_that_differs_between_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call with these arguments could be run: refused before minutes are spent on compiling."""
    monkeypatch.setattr(building, "export", compiles)
    parts = tiny("nested")
    assert parts.unconditional is not None
    added = parts.unconditional["added"]
    with pytest.raises(InputError, match=r"differ in 'added.table', whose first size is not that of the samples, 2"):
        parts.build(unconditional={"added": {**added, "table": -added["table"]}, "gain": 0.5}, cache=False)


@pytest.mark.parametrize("name", ["noise", "steps", "plan", "guidance_scale", "unconditional", "generator", "seed"])
def test_names_of_an_engines_own_arguments(name: str) -> None:
    with pytest.raises(
        InputError,
        match=rf"an argument '{name}'; expected Python names other than generator, guidance_scale, noise, .*wrap",
    ):
        tiny("plain").build(conditioning={name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 2, 8), (1, 2, 8, 8), (1, 2, 8, 8)), "expected equally many axes"),
        (((2, 2, 8), (1, 2, 8), (1, 2, 8)), "axis 0 has min 2, opt 1, max 1"),
        (((1, 2, 8), (1, 2, 8), (1, 1, 8)), "axis 1 has min 2, opt 2, max 1"),
        (((1, 2, 8), (1, 2, 8), (1, 2, 8), (1, 1)), r"multiple is \(1, 1\); expected 3 numbers"),
        (((1, 2, 8), (1, 2, 8), (1, 2, 8), (1, 1, 3)), "axis 2 .* in steps of 3"),
        (((1, 2, 8), (1, 2, 8), (1, 2, 8), (1, 1, 0)), r"multiple is \(1, 1, 0\)"),
        (("12", (1, 2), (1, 2)), "min is '12'"),
        (((1, True), (1, 2), (1, 2)), r"min is \(1, True\)"),
        (((1, 2), (1, 2), (1, 2**31)), "max is"),
    ],
)
def test_profiles_that_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Profile(*arguments)


def test_multiples_follow_from_the_sizes() -> None:
    assert Profile((1, 3, 64, 7), (2, 3, 96, 9), (8, 3, 128, 21)).multiple == (1, 1, 8, 1)
    assert Profile((2, 4, 32, 20), (2, 4, 32, 20), (2, 4, 32, 20)).multiple == (1, 4, 8, 4)


class Odd(TinyNetwork):
    """A network that `spoil` makes unfit for an engine."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.spoil(super().forward(x, timestep), timestep)


def branching(output: Tensor, timestep: Tensor) -> Tensor:
    return output if float(timestep[0]) > 500 else -output


def only_eight(output: Tensor, timestep: Tensor) -> Tensor:
    return output * (1 if output.shape[2] == 8 else 2)


@pytest.mark.parametrize(
    ("spoil", "shapes", "error", "message"),
    [
        (lambda output, _: output[:, :1], SHAPES, NetworkError, r"returned shape \(2, 1, 8, 8\) for an input of shape"),
        (lambda output, _: None, SHAPES, NetworkError, "the network returned NoneType"),
        (lambda output, _: output / 0, SHAPES, NetworkError, "the network returned NaN or infinity at evaluation 0"),
        (branching, SHAPES, BuildError, "the network cannot be exported for noise of 1…4 × 2 × 8 × 8: "),
    ],
)
def test_networks_that_cannot_be_exported(
    monkeypatch: pytest.MonkeyPatch, spoil: Any, shapes: Profile, error: type[OlssError], message: str
) -> None:
    monkeypatch.setattr(building, "compile_code", compiles)
    with pytest.raises(error, match=message):
        tiny("plain").build(network=Odd(spoil).eval(), shapes=shapes, cache=False)


@pytest.mark.slow
def test_sizes_that_the_network_treats_differently() -> None:
    """torch.export takes it that a size which varies is never one step; the end of the profile is where it may be."""
    shapes = Profile((1, 2, 8, 8), (1, 2, 16, 8), (1, 2, 16, 8))
    with pytest.raises(BuildError, match="the compiled network differs from the original by"):
        tiny("plain").build(network=Odd(only_eight).eval(), shapes=shapes, cache=False)


def noisy(output: Tensor, timestep: Tensor) -> Tensor:
    return output + 0.1 * torch.rand_like(output)


def late(output: Tensor, timestep: Tensor) -> Tensor:
    return torch.where(timestep < 600, -1.0, 1.0)[:, None, None, None] * output


@pytest.mark.parametrize("spoil", [noisy, late])
def test_code_that_computes_something_else_is_no_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Any
) -> None:
    """Here because the compiler's answer is another network's; a network that is random differs alike."""
    code = code_of("plain")
    monkeypatch.setattr(building, "compile_code", lambda *_: code)
    torch.manual_seed(0)
    with pytest.raises(BuildError, match=r"differs from the original by [\d.]+ where the largest output is .* random"):
        tiny("plain").build(network=Odd(spoil).eval(), cache=tmp_path)


def test_compilers_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"the network cannot be compiled: .*nonsense"):
        tiny("plain").build(options={"nonsense": 1}, cache=False)


# --- plans and manifest --------------------------------------------------------------------------------------------


def test_plans_get_names() -> None:
    again, other = solvers.ddim(SCHEDULE, 2, spacing="leading"), solvers.unipc(SCHEDULE, 3)
    engine = tiny("plain").build(plan=[PLAN, again, other])
    assert list(engine.plans) == ["ddim-2", "ddim-2.2", f"{other.metadata['method']}-3"]
    assert torch.equal(engine(noise_for("plain"), plan="ddim-2.2"), engine(noise_for("plain"), plan=again))
    assert list(tiny("plain").build(plan=PLAN).plans) == ["ddim-2"]


def test_the_manifest_says_what_was_built() -> None:
    facts = tiny_engine("guided").manifest.facts
    assert facts["network"] == "TinyNetwork"
    assert (facts["dtype"], facts["doubled"], facts["guidance_scale"]) == ("float32", True, 1.5)
    assert facts["profile"]["max"] == [4, 2, 16, 24]
    assert facts["inputs"] == [{"name": "labels", "dtype": "int64", "shape": ["batch"]}]
    assert [(each["name"], each["nfe"], each["branches"], each["noises"]) for each in facts["plans"]] == [
        (name, plan.nfe, plan.branches, plan.noises) for name, plan in GUIDED.items()
    ]
    assert {"idle.weight", "idle.bias"} <= set(facts["unused"])
    assert 0 <= facts["measured"]["largest_difference"] < 1e-5
    assert "machine code" in facts["notice"]
    nested = tiny_engine("nested").manifest.facts
    assert nested["inputs"] == [
        {"name": "added.text", "dtype": "float32", "shape": ["batch", 3]},
        {"name": "added.strength", "dtype": "float32", "shape": ["batch"]},
        {"name": "added.table", "dtype": "float32", "shape": [1, 2, 1, 1]},
    ]


def test_another_dtype_leaves_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of("bfloat16")
    monkeypatch.setattr(building, "compile_code", lambda *_: code)
    parts = tiny("plain")
    engine = parts.build(dtype=torch.bfloat16, cache=False)
    assert parts.network.into.weight.dtype == torch.float32
    noise = noise_for("bfloat16")
    assert torch.equal(engine(noise), tiny_engine("bfloat16")(noise))
