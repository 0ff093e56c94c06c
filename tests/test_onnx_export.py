"""ONNX models of whole samplers, run in ONNX Runtime on the CPU: what `olss_fast.sample` gives, at any batch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from typer.testing import CliRunner

import olss_fast
from olss_fast import NoiseSchedule, Plan, _onnx_file, demo, export_onnx, onnx_export, solvers
from olss_fast.cli import app
from olss_fast.errors import BuildError, InputError, ModelError

onnxruntime = pytest.importorskip("onnxruntime")

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 3, 4, 4)
PLAN = solvers.dpm_solver_pp(SCHEDULE, 4, order=2)
# Of the largest value. Two independent float32 networks: rounding of 2^-24 a product, some steps of amplification.
TOLERANCE = 1e-5
# float16: sums are float32 in both, what is rounded to 2^-11 is x and each output; a few of these add up.
HALF_TOLERANCE = 8 * 2.0**-11


class Net(torch.nn.Module):
    """Not linear in x, feels the time and what it is given; mixes pixels, so that a wrong layout shows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=dtype)
        self.y = torch.nn.Embedding(11, 3, dtype=dtype)  # also the name of an argument

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        table: Tensor | None = None,
        residuals: tuple[Tensor, ...] = (),
        gain: float = 1.0,
    ) -> Tensor:
        shift = (timestep / 1000).to(x.dtype)[:, None]
        shift = shift if y is None else shift + self.y(y)
        if added is not None:
            shift = shift + added["text"].mean(1)[:, :3] + added["size"][:, None]
        if table is not None:
            shift = shift + table.sum()
        for each in residuals:
            x = x + each
        return gain * torch.tanh(self.mix(x) + shift[..., None, None])


Y = torch.tensor([3, 7])
EVERYTHING: dict[str, Any] = {
    "y": Y,
    "added": {"text": torch.linspace(-1.0, 1.0, 40).view(2, 5, 4), "size": torch.tensor([0.1, 0.2])},
    "table": torch.tensor([0.3, -0.1, 0.2]),
    "residuals": (torch.full(SHAPE, 0.1), torch.linspace(0.0, 0.1, 96).view(SHAPE)),
    "gain": 0.9,
}
NOTHING: dict[str, Any] = {
    "y": 10,
    "added": {"text": torch.zeros(1, 5, 4), "size": torch.zeros(1)},
    "table": EVERYTHING["table"],
    "residuals": (torch.zeros(1, *SHAPE[1:]), 0.25),
    "gain": 0.9,
}


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def noise_of(batch: int, shape: tuple[int, ...] = SHAPE[1:], seed: int = 0) -> Tensor:
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(seed))


def session_of(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about inputs that may be left out
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, **inputs: Any) -> NDArray[Any]:
    (sample,) = session_of(path).run(["sample"], {name: np.asarray(each) for name, each in inputs.items()})
    return sample


def assert_close(found: NDArray[Any], expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == tuple(expected.shape)
    largest = float(expected.abs().max())
    assert np.abs(found.astype(np.float64) - expected.double().numpy()).max() <= tolerance * largest


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *itertools.chain.from_iterable(map(nodes_of, inner))]


# --- the embedded model ----------------------------------------------------------------------------------------------


def test_the_embedded_model_from_one_file_at_any_batch(path: Path) -> None:
    """1e-5 of `sample` as a root mean square (measured: 1e-6). Single pixels of both are further from the exact
    result, 1.4e-5 at most over 64 images for either: guidance and solver amplify what float32 rounds. So the largest
    difference is held to the error budget, over all images at once."""
    model, exact = demo.load("cpu"), demo.load("cpu", torch.float64)
    plan = solvers.unipc(model.schedule, 5)
    how: dict[str, Any] = {"unconditional": {"class_labels": model.null_class}, "guidance_scale": model.guidance_scale}
    example = {"class_labels": torch.tensor([0, 1])}
    export_onnx(model.network, plan, path, shape=(2, *model.shape), example=example, **how)
    noise, labels = noise_of(8, model.shape), torch.arange(8)
    session = session_of(path)
    parts = [
        session.run(None, {"noise": noise[part].numpy(), "class_labels": labels[part].numpy()})[0]
        for part in (slice(0, 1), slice(1, 3), slice(3, 8))
    ]
    found = np.concatenate(parts).astype(np.float64)
    expected, reference = (
        olss_fast.sample(plan, network, each, conditioning={"class_labels": labels}, **how).double().numpy()
        for network, each in ((model.network, noise), (exact.network, noise.double()))
    )
    largest = np.abs(reference).max()
    assert np.sqrt(np.mean((found - expected) ** 2)) <= TOLERANCE * largest
    assert np.abs(found - reference).max() <= 2 * np.abs(expected - reference).max()
    assert np.abs(expected - reference).max() <= 5e-5 * largest  # else the line above says nothing


