"""The ONNX graph of a plan: the graph of one network call becomes the body of a Loop over the plan's tables.

Symbols as in `olss_fast.plan`: S evaluations, b branches, C columns, N elements of the noises of one batch. With the
network output f of evaluation i (doubled batch: the unconditional half u first, then the conditional half c):

    history (C, N)   = [x_T | 0 … 0 | z_1 … z_Z]
    for i < S:  x    = rows[i] · history
                f    = network(x, timesteps[i], conditioning)
                history[columns[i]] = f, or u + g (c - u), or u and c
    sample           = rows[S] · history

Sums are formed in float32 (float64 for float64 networks) and rounded once, as in `olss_fast.kernels.step`. History
holds values rounded to the network's dtype, in the dtype of the sums. If both dtypes are equal, history[0] = x too, and
rows are increments (`olss_fast.executors.increments`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from olss_fast import __version__
from olss_fast.compiling.request import Request
from olss_fast.compiling.shapes import BATCH
from olss_fast.executors.increments import increments
from olss_fast.plan.plan import Plan

IR_VERSION = 10  # the oldest version with everything used here, for older runtimes


def loop_model(network: ir.Model, plan: Plan, request: Request) -> ir.Model:
    """The whole sampler as one model, built from the parts of `network`, which is consumed.

    network: one call; its inputs are x, the timesteps, then the request's tensors.
    """
    graph, shape = network.graph, request.profile.opt[1:]
    writer = _Writer(plan, _dtype_of(graph.inputs[0]), shape, doubled=request.doubled)
    weights = _take_weights(graph)
    history = writer.history()
    for (name, sizes), inner in zip(request.shapes.items(), graph.inputs[2:], strict=True):
        row = request.unconditional.get(name) if sizes[:1] == [BATCH] else None
        inner.replace_all_uses_with(writer.argument(name, _dtype_of(inner), sizes, row))
    guidance = None
    if request.doubled and plan.branches == 1:
        guidance = writer.optional("guidance_scale", ir.tensor(request.guidance_scale, dtype=writer.sums))
    history = writer.op("Loop", writer.nfe, None, history, body=writer.body(graph, guidance))
    sample = writer.combination(writer.nfe, history)
    sample.name, sample.dtype, sample.shape = "sample", writer.dtype, ir.Shape([BATCH, *shape])
    return ir.Model(
        ir.Graph(
            writer.inputs,
            [sample],
            nodes=writer.nodes,
            initializers=[*weights, *writer.initializers],
            opset_imports=dict(graph.opset_imports),
            name="sampler",
        ),
        ir_version=IR_VERSION,
        producer_name="olss_fast",
        producer_version=__version__,
        functions=list(network.functions.values()),
        metadata_props=_facts(plan),
    )


def _facts(plan: Plan) -> dict[str, str]:
    numbers = {"nfe": plan.nfe, "branches": plan.branches, "noises": plan.noises}
    told = {**plan.metadata, **numbers}
    return {"olss_fast": __version__, **{f"plan.{name}": str(value) for name, value in told.items()}}


class _Writer:
    """Writes everything around the network: nodes, inputs and initialisers of the model."""

    def __init__(self, plan: Plan, dtype: ir.DataType, shape: Sequence[int], *, doubled: bool) -> None:
        self.plan, self.dtype, self.shape, self.doubled = plan, dtype, tuple(shape), doubled
        self.sums = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.nfe = self.table("plan.nfe", plan.nfe, np.int64)
        found = increments(plan.rows, plan.noise_slice.start)
        self.anchored = found.anchored and dtype == self.sums
        rows = found.rows if self.anchored else plan.rows
        self.rows = self.table("plan.rows", rows[:, None], self.sums.numpy())  # (S+1, 1, C): a row is a matrix
        self.column = self.table("shape.column", [1, -1], np.int64)
        self.batch = self.table("shape.batch", [-1, *shape], np.int64)

    def history(self) -> ir.Value:
        """x_T, room for the outputs, and the fresh noises: (C, N)."""
        noise = self.input("noise", self.dtype, [BATCH, *self.shape])
        first = self.widened(self.op("Reshape", noise, self.column))
        room = self.table("room", np.zeros((self.plan.noise_slice.start - 1, 1)), self.sums.numpy())
        parts = [first, self.op("Expand", room, self.op("Shape", first))]
        if self.plan.noises:
            fresh = self.input("step_noise", ir.DataType.FLOAT, [self.plan.noises, BATCH, *self.shape])
            columns = self.op("Reshape", fresh, self.table("shape.columns", [self.plan.noises, -1], np.int64))
            parts.append(self.widened(self.op("Cast", columns, to=self.dtype)))
        return self.op("Concat", *parts, axis=0)

    def argument(self, name: str, dtype: ir.DataType, shape: Sequence[int | str], row: Tensor | None) -> ir.Value:
        """The network's value for an argument: the model's input, or both halves of the doubled batch, of which
        the unconditional one has `row` (1, …) for every sample."""
        given = self.input(name, dtype, shape)
        if row is None:
            return given
        without = self.optional(f"unconditional.{name}", ir.tensor(row))
        return self.op("Concat", self.op("Expand", without, self.op("Shape", given)), given, axis=0)

    def body(self, network: ir.Graph, guidance: ir.Value | None) -> ir.Graph:
        """One evaluation as the Loop's body: its index, condition, history -> condition, history."""
        number = ir.val("number", ir.DataType.INT64, [])
        go_on = ir.val("go_on", ir.DataType.BOOL, [])
        history = ir.val("history", self.sums, [self.plan.columns, None])
        outside, self.nodes = self.nodes, []
        x = self.combination(number, history)
        flat = self.op("Reshape", x, self.column) if self.anchored else None
        if self.doubled:
            x = self.op("Concat", x, x, axis=0)
        timestep = self.op("Gather", self.table("plan.timesteps", self.plan.timesteps, np.float32), number)
        time = self.op("Expand", timestep, self.op("Shape", x, start=0, end=1))
        before, self.nodes = self.nodes, []
        for inner, handed in zip(network.inputs[:2], (x, time), strict=True):
            inner.replace_all_uses_with(handed, replace_graph_outputs=True)
        outputs = self.outputs(network.outputs[0], guidance)
        if flat is not None:
            outputs = self.op("Concat", flat, outputs, axis=0)
        written = self.op("ScatterND", history, self.op("Gather", self.columns(), number), outputs)
        still = self.op("Identity", go_on)
        written.dtype, still.dtype = self.sums, ir.DataType.BOOL
        nodes, self.nodes = [*before, *_take_nodes(network), *self.nodes], outside
        return _body([number, go_on, history], [still, written], nodes)

    def combination(self, row: ir.Value, history: ir.Value) -> ir.Value:
        """rows[row] · history as a batch (B, …) of the network's dtype."""
        total = self.op("MatMul", self.op("Gather", self.rows, row), history)
        return self.op("Cast", self.op("Reshape", total, self.batch), to=self.dtype)

    def outputs(self, output: ir.Value, guidance: ir.Value | None) -> ir.Value:
        """The network's output as stored in history: (b, N)."""
        halves = self.table("shape.halves", [2 if self.doubled else 1, -1], np.int64)
        columns = self.widened(self.op("Cast", self.op("Reshape", output, halves), to=self.dtype))
        if guidance is None:
            return columns
        without, given = (self.op("Gather", columns, self.table(f"half.{i}", [i], np.int64)) for i in range(2))
        guided = self.op("Add", without, self.op("Mul", guidance, self.op("Sub", given, without)))
        return self.widened(self.op("Cast", guided, to=self.dtype))

    def columns(self) -> ir.Value:
        """The columns written after evaluation i: (S, b, 1), or (S, 1 + b, 1) with that of x."""
        evaluations = np.arange(self.plan.nfe)[:, None, None] * self.plan.branches
        outputs = 1 + evaluations + np.arange(self.plan.branches)[:, None]
        columns = np.concatenate([np.zeros_like(outputs[:, :1]), outputs], axis=1) if self.anchored else outputs
        return self.table("plan.columns", columns, np.int64)

    def widened(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=self.sums)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self.inputs.append(value)
        return value

    def optional(self, name: str, default: ir.TensorProtocol) -> ir.Value:
        """An optional input."""
        value = self.initializer(name, default)
        self.inputs.append(value)
        return value

    def table(self, name: str, values: Any, dtype: Any) -> ir.Value:
        return self.initializer(name, ir.tensor(np.asarray(values).astype(dtype)))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        tensor.name = name
        value = ir.val(name, const_value=tensor)
        self.initializers.append(value)
        return value


def _dtype_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, value.name
    return value.dtype


def _take_weights(graph: ir.Graph) -> list[ir.Value]:
    """The initialisers, no longer `graph`'s, under the names of the network's state_dict."""
    weights = list(graph.initializers.values())
    graph.initializers.clear()
    for weight in weights:
        weight.name = (weight.name or "").removeprefix("network.")
    return weights


def _take_nodes(graph: ir.Graph) -> list[ir.Node]:
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes


def _body(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> ir.Graph:
    body = ir.Graph(inputs, outputs, nodes=nodes, name="evaluation")
    for node in ir.traversal.RecursiveGraphIterator(body):
        for value in node.outputs:  # a body may not reuse names of the surrounding model
            value.name = f"{body.name}/{value.name}"
    return body
