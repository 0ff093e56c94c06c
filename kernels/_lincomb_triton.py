"""GPU code of `lincomb`, and of the weighted sum of columns that `step` shares.

Pointers are to the first element of a column; `stride` is the distance between columns in elements, 64 bits wide where
it is multiplied. Only known columns are read: a slot that was never written may hold anything, NaN included.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from olss_fast.kernels._grid import grid


@triton.jit
def add_columns(total, columns, weights, first, last, stride, lane, count, CHUNK: tl.constexpr):
    """total + sum over first <= j < last of weights[j] columns[j], CHUNK columns in flight at a time.

    `columns` points at this program's first element of column 0, of which it owns those with lane < count.
    """
    wide = tl.cast(stride, tl.int64)
    for start in range(first, last, CHUNK):
        for i in tl.static_range(CHUNK):
            known = tl.cast(start + i, tl.int32) < last
            weight = tl.load(weights + start + i, mask=known, other=0.0)
            # A column that is not known has no elements to read; Triton's interpreter cannot `and` masks of two ranks.
            column = tl.load(columns + (start + i) * wide + lane, mask=lane < tl.where(known, count, 0), other=0.0)
            total += weight * column.to(total.dtype)
    return total


@triton.jit
def owned(size, BLOCK: tl.constexpr):
    """Where this program's elements begin, 64 bits wide, and how many of its BLOCK there are."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    return begin, tl.minimum(size - begin, BLOCK).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def _lincomb_stacked(out, tensors, weights, size, stride, count, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    begin, here = owned(size, BLOCK)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], weights.dtype.element_ty)
    total = add_columns(total, tensors + begin, weights, 0, count, stride, lane, here, CHUNK)
    tl.store(out + begin + lane, total.to(out.dtype.element_ty), mask=lane < here)


@triton.jit(do_not_specialize=["count"])
def _lincomb_separate(out, tensors, weights, size, count, BLOCK: tl.constexpr):
    begin, here = owned(size, BLOCK)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], weights.dtype.element_ty)
    for i in tl.static_range(len(tensors)):
        known = i < count
        weight = tl.load(weights + i, mask=known, other=0.0)
        column = tl.load(tensors[i] + begin + lane, mask=lane < tl.where(known, here, 0), other=0.0)
        total += weight * column.to(total.dtype)
    tl.store(out + begin + lane, total.to(out.dtype.element_ty), mask=lane < here)


MOST_POINTERS = 128


def launch_stacked(out: Tensor, tensors: Tensor, weights: Tensor) -> None:
    """out (N,) = weights (k,) . tensors (k, N), all checked by the caller."""
    cut = grid(out.numel(), tensors.element_size())
    sizes = out.numel(), tensors.stride(0), len(weights)
    _lincomb_stacked[(cut.programs,)](out, tensors, weights, *sizes, cut.block, cut.chunk, num_warps=cut.warps)


def launch_separate(out: Tensor, tensors: list[Tensor], weights: Tensor) -> None:
    """out (N,) = sum_j weights[j] tensors[j] of flat tensors (N,); beyond 128 of them, a sum of unrounded sums."""
    if len(tensors) > MOST_POINTERS:
        groups = range(0, len(tensors), MOST_POINTERS)
        sums = weights.new_empty((len(groups), out.numel()))
        for total, begin in zip(sums, groups, strict=True):
            launch_separate(total, tensors[begin : begin + MOST_POINTERS], weights[begin : begin + MOST_POINTERS])
        return launch_stacked(out, sums, torch.ones_like(weights[: len(groups)]))
    cut = grid(out.numel(), tensors[0].element_size())
    # A kernel is compiled for each number of pointers: few numbers, filled up with pointers that are never read.
    slots = max(4, triton.next_power_of_2(len(tensors)))
    pointers = (*tensors, *tensors[:1] * (slots - len(tensors)))
    _lincomb_separate[(cut.programs,)](
        out, pointers, weights, out.numel(), len(tensors), cut.block, num_warps=cut.warps
    )