def test_weights_keep_their_names(net: Net, path: Path) -> None:
    export_onnx(net, PLAN, path, shape=SHAPE, example={"y": Y})
    model = onnx.load(path)
    for name, weight in net.state_dict().items():
        assert np.array_equal(table_of(model, name), weight.numpy())


# --- what is computed ------------------------------------------------------------------------------------------------


PLANS = {
    "dpm": PLAN,
    "unipc": solvers.unipc(SCHEDULE, 5, order=3),
    "one step": solvers.ddim(SCHEDULE, 1),
    "ddim eta": solvers.ddim(SCHEDULE, 4, eta=1.0),
}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_plan_at_several_batches(name: str, guided: bool, net: Net, path: Path) -> None:
    plan = PLANS[name]
    how: dict[str, Any] = {"unconditional": {"y": 10}, "guidance_scale": 2.5} if guided else {}
    export_onnx(net, plan, path, shape=SHAPE, example={"y": Y}, **how)
    for batch in (1, 2, 5):
        noise, y = noise_of(batch), torch.arange(batch)
        inputs = {"noise": noise, "y": y}
        if plan.noises:
            shape = (plan.noises, *noise.shape)
            inputs["step_noise"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        expected = olss_fast.sample(plan, net, noise, conditioning={"y": y}, generator=generator, **how)
        assert_close(run(path, **inputs), expected)


def split(plan: Plan, weight: float) -> Plan:
    """The plan with u and c apart, each output f = (1 - weight) u + weight c."""
    rows = plan.rows[:, 1:, None] * np.array([1 - weight, weight])
    return plan.replace(rows=np.concatenate([plan.rows[:, :1], rows.reshape(len(rows), -1)], axis=1), branches=2)


def test_separate_branches(net: Net, path: Path) -> None:
    plan, noise = split(PLAN, 2.5), noise_of(3)
    export_onnx(net, plan, path, shape=SHAPE, example={"y": Y}, unconditional={"y": 10})
    expected = olss_fast.sample(
        PLAN, net, noise, conditioning={"y": torch.tensor([1, 2, 3])}, unconditional={"y": 10}, guidance_scale=2.5
    )
    assert_close(run(path, noise=noise, y=np.array([1, 2, 3])), expected)
    assert "guidance_scale" not in {each.name for each in onnx.load(path).graph.input}


def test_many_arguments_nested_listed_shared_and_fixed(net: Net, path: Path) -> None:
    noise = noise_of(2)
    export_onnx(net, PLAN, path, shape=SHAPE, example=EVERYTHING, unconditional=NOTHING, guidance_scale=3.0)
    inputs = {
        "noise": noise,
        "y": Y,
        "added.text": EVERYTHING["added"]["text"],
        "added.size": EVERYTHING["added"]["size"],
        "table": EVERYTHING["table"],
        "residuals.0": EVERYTHING["residuals"][0],
        "residuals.1": EVERYTHING["residuals"][1],
    }
    assert {each.name for each in session_of(path).get_inputs()} == set(inputs)
    expected = olss_fast.sample(  # `sample` slices no lists: two calls, each handed the whole
        PLAN, net, noise, conditioning=EVERYTHING, unconditional=NOTHING, guidance_scale=3.0, doubled=False
    )
    assert_close(run(path, **inputs), expected)


def test_guidance_and_unconditional_arguments_stay_changeable(net: Net, path: Path) -> None:
    export_onnx(net, PLAN, path, shape=SHAPE, example={"y": Y}, unconditional={"y": 10}, guidance_scale=1.5)
    noise = noise_of(2)
    expected = olss_fast.sample(
        PLAN, net, noise, conditioning={"y": Y}, unconditional={"y": torch.tensor([4])}, guidance_scale=4.0
    )
    given = {"guidance_scale": np.array(4.0, np.float32), "unconditional.y": np.array([4])}
    assert_close(run(path, noise=noise, y=Y, **given), expected)
    assert {each.name for each in session_of(path).get_overridable_initializers()} == set(given)


def test_the_guidance_scale_is_that_of_the_plan_unless_it_is_given(net: Net, path: Path) -> None:
    tuned = PLAN.replace(metadata={**PLAN.metadata, "guidance_scale": "3.0"})
    export_onnx(net, tuned, path, shape=SHAPE, example={"y": Y}, unconditional={"y": 10})
    assert table_of(onnx.load(path), "guidance_scale") == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sums_are_wider_than_the_network(dtype: torch.dtype, path: Path) -> None:
    net = Wide(dtype).eval()
    export_onnx(net, PLAN, path, shape=(2, 5))
    wide, tolerance = (np.float64, 1e-12) if dtype == torch.float64 else (np.float32, HALF_TOLERANCE)
    assert table_of(onnx.load(path), "plan.rows").dtype == wide
    noise = noise_of(2, (5,)).to(dtype)
    expected = olss_fast.sample(PLAN, net, noise)
    found = run(path, noise=noise)
    assert str(found.dtype) == str(dtype).removeprefix("torch.")
    assert_close(found, expected, tolerance)


def test_half_precision_guidance(path: Path) -> None:
    net, noise = Net(torch.float16).eval(), noise_of(3).half()
    how: dict[str, Any] = {"unconditional": {"y": 10}, "guidance_scale": 2.0}
    export_onnx(net, PLAN, path, shape=SHAPE, example={"y": Y}, **how)
    labels = torch.tensor([1, 2, 3])
    expected = olss_fast.sample(PLAN, net, noise, conditioning={"y": labels}, **how)
    assert_close(run(path, noise=noise, y=labels), expected, HALF_TOLERANCE)


def test_bfloat16_arguments_and_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, and read by onnx; the reference runtime has few operators for it."""
    monkeypatch.setattr(_onnx_file, "LARGEST_INLINE", 0)
    net, given = Wide(torch.bfloat16).eval(), torch.ones(2, 5, dtype=torch.bfloat16)
    export_onnx(net, PLAN, path, shape=(2, 5), example={"shift": given}, unconditional={"shift": 0.5}, guidance_scale=2)
    model = onnx.load(path)
    row = table_of(model, "unconditional.shift")
    assert row.astype(np.float32).tolist() == [[0.5] * 5]
    weight = table_of(model, "first.weight")
    assert str(weight.dtype) == str(row.dtype) == "bfloat16"
    assert np.array_equal(weight.astype(np.float32), net.first.weight.detach().float().numpy())
    assert table_of(model, "guidance_scale").dtype == np.float32


class Wide(torch.nn.Module):
    """Weights of more than `SMALL` bytes, of sizes that are no multiples of each other."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 301, dtype=dtype), torch.nn.Linear(301, 5, dtype=dtype)

    def forward(self, x: Tensor, timestep: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.second(torch.tanh(self.first(x + shift))) + (timestep / 1000).to(x.dtype)[:, None]


class Stateless(torch.nn.Module):
    """The least that a network may be: no weights, its input handed back, its time unused."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x


def test_a_network_that_hands_back_its_input(path: Path) -> None:
    export_onnx(Stateless().eval(), PLAN, path, shape=(1, 5))
    noise = noise_of(3, (5,))
    assert_close(run(path, noise=noise), olss_fast.sample(PLAN, Stateless(), noise))


# --- the form of the model -------------------------------------------------------------------------------------------


def table_of(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    (found,) = (each for each in model.graph.initializer if each.name == name)
    return onnx.numpy_helper.to_array(found)


def test_the_loop_is_not_unrolled_and_the_plan_is_data(net: Net, path: Path) -> None:
    counts = []
    for steps in (2, 9):
        plan = solvers.dpm_solver_pp(SCHEDULE, steps, order=2)
        export_onnx(net, plan, path, shape=SHAPE)
        model = onnx.load(path)
        counts.append((len(model.graph.node), len(nodes_of(model.graph))))
        assert [node.op_type for node in nodes_of(model.graph)].count("Loop") == 1
        assert table_of(model, "plan.nfe") == steps
        assert np.array_equal(table_of(model, "plan.rows")[:, 0], plan.rows.astype(np.float32))
        assert np.array_equal(table_of(model, "plan.timesteps"), plan.timesteps.astype(np.float32))
    assert counts[0] == counts[1]


def test_the_model_says_what_it_is_and_nothing_about_where_it_was_made(net: Net, path: Path) -> None:
    export_onnx(net, PLAN, path, shape=SHAPE, example={"y": Y})
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    facts = {each.key: each.value for each in model.metadata_props}
    assert facts["olss_fast"] == olss_fast.__version__
    assert {facts[f"plan.{key}"] == text for key, text in PLAN.metadata.items()} == {True}
    assert facts["plan.nfe"] == "4"
    inputs = {each.name: [size.dim_param or size.dim_value for size in sizes(each)] for each in model.graph.input}
    assert inputs == {"noise": ["batch", *SHAPE[1:]], "y": ["batch"]}
    assert [each.name for each in model.graph.output] == ["sample"]
    data = path.read_bytes()
    assert not any(text.encode() in data for text in (str(Path(__file__).parent), "stack_trace", "forward"))


def sizes(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def test_two_exports_are_the_same_bytes(net: Net, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for file in files:
        export_onnx(net, PLAN, file, shape=SHAPE, example={"y": Y})
    assert files[0].read_bytes() == files[1].read_bytes()


# --- files -----------------------------------------------------------------------------------------------------------


def test_large_weights_lie_beside_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_onnx_file, "LARGEST_INLINE", 1000)
    net = Wide().eval()
    export_onnx(net, PLAN, path, shape=(2, 5))
    (beside,) = path.parent.glob("model.onnx.*.data")
    assert {each.name for each in path.parent.iterdir()} == {path.name, beside.name}
    weights = sum(each.nbytes for each in net.parameters() if each.nbytes >= _onnx_file.SMALL)
    assert weights <= beside.stat().st_size < weights + 10 * _onnx_file.ALIGNMENT
    onnx.checker.check_model(path, full_check=True)
    noise = noise_of(3, (5,))
    assert_close(run(path, noise=noise), olss_fast.sample(PLAN, net, noise))
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

    to_proto = _onnx_file.ir.to_proto
    monkeypatch.setattr(_onnx_file.ir, "to_proto", unknown)
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
    "other shape": (lambda path: {"shape": (2, 4, 4, 4)}, InputError, r"cannot be called.*\(2, 4, 4, 4\)"),
    "wrong batch": (lambda path: {"example": {"y": torch.arange(3)}}, InputError, "cannot be called"),
    "unknown argument": (lambda path: {"example": {"z": Y}}, InputError, "cannot be called.*'z'"),
    "reserved": (lambda path: {"example": {"step_noise": 1.0 * Y}}, InputError, "step_noise"),
    "no mapping": (lambda path: {"example": [Y]}, InputError, "example"),
    "guidance alone": (lambda path: {"guidance_scale": 2.0}, InputError, "unconditional"),
    "other keys": (lambda path: {"unconditional": {"z": 1}}, InputError, "'z'"),
    "rows differ": (lambda path: {"example": {"y": Y}, "unconditional": {"y": Y}}, InputError, "rows.*differ"),
    "shared differ": (
        lambda path: {"example": {"table": torch.ones(3)}, "unconditional": {"table": torch.zeros(3)}},
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
