"""An engine's tensors in memory and in its file, and the layout that compiled code relies on.

Code reads its inputs and weights as raw memory without checks: another shape would be read wrongly, or beyond its end.
So a file beside the code, `weights.json`, describes what the code was compiled for:

    device, dtype, profile, doubled, inputs    as in the manifest, where the device is the machine's
    weights    for each weight that the code reads {"dtype": as safetensors names it, "shape": …, "strides": null in C
               order, else those of dense memory}

A manifest or weights that differ from it are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.engine.manifest import ANY, NATURALS, NATURALS_OR_NULL, STRING, check
from olss_fast.kernels._checks import is_dense
from olss_fast.support import container
from olss_fast.support.container import Blob, refuse
from olss_fast.support.json import strict_object
from olss_fast.support.text import quoted

LAYOUT = "weights.json"
Layout = dict[str, dict[str, Any]]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_blob(tensor: Tensor) -> Blob:
    """The tensor in C order."""
    plain = tensor.detach().cpu().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))
    return Blob(NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def from_blob(name: str, blob: Blob, strides: Sequence[int] | None = None) -> Tensor:
    """A tensor with its own memory, and with `strides` if given. Raises `Refused` for strides that do not fit."""
    plain = torch.empty(blob.shape, dtype=DTYPES[blob.dtype], device="cpu")
    if blob.data.nbytes:
        values = np.frombuffer(blob.data, dtype=np.uint8)
        if blob.dtype == "BOOL" and values.max() > 1:
            refuse(f"tensor {name!r} of dtype BOOL holds the byte {values.max()}; expected 0 and 1")
        plain.view(-1).view(torch.uint8).numpy()[...] = values
    if strides is None:
        return plain
    if len(strides) != len(blob.shape) or not is_dense(blob.shape, strides):
        refuse(f"weight {name!r} of shape {blob.shape} has strides {list(strides)}; expected those of dense memory")
    return torch.empty_strided(blob.shape, tuple(strides), dtype=plain.dtype, device="cpu").copy_(plain)


def layout_of(weights: Mapping[str, Tensor]) -> Layout:
    """The layout of these weights, which code compiled for them relies on."""
    strides = strides_of(weights)
    return {
        name: {"dtype": NAMES[each.dtype], "shape": list(each.shape), "strides": strides.get(name)}
        for name, each in weights.items()
    }


def check_layout(text: bytes, found: Layout) -> dict[str, Any]:
    """Raises `Refused` unless the weights `found` have the layout that the code was compiled for.

    text: the content of `weights.json`. Returns its other members.
    """
    try:
        if len(text) > container.MAX_HEADER_BYTES:
            raise ValueError(f"has {len(text)} bytes; expected at most {container.MAX_HEADER_BYTES}")
        told = strict_object(text)
    except ValueError as cause:
        refuse(f"the file {LAYOUT} beside its code {cause}; build it again")
    expected = told.pop("weights", None)
    check(expected, {ANY: {"dtype": STRING, "shape": NATURALS, "strides": NATURALS_OR_NULL}}, LAYOUT, "weights")
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            refuse(
                f"its weight {quoted(name)} is {_shown(found.get(name))} and its code was compiled for "
                f"{_shown(expected.get(name))}: build it again"
            )
    return told


def check_compiled_for(compiled_for: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises `Refused` unless the manifest's members `found` equal those that the code was compiled for."""
    if more := compiled_for.keys() - found.keys():
        members = ", ".join([*sorted(found), "weights"])
        refuse(f"{LAYOUT} has the unknown member {quoted(min(more))}; expected exactly the members {members}")
    for name in sorted(found):
        here, there = found[name], compiled_for.get(name)
        if json.dumps(here, sort_keys=True) != json.dumps(there, sort_keys=True):  # `==` would take 1 for true
            refuse(
                f"its {name} is {quoted(here, 200)} and its code was compiled for {quoted(there, 200)}: build it again"
            )


def _shown(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "none"
    strides = "" if entry["strides"] is None else f" with strides {quoted(entry['strides'])}"
    return f"{quoted(entry['dtype'])} of shape {quoted(entry['shape'])}{strides}"


def strides_of(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The strides of weights that are not in C order."""
    return {name: list(each.stride()) for name, each in weights.items() if not each.is_contiguous()}


def hash_weights(blobs: Mapping[str, Blob]) -> str:
    """SHA-256 over names, dtypes, shapes and the SHA-256 of the values."""
    names = sorted(blobs)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashlib releases the interpreter lock
        sums = pool.map(lambda name: hashlib.sha256(blobs[name].data).hexdigest(), names)
    described = [f"{name} {blobs[name].dtype} {list(blobs[name].shape)}" for name in names]
    rows = [f"{facts} {values}\n" for facts, values in zip(described, sums, strict=True)]
    return hashlib.sha256("".join(rows).encode()).hexdigest()
