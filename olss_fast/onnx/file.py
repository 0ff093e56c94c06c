"""ONNX models as files: checked and written atomically, with weights too large for one file in a second one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass

from olss_fast.errors import BuildError, ModelError
from olss_fast.support.files import write_atomically

LARGEST_INLINE = 2**31 - 2**26  # bytes of weights; a protobuf message ends at 2 GiB, and the graph takes some
SMALL = 1024  # bytes: tables stay in the model
ALIGNMENT = 64


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write `model` after tidying its names and notes. Raises BuildError for an invalid model, ModelError."""
    _tidy(model)
    weights = [each for each in model.graph.initializers.values() if _tensor(each).nbytes >= SMALL]
    outside: tuple[Path, list[memoryview]] | None = None
    if sum(_tensor(each).nbytes for each in weights) > LARGEST_INLINE:
        outside = _move_out(weights, Path(path))
    proto = ir.to_proto(model)
    _check(proto)
    if outside is not None:
        write_atomically(*outside, error=ModelError)
    write_atomically(path, proto.SerializeToString(deterministic=True), error=ModelError)


def _tidy(model: ir.Model) -> None:
    """Makes names unique and removes the exporter's notes, which quote the network's source files."""
    NameFixPass()(model)
    ClearMetadataAndDocStringPass()(model)
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            value.metadata_props.clear()
            value.doc_string = None


def _move_out(weights: list[ir.Value], path: Path) -> tuple[Path, list[memoryview]]:
    """Make the weights refer to a file beside the model; returns that file and its content.

    The name is unique to the weights, so a model never lies beside weights that are not its own.
    """
    buffers = [part for each in weights for part in _parts(_tensor(each))]
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    file = path.with_name(f"{path.name}.{digest.hexdigest()[:16]}.data")
    offset = 0
    for each in weights:
        tensor = _tensor(each)
        each.const_value = ir.ExternalTensor(
            file.name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=each.name or ""
        )
        offset += _aligned(tensor.nbytes)
    return file, buffers


def _parts(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    yield np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    yield memoryview(bytes(_aligned(tensor.nbytes) - tensor.nbytes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    assert weight.const_value is not None, weight.name
    return weight.const_value


def _check(proto: onnx.ModelProto) -> None:
    """onnx's checker and shape inference. External weights, whose file does not exist yet, are treated as inputs."""
    outside = [each for each in proto.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        inside = [each for each in proto.graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL]
        stripped = onnx.ModelProto()
        stripped.CopyFrom(proto)
        stripped.graph.ClearField("initializer")
        stripped.graph.initializer.extend(inside)
        stripped.graph.input.extend(onnx.helper.make_tensor_value_info(e.name, e.data_type, e.dims) for e in outside)
        proto = stripped
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as cause:
        raise BuildError(f"the exported network is not valid ONNX: {' '.join(str(cause).split())[:600]}") from cause
