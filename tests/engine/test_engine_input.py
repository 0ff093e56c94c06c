"""What a call of an engine refuses: by name, and before the compiled network is asked, which checks nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import GUIDED, engine_file, noise_for, tiny_engine
from torch import Tensor

import olss_fast
from olss_fast import solvers
from olss_fast.compiling.arguments import fixed_value, is_fixed_as
from olss_fast.compiling.request import checked_request
from olss_fast.errors import InputError, NetworkError

LABELS = torch.tensor([2, 0])
NESTED = {"text": torch.linspace(0, 1, 6).reshape(2, 3), "strength": torch.tensor([0.5, 2.0])}
TABLE = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)


def never(*arguments: Any) -> Tensor:
    raise AssertionError("the compiled network was called")


def refuses(monkeypatch: pytest.MonkeyPatch, kind: str, message: str, noise: Any, given: dict[str, Any]) -> None:
    """InputError with this message, and the compiled network, which would check nothing, is not called."""
    engine = tiny_engine(kind)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "network", never)
        with pytest.raises(InputError, match=message):
            engine(noise, **given)


GOOD = noise_for("guided")


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("x", "noise is a str; expected a tensor of 1…4 × 2 × 8…16 in steps of 4 × 8…24 in steps of 4"),
        (GOOD.numpy(), "noise is a ndarray; expected a tensor"),
        (GOOD[0], r"shape \(2, 12, 8\); this engine takes 4 axes"),
        (GOOD[None], r"shape \(1, 2, 2, 12, 8\); this engine takes 4 axes"),
        (torch.zeros(0, 2, 8, 8), r"\(0, 2, 8, 8\), and axis 0 does not fit .*expected 1…4;"),
        (torch.zeros(5, 2, 8, 8), r"\(5, 2, 8, 8\), and axis 0 does not fit .*expected 1…4;"),
        (torch.zeros(2, 3, 8, 8), "axis 1 does not fit .*expected 2;"),
        (torch.zeros(2, 1, 8, 8), "axis 1 does not fit .*expected 2;"),
        (torch.zeros(2, 2, 4, 8), "axis 2 does not fit .*expected 8…16 in steps of 4; build an engine with a wider"),
        (torch.zeros(2, 2, 20, 8), "axis 2 does not fit"),
        (torch.zeros(2, 2, 10, 8), "axis 2 does not fit"),
        (torch.zeros(2, 2, 8, 28), "axis 3 does not fit .*expected 8…24 in steps of 4;"),
        (GOOD.double(), "noise is torch.float64; this engine takes float32: convert it, or build another engine"),
        (GOOD.half(), "noise is torch.float16"),
        (GOOD.long(), "noise is torch.int64"),
        (GOOD.to(torch.complex64), "noise is torch.complex64"),
        (GOOD.to("meta"), "noise lies on meta; this engine runs on cpu: move it there"),
        (GOOD.to_sparse(), "noise has the layout torch.sparse_coo"),
        (GOOD.to(memory_format=torch.channels_last), r"strides \(192, 1, 16, 2\), it is not contiguous; call .contig"),
        (torch.zeros(2, 2, 8, 16)[..., ::2], "it is not contiguous"),
        (torch.zeros(1, 2, 8, 8).expand(2, 2, 8, 8), "it is not contiguous"),
        (torch.full_like(GOOD, torch.nan), "the noise holds NaN or infinity"),
        (torch.cat([GOOD[:1], GOOD[1:] * torch.inf]), "the noise holds NaN or infinity"),
    ],
)
def test_noise_that_it_was_not_built_for(monkeypatch: pytest.MonkeyPatch, noise: Any, message: str) -> None:
    refuses(monkeypatch, "guided", message, noise, {"labels": 1})


def test_more_samples_than_an_engine_is_fixed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead-of-time compiled code returns as many as it is fixed to then, and says nothing."""
    refuses(monkeypatch, "plain", "axis 0 does not fit the engine's profile: expected 2;", torch.zeros(4, 2, 8, 8), {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "conditioning: labels is missing; this engine takes the arguments: labels"),
        ({"label": 1}, "conditioning: labels is missing and 'label' is unknown"),
        ({"labels": 1, "scale": 2, "gain": 3}, "conditioning: 'gain, scale' is unknown"),
        ({"labels": {"a": 1}}, "labels is missing and 'labels.a' is unknown"),
        ({"labels": None}, r"conditioning\['labels'\] is a NoneType; expected a int64 tensor of shape \(2,\)"),
        ({"labels": [0, 1]}, r"conditioning\['labels'\] is a list"),
        ({"labels": "1"}, r"conditioning\['labels'\] is a str"),
        ({"labels": torch.tensor([1])}, r"conditioning\['labels'\] has shape \(1,\); expected \(2,\)"),
        ({"labels": torch.tensor(1)}, r"conditioning\['labels'\] has shape \(\); expected \(2,\)"),
        ({"labels": torch.tensor([1, 2, 3])}, r"has shape \(3,\); expected \(2,\)"),
        ({"labels": torch.tensor([[1, 2]])}, r"has shape \(1, 2\); expected \(2,\)"),
        ({"labels": torch.tensor([1.0, 2.0])}, "is torch.float32; this engine takes int64"),
        ({"labels": torch.tensor([1, 2], dtype=torch.int32)}, "is torch.int32; this engine takes int64"),
        ({"labels": LABELS.to("meta")}, r"conditioning\['labels'\] lies on meta; this engine runs on cpu"),
        ({"labels": LABELS.to_sparse()}, r"conditioning\['labels'\] has the layout torch.sparse_coo"),
        ({"labels": 1.5}, r"conditioning\['labels'\] is 1.5, which does not fit int64"),
        ({"labels": float("nan")}, r"conditioning\['labels'\] is nan, which does not fit int64"),
        ({"labels": 2**63}, "which does not fit int64"),
        ({"labels": 1, "unconditional": 3}, "unconditional must be a mapping of argument names to values, got int"),
        ({"labels": 1, "unconditional": {"y": 3}}, "unconditional: 'y' is unknown"),
        ({"labels": 1, "unconditional": {3: 3}}, r"unconditional must be a mapping .*, got the keys \[3\]"),
        ({"labels": 1, "unconditional": {1: 2, "1": 3}}, r"unconditional must be .*, got the keys \[1, '1'\]"),
        ({"labels": 1, "unconditional": {"labels": torch.tensor([1, 2, 3])}}, r"unconditional\['labels'\] has shape"),
        (
            {"labels": 1, "unconditional": {"labels": 1.5}},
            r"unconditional\['labels'\] is 1.5, which does not fit int64",
        ),
        ({"labels": 1, "steps": 7}, r"no plan of 7 steps; it has two \(2 steps\), three \(3 steps\), .*plan="),
        ({"labels": 1, "steps": "two"}, "no plan of 'two' steps"),
        ({"labels": 1, "plan": "seven"}, "no plan 'seven'; it has two"),
        ({"labels": 1, "plan": 2}, "no plan 2; it has two"),
        ({"labels": 1, "plan": ["two"]}, r"no plan \['two'\]; it has two"),
        ({"labels": 1, "plan": "two", "steps": 2}, "steps and plan were both given"),
        ({"labels": 1, "generator": 3}, "generator is a int; expected a torch.Generator"),
        ({"labels": 1, "guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"labels": 1, "guidance_scale": float("nan")}, "guidance_scale must be finite"),
        ({"labels": 1, "guidance_scale": 1e39}, "guidance_scale must be finite in float32"),
        ({"labels": 1, "plan": "split", "guidance_scale": 2.0}, "guidance_scale=1.5 folded into its coefficients"),
    ],
)
def test_arguments_that_it_was_not_built_for(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    refuses(monkeypatch, "guided", message, GOOD, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "conditioning: added.strength, added.table, added.text is missing; this engine takes the arg"),
        ({"added": NESTED}, "conditioning: added.table is missing"),
        ({"added": {**NESTED, "table": TABLE, "more": 1}}, "'added.more' is unknown"),
        ({"added": {**NESTED, "table": TABLE}, "gain": 0.5}, "gain was baked in .*, as 0.5; leave it out"),
        ({"added": {**NESTED, "table": -TABLE}}, "differ in 'added.table', which belongs to no sample"),
        ({"added": {**NESTED, "table": TABLE[0]}}, r"conditioning\['added.table'\] has shape \(2, 1, 1\); expected"),
        (
            {"added": {**NESTED, "table": TABLE, "strength": 1e39}},
            r"added.strength'\] is 1e\+39, which does not fit float32",
        ),
    ],
)
def test_nested_arguments_that_it_was_not_built_for(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    refuses(monkeypatch, "nested", message, noise_for("nested"), given)


@pytest.mark.parametrize(
    ("value", "same", "other"),
    [
        (0.5, 0.5, 1.0),
        ([0.125] * 60 + [1.0], None, [0.125] * 60 + [2.0]),
        ("a" * 300, None, "a" * 301),
        ({1: "b"}, {1: "b"}, {1: "c"}),
    ],
)
def test_baked_in_values_that_come_along_are_compared_whole(value: Any, same: Any, other: Any) -> None:
    """None: what a manifest holds of it is not all of it, so it counts as another one."""
    text = fixed_value(value)
    assert is_fixed_as(text, value) is (same is not None)
    assert not is_fixed_as(text, other)
    assert not is_fixed_as(fixed_value(pytest), pytest)  # the same object, whose content nobody can see


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0, but this engine is built without guidance: expected 1"),
        ({"unconditional": {"labels": 1}}, "unconditional was given, but .* its network takes no arguments"),
        ({"labels": 1}, "conditioning: 'labels' is unknown; this engine takes the arguments: none"),
        ({"plan": GUIDED["split"]}, "keeps both outputs of a guided pair apart: build the engine with unconditional"),
        ({"plan": GUIDED["two"].replace(models=[0, 1])}, "uses network 1, but 1 came"),
    ],
)
def test_what_an_engine_without_guidance_refuses(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    refuses(monkeypatch, "plain", message, noise_for("plain"), given)


def test_outputs_that_are_not_finite_name_the_evaluation() -> None:
    engine = olss_fast.load_engine(engine_file("plain"))
    engine.update_weights({"last.bias": torch.full((2,), torch.inf)})
    with pytest.raises(NetworkError, match="NaN or infinity at evaluation 0"):
        engine(noise_for("plain"))


@pytest.mark.parametrize("label", [4, 99, -1])
def test_classes_that_the_network_has_not(label: int) -> None:
    """With several threads: a check of the compiled code's own would end the process there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(NetworkError, match=r"compiled network failed: .* numbers of classes that it has\?"):
            tiny_engine("guided")(GOOD, labels=torch.tensor([0, label]))
    finally:
        torch.set_num_threads(threads)


class InPlace(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.mul_(0.5)


def test_a_network_that_writes_to_its_input_is_handed_a_copy() -> None:
    """The next row is formed next to x as it was: the code that is compiled must not write to it."""
    plans = {"ddim": solvers.ddim(olss_fast.NoiseSchedule.named("linear"), 2)}
    profile = olss_fast.Profile(min=(2, 3), opt=(2, 3), max=(2, 3))
    request = checked_request(InPlace().eval(), plans, profile, None, None, None, torch.float32, "cpu")
    program = torch.export.export(request.flat, tuple(request.inputs()), strict=False)
    assert not program.run_decompositions().graph_signature.user_inputs_to_mutate
    x = torch.ones(2, 3)
    assert torch.equal(request.flat(x, torch.zeros(2)), 0.5 * x)
    assert bool((x == 1).all())
