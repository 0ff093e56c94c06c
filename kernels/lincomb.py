"""out = sum_j w_j x_j over k tensors in one pass: each is read once, and only the result is written.

Sums are formed in float32 (float64 for float64) from the given values and rounded once, for any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.kernels._checks import (
    accumulator,
    define,
    describe,
    expect,
    expect_dense,
    expect_like,
    flat,
    refuse_gradients,
)

CPU_BLOCK = 1 << 15  # elements per block: its float32 sum stays in the L1 or L2 cache while the tensors stream through


def lincomb(tensors: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float]) -> Tensor:
    """sum_j weights[j] tensors[j], of the dtype, shape and memory order of one of them.

    Args:
        tensors: (k, ...) stacked, each dense and the k of them at any equal distance; or k separate dense tensors of
            one shape, dtype, device and memory order. float16, bfloat16, float32 or float64; k >= 1.
        weights: (k,) a tensor on the same device, float32 (float64 for float64); or k numbers, which are copied there
            (inside the capture of a CUDA graph give a tensor).

    Raises:
        InputError: anything else, or tensors that require a gradient.
    """
    if not isinstance(tensors, (Tensor, list, tuple)) or (isinstance(tensors, Tensor) and tensors.ndim == 0):
        raise InputError(f"tensors is {describe(tensors)}; expected a tensor (k, ...), or a list of k tensors")
    if len(tensors) == 0:
        raise InputError("lincomb was given no tensors; expected at least one")
    first = tensors[0]
    expect_dense("tensors[0]", first)
    if not isinstance(weights, Tensor):
        weights = _as_tensor(weights, first)
    expect("weights", weights, accumulator(first.dtype), (len(tensors),), first.device)
    if isinstance(tensors, Tensor):
        refuse_gradients("lincomb", (tensors, weights))
        result: Tensor = torch.ops.olss_fast.lincomb_stacked(tensors, weights)
        return result
    for j, tensor in enumerate(tensors):
        expect_like(f"tensors[{j}]", tensor, "tensors[0]", first)
    refuse_gradients("lincomb", (*tensors, weights))
    result = torch.ops.olss_fast.lincomb_separate(tensors, weights)
    return result


def weighted_sum(columns: Tensor, weights: Tensor) -> Tensor:
    """weights (k,) . columns (k, N) in the dtype of `weights`, in plain torch: the reference, and the CPU path.

    One matrix-vector product where the dtypes agree; else block by block, so that no widened copy is ever large.
    """
    if columns.dtype == weights.dtype:
        return torch.mv(columns.t(), weights)
    total = weights.new_empty(columns.shape[1])
    width = max(1, 8 * CPU_BLOCK // max(1, len(weights)))
    for part, out in zip(torch.split(columns, width, dim=1), torch.split(total, width), strict=True):
        torch.mv(part.to(weights.dtype).t(), weights, out=out)
    return total


def weighted_sum_of(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The same for separate flat tensors (N,), without copies: block by block, which keeps the sum in cache."""
    total = torch.zeros_like(tensors[0], dtype=weights.dtype)
    numbers = weights.tolist()
    for begin in range(0, total.numel(), CPU_BLOCK):
        part = total[begin : begin + CPU_BLOCK]
        for tensor, weight in zip(tensors, numbers, strict=True):
            part.add_(tensor[begin : begin + CPU_BLOCK], alpha=weight)
    return total


def _run(tensors: Any, weights: Tensor) -> Tensor:
    """Both operators: of stacked tensors, or of a list of them."""
    out, stacked = torch.empty_like(tensors[0]), isinstance(tensors, Tensor)
    if stacked:
        parts = tensors.as_strided((len(tensors), out.numel()), (tensors.stride(0), 1))
    else:
        parts = [flat(tensor) for tensor in tensors]
    if out.is_cuda:
        from olss_fast.kernels import _lincomb_triton as gpu

        with torch.cuda.device(out.device):
            (gpu.launch_stacked if stacked else gpu.launch_separate)(flat(out), parts, weights)
    else:
        flat(out).copy_((weighted_sum if stacked else weighted_sum_of)(parts, weights))
    return out


def _fake(tensors: Any, weights: Tensor) -> Tensor:
    return torch.empty_like(tensors[0])


define("lincomb_stacked", "(Tensor tensors, Tensor weights) -> Tensor", _run, fake=_fake)
define("lincomb_separate", "(Tensor[] tensors, Tensor weights) -> Tensor", _run, fake=_fake)


def _as_tensor(weights: Sequence[float], first: Tensor) -> Tensor:
    try:
        return torch.tensor(weights, dtype=accumulator(first.dtype), device=first.device)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"weights is {weights!r}; expected a number for each tensor, or a tensor of them") from error
