"""An engine's tensors between memory and file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from olss_fast.engine.container import Blob, refuse

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


def from_blob(name: str, blob: Blob, strides: Sequence[int] | None, device: torch.device) -> Tensor:
    """A tensor of its own memory, with `strides` if they are given. Raises `Refused` for strides that do not fit."""
    plain = torch.empty(blob.shape, dtype=DTYPES[blob.dtype], device="cpu")
    if blob.data.nbytes:
        values = np.frombuffer(blob.data, dtype=np.uint8)
        if blob.dtype == "BOOL" and values.max() > 1:
            refuse(f"tensor {name!r} of dtype BOOL holds the byte {values.max()}; expected 0 and 1")
        plain.view(-1).view(torch.uint8).numpy()[...] = values
    if strides is None:
        return plain.to(device)
    if not _dense(blob.shape, strides):
        refuse(f"weight {name!r} of shape {blob.shape} has strides {list(strides)}; expected those of dense memory")
    return torch.empty_strided(blob.shape, tuple(strides), dtype=plain.dtype, device=device).copy_(plain)


def strides_of(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of the weights that do not lie in C order."""
    return {name: list(each.stride()) for name, each in weights.items() if not each.is_contiguous()}


def hash_weights(blobs: Mapping[str, Blob]) -> str:
    """SHA-256 over names, dtypes, shapes and the SHA-256 of the values."""
    names = sorted(blobs)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashlib lets go of the interpreter's lock
        sums = pool.map(lambda name: hashlib.sha256(blobs[name].data).hexdigest(), names)
    described = [f"{name} {blobs[name].dtype} {list(blobs[name].shape)}" for name in names]
    rows = [f"{facts} {values}\n" for facts, values in zip(described, sums, strict=True)]
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one stretch of memory, in some order of the axes."""
    if len(shape) != len(strides):
        return False
    filled = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True
