"""ONNX models of whole samplers, run in ONNX Runtime on the CPU: what `olss_fast.sample` gives, at any batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from made_plans import split
from onnx_runs import (
    HALF_TOLERANCE,
    PLAN,
    SCHEDULE,
    SHAPE,
    TOLERANCE,
    Net,
    Wide,
    Y,
    assert_close,
    noise_of,
    run,
    session_of,
    table_of,
)
from torch import Tensor

import olss_fast
from olss_fast import demo, export_onnx, solvers
from olss_fast.executors.increments import increments
from olss_fast.onnx import file as onnx_file

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


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *itertools.chain.from_iterable(map(nodes_of, inner))]


# --- the embedded model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_from_one_file_at_any_batch(path: Path) -> None:
    """Within 1e-5 of `sample` as a root mean square (measured: 7e-7). Single pixels of either are further from what a
    float64 network gives, up to 1.5e-5 over 64 images, for guidance and solver amplify what float32 rounds: so the
    largest difference is held to the error budget, over all images at once."""
    model, exact = demo.load("cpu"), demo.load("cpu", torch.float64)
    plan = solvers.unipc(model.schedule, 5)
    how: dict[str, Any] = {"unconditional": {"class_labels": model.null_class}, "guidance_scale": model.guidance_scale}
    example = {"class_labels": torch.tensor([0, 1])}
    export_onnx(model.network, plan, path, shape=(2, *model.shape), conditioning=example, **how)
    noise, labels = noise_of(32, model.shape), torch.arange(32) % model.classes
    session = session_of(path)
    parts = [
        session.run(None, {"noise": noise[part].numpy(), "class_labels": labels[part].numpy()})[0]
        for part in (slice(0, 1), slice(1, 3), slice(3, 8), slice(8, 32))
    ]
    found = np.concatenate(parts).astype(np.float64)
    expected, reference = (
        olss_fast.sample(network, plan, each, conditioning={"class_labels": labels}, **how).double().numpy()
        for network, each in ((model.network, noise), (exact.network, noise.double()))
    )
    largest = np.abs(reference).max()
    assert np.sqrt(np.mean((found - expected) ** 2)) <= TOLERANCE * largest
    assert np.abs(found - reference).max() <= 2 * np.abs(expected - reference).max()
    assert np.abs(expected - reference).max() <= 5e-5 * largest  # else the line above says nothing


def test_weights_keep_their_names(net: Net, path: Path) -> None:
    export_onnx(net, PLAN, path, shape=SHAPE, conditioning={"y": Y})
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
    export_onnx(net, plan, path, shape=SHAPE, conditioning={"y": Y}, **how)
    for batch in (1, 2, 5):
        noise, y = noise_of(batch), torch.arange(batch)
        inputs = {"noise": noise, "y": y}
        if plan.noises:
            shape = (plan.noises, *noise.shape)
            inputs["step_noise"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        expected = olss_fast.sample(net, plan, noise, conditioning={"y": y}, generator=generator, **how)
        assert_close(run(path, **inputs), expected)


class Copying(Net):
    """Copies its input from 64 samples on, as diffusers' networks do."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x.contiguous() if x.shape[0] >= 64 else x, *args, **kwargs)


def test_a_network_that_asks_for_the_number_of_samples(path: Path) -> None:
    net = Copying().eval()
    export_onnx(net, PLAN, path, shape=SHAPE)
    for batch in (1, 63, 64):
        assert_close(run(path, noise=noise_of(batch)), olss_fast.sample(PLAN, net, noise_of(batch)))


def test_separate_branches(net: Net, path: Path) -> None:
    plan, noise = split(PLAN, 2.5), noise_of(3)
    export_onnx(net, plan, path, shape=SHAPE, conditioning={"y": Y}, unconditional={"y": 10})
    expected = olss_fast.sample(
        net, PLAN, noise, conditioning={"y": torch.tensor([1, 2, 3])}, unconditional={"y": 10}, guidance_scale=2.5
    )
    assert_close(run(path, noise=noise, y=np.array([1, 2, 3])), expected)
    assert "guidance_scale" not in {each.name for each in onnx.load(path).graph.input}


def test_many_arguments_nested_listed_shared_and_fixed(net: Net, path: Path) -> None:
    noise = noise_of(2)
    export_onnx(net, PLAN, path, shape=SHAPE, conditioning=EVERYTHING, unconditional=NOTHING, guidance_scale=3.0)
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
        net, PLAN, noise, conditioning=EVERYTHING, unconditional=NOTHING, guidance_scale=3.0, doubled=False
    )
    assert_close(run(path, **inputs), expected)


def test_guidance_and_unconditional_arguments_stay_changeable(net: Net, path: Path) -> None:
    export_onnx(net, PLAN, path, shape=SHAPE, conditioning={"y": Y}, unconditional={"y": 10}, guidance_scale=1.5)
    noise = noise_of(2)
    expected = olss_fast.sample(
        net, PLAN, noise, conditioning={"y": Y}, unconditional={"y": torch.tensor([4])}, guidance_scale=4.0
    )
    given = {"guidance_scale": np.array(4.0, np.float32), "unconditional.y": np.array([4])}
    assert_close(run(path, noise=noise, y=Y, **given), expected)
    assert {each.name for each in session_of(path).get_overridable_initializers()} == set(given)


