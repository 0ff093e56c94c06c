"""ONNX models as files: whole or not there, checked, and refused with a name where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from made_plans import split
from onnx_runs import PLAN, SHAPE, Net, Wide, Y, assert_close, noise_of, run
from torch import Tensor
from typer.testing import CliRunner

import olss_fast
from olss_fast import demo, export_onnx
from olss_fast.cli.commands import app
from olss_fast.errors import BuildError, InputError, ModelError, NetworkError
from olss_fast.onnx import export as onnx_export
from olss_fast.onnx import file as onnx_file


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# --- files -----------------------------------------------------------------------------------------------------------


def test_large_weights_lie_beside_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST_INLINE", 1000)
    net = Wide().eval()
    export_onnx(net, PLAN, path, shape=(2, 5))
    (beside,) = path.parent.glob("model.onnx.*.data")
    assert {each.name for each in path.parent.iterdir()} == {path.name, beside.name}
    weights = sum(each.nbytes for each in net.parameters() if each.nbytes >= onnx_file.SMALL)
    assert weights <= beside.stat().st_size < weights + 10 * onnx_file.ALIGNMENT
    onnx.checker.check_model(path, full_check=True)
    noise = noise_of(3, (5,))
    assert_close(run(path, noise=noise), olss_fast.sample(net, PLAN, noise))
    torch.nn.init.zeros_(net.second.weight)
    export_onnx(net, PLAN, path, shape=(2, 5))
    assert beside.exists()  # the file of the model before stays what it was, for who has it open
    assert len(list(path.parent.glob("*.data"))) == 2


def test_what_fails_leaves_the_file_that_was_there(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"before")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ModelError, match=r"model\.onnx.*the disk is full"):
        export_onnx(net, PLAN, path, shape=SHAPE)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_an_invalid_model_is_never_written(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(model: Any) -> Any:
        proto = to_proto(model)
        proto.graph.node[0].op_type = "NoSuchOperator"
        return proto

    to_proto = onnx_file.ir.to_proto
    monkeypatch.setattr(onnx_file.ir, "to_proto", unknown)
    with pytest.raises(BuildError, match="NoSuchOperator"):
        export_onnx(net, PLAN, path, shape=SHAPE)
    assert not path.exists()


# --- bad input -------------------------------------------------------------------------------------------------------


class Unstable(torch.nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class OneBatch(torch.nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x.reshape(2, 5)


class NoSuchOperator(torch.nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], type[Exception], str]] = {
    "network": (lambda path: {"network": lambda x, t: x}, InputError, "network is a function"),
    "training": (lambda path: {"network": Net()}, InputError, "training mode"),
    "plan": (lambda path: {"plan": "five"}, InputError, "plan is a str"),
    "several networks": (lambda path: {"plan": PLAN.replace(models=[0, 0, 1, 1])}, InputError, r"networks \[0, 1\]"),
    "no shape": (lambda path: {"shape": 4}, InputError, "4"),
    "empty batch": (lambda path: {"shape": (0, 3, 4, 4)}, InputError, r"\(0, 3, 4, 4\)"),
    "other shape": (lambda path: {"shape": (2, 4, 4, 4)}, NetworkError, r"cannot be called.*\(2, 4, 4, 4\)"),
    "wrong batch": (lambda path: {"conditioning": {"y": torch.arange(3)}}, NetworkError, "cannot be called"),
    "unknown argument": (lambda path: {"conditioning": {"z": Y}}, NetworkError, "cannot be called.*'z'"),
    "reserved": (lambda path: {"conditioning": {"step_noise": 1.0 * Y}}, InputError, "step_noise"),
    "no mapping": (lambda path: {"conditioning": [Y]}, InputError, "conditioning"),
    "guidance alone": (lambda path: {"guidance_scale": 2.0}, InputError, "unconditional"),
    "no number": (lambda path: {"unconditional": {}, "guidance_scale": "x"}, InputError, "'x'"),
    "not finite": (lambda path: {"unconditional": {}, "guidance_scale": float("nan")}, InputError, "finite"),
    "other keys": (lambda path: {"unconditional": {"z": 1}}, InputError, "'z'"),
    "rows differ": (lambda path: {"conditioning": {"y": Y}, "unconditional": {"y": Y}}, InputError, "rows.*differ"),
    "shared differ": (
        lambda path: {"conditioning": {"table": torch.ones(3)}, "unconditional": {"table": torch.zeros(3)}},
        InputError,
        "differ in 'table'",
    ),
    "two branches": (lambda path: {"plan": split(PLAN, 2.0)}, InputError, "unconditional"),
    "folder": (lambda path: {"path": path.parent}, ModelError, "folder"),
    "no folder": (lambda path: {"path": path / "none" / "model.onnx"}, ModelError, "none"),
    "no path": (lambda path: {"path": 5}, InputError, "path is a int"),
    "not traceable": (lambda path: {"network": Unstable().eval(), "shape": (2, 5)}, BuildError, "data-dependent"),
    "one batch": (lambda path: {"network": OneBatch().eval(), "shape": (2, 5)}, BuildError, "batch"),
    "no such type": (lambda path: {"network": Net(torch.bfloat16).eval()}, BuildError, "Conv.*bfloat16"),
    "no operator": (lambda path: {"network": NoSuchOperator().eval(), "shape": (2, 5)}, BuildError, "bessel_j0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_has_a_named_error(case: str, net: Net, path: Path) -> None:
    changed, error, message = REFUSED[case]
    given: dict[str, Any] = {"network": net, "plan": PLAN, "path": path, "shape": SHAPE, **changed(path)}
    with pytest.raises(error, match=message):
        export_onnx(**given)
    assert list(path.parent.iterdir()) == []


def test_missing_packages_are_named(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BuildError, match=r"onnx_ir.*pip install 'olss-fast\[onnx\]'"):
        export_onnx(net, PLAN, path, shape=SHAPE)


def test_bad_input_is_found_before_any_work(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "forward", lambda *arguments: pytest.fail("the network was called"))
    with pytest.raises(ModelError):
        export_onnx(net, PLAN, path.parent, shape=SHAPE)


# --- command ---------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *given, **how: calls.append({"given": given, **how}))
    PLAN.save("plan.safetensors")
    for words in (["--steps", "5", "-o", "five.onnx"], ["--plan", "plan.safetensors", "-g", "1"]):
        outcome = CliRunner().invoke(app, ["export-onnx", "--model", "demo", "--device", "cpu", *words])
        assert outcome.exit_code == 0, outcome.output
    (_, steps, path), (_, plan, _) = (call["given"] for call in calls)
    assert (steps.nfe, path, plan) == (5, Path("five.onnx"), PLAN)
    assert int(calls[0]["unconditional"]["class_labels"][0]) == demo.CLASSES
    assert "unconditional" not in calls[1]
    assert calls[1]["shape"] == (2, *demo.SHAPE)
    assert "olss-fast export-onnx --model demo" in CliRunner().invoke(app, ["export-onnx", "--help"]).output
    outcome = CliRunner().invoke(app, ["export-onnx", "--model", "demo"])
    assert outcome.exit_code == 2
    assert "--plan FILE" in outcome.output