def test_the_guidance_scale_is_that_of_the_plan_unless_it_is_given(net: Net, path: Path) -> None:
    tuned = PLAN.replace(metadata={**PLAN.metadata, "guidance_scale": "3.0"})
    export_onnx(net, tuned, path, shape=SHAPE, conditioning={"y": Y}, unconditional={"y": 10})
    assert table_of(onnx.load(path), "guidance_scale") == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sums_are_wider_than_the_network(dtype: torch.dtype, path: Path) -> None:
    net = Wide(dtype).eval()
    export_onnx(net, PLAN, path, shape=(2, 5))
    wide, tolerance = (np.float64, 1e-12) if dtype == torch.float64 else (np.float32, HALF_TOLERANCE)
    assert table_of(onnx.load(path), "plan.rows").dtype == wide
    noise = noise_of(2, (5,)).to(dtype)
    expected = olss_fast.sample(net, PLAN, noise)
    found = run(path, noise=noise)
    assert str(found.dtype) == str(dtype).removeprefix("torch.")
    assert_close(found, expected, tolerance)


def test_half_precision_guidance(path: Path) -> None:
    net, noise = Net(torch.float16).eval(), noise_of(3).half()
    how: dict[str, Any] = {"unconditional": {"y": 10}, "guidance_scale": 2.0}
    export_onnx(net, PLAN, path, shape=SHAPE, conditioning={"y": Y}, **how)
    labels = torch.tensor([1, 2, 3])
    expected = olss_fast.sample(net, PLAN, noise, conditioning={"y": labels}, **how)
    assert_close(run(path, noise=noise, y=labels), expected, HALF_TOLERANCE)


def test_bfloat16_arguments_and_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, and read by onnx; the reference runtime has few operators for it."""
    monkeypatch.setattr(onnx_file, "LARGEST_INLINE", 0)
    net, given = Wide(torch.bfloat16).eval(), torch.ones(2, 5, dtype=torch.bfloat16)
    how = {"conditioning": {"shift": given}, "unconditional": {"shift": 0.5}, "guidance_scale": 2}
    export_onnx(net, PLAN, path, shape=(2, 5), **how)
    model = onnx.load(path)
    row = table_of(model, "unconditional.shift")
    assert row.astype(np.float32).tolist() == [[0.5] * 5]
    weight = table_of(model, "first.weight")
    assert str(weight.dtype) == str(row.dtype) == "bfloat16"
    assert np.array_equal(weight.astype(np.float32), net.first.weight.detach().float().numpy())
    assert table_of(model, "guidance_scale").dtype == np.float32


class Stateless(torch.nn.Module):
    """The least that a network may be: no weights, its input handed back, its time unused."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x


def test_a_network_that_hands_back_its_input(path: Path) -> None:
    export_onnx(Stateless().eval(), PLAN, path, shape=(1, 5))
    noise = noise_of(3, (5,))
    assert_close(run(path, noise=noise), olss_fast.sample(Stateless(), PLAN, noise))


class Clash(torch.nn.Module):
    """Weights that are called what inputs and values of the model are called."""

    def __init__(self) -> None:
        super().__init__()
        self.noise, self.y = (torch.nn.Parameter(torch.linspace(0.1, 0.5, 5) * sign) for sign in (1, -1))
        self.register_buffer("sample", torch.ones(5))

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return x * self.noise + self.y * y[:, None] + self.sample


def test_weights_named_as_inputs(path: Path) -> None:
    net, y, noise = Clash().eval(), torch.tensor([0.5, 0.25]), noise_of(2, (5,))
    export_onnx(net, PLAN, path, shape=(2, 5), conditioning={"y": y})
    with torch.no_grad():
        assert_close(run(path, noise=noise, y=y), olss_fast.sample(net, PLAN, noise, conditioning={"y": y}))


# --- the form of the model -------------------------------------------------------------------------------------------


def test_the_loop_is_not_unrolled_and_the_plan_is_data(net: Net, path: Path) -> None:
    counts = []
    for steps in (2, 9):
        plan = solvers.dpm_solver_pp(SCHEDULE, steps, order=2)
        export_onnx(net, plan, path, shape=SHAPE)
        model = onnx.load(path)
        counts.append((len(model.graph.node), len(nodes_of(model.graph))))
        assert [node.op_type for node in nodes_of(model.graph)].count("Loop") == 1
        assert table_of(model, "plan.nfe") == steps
        rows = increments(plan.rows, plan.noise_slice.start).rows
        assert np.array_equal(table_of(model, "plan.rows")[:, 0], rows.astype(np.float32))
        assert np.array_equal(table_of(model, "plan.timesteps"), plan.timesteps.astype(np.float32))
    assert counts[0] == counts[1]


def test_the_model_says_what_it_is_and_nothing_about_where_it_was_made(net: Net, path: Path) -> None:
    export_onnx(net, PLAN, path, shape=SHAPE, conditioning={"y": Y})
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
    assert not any(text.encode() in data for text in (str(Path(__file__).parents[1]), "stack_trace", "forward"))


def sizes(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def test_two_exports_are_the_same_bytes(net: Net, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for file in files:
        export_onnx(net, PLAN, file, shape=SHAPE, conditioning={"y": Y})
    assert files[0].read_bytes() == files[1].read_bytes()
