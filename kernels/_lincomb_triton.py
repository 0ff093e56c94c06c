"""GPU code of `lincomb`, and of the weighted sum of columns that `step` shares.

Pointers are to the first element of a column; `stride` is the distance between columns in elements, in 64 bits where it
is multiplied. Only known columns are read: a slot that was never written may hold anything, including NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from olss_fast.kernels._grid import Grid, grid


@triton.jit
def add_columns(total, columns, weights, count, stride, lane, here, CHUNK: tl.constexpr):
    """total + sum over j < count of weights[j] columns[j]. `columns` and `weights` point at those of j = 0.

    This program owns the elements with lane < here of each column. CHUNK columns are in flight at a time.
    """
    wide = tl.cast(stride, tl.int64)
    count = tl.cast(count, tl.int32)
    for start in range(0, count, CHUNK):
        loaded = ()
        for i in tl.static_range(CHUNK):
            loaded += (load_known(columns + (start + i) * wide + lane, start + i < count, lane, here),)
        total = add_loaded(total, loaded, weights + start, count - start)
    return total


@triton.jit
def load_known(column, known, lane, here):
    """One column, or zeros. An unknown column has no elements here: the interpreter cannot `and` both masks."""
    return tl.load(column, mask=lane < tl.where(known, here, 0), other=0.0)


@triton.jit
def add_loaded(total, loaded, weights, count):
    """total + sum over i < count of weights[i] loaded[i], after all loads have been issued.

    By default the compiler loads a column, waits, adds, and loads the next; but it moves no load across a barrier, and
    a barrier waits for no load. So the weights, without which nothing can be added, are loaded between two barriers.
    """
    factors = ()
    tl.debug_barrier()
    for i in tl.static_range(len(loaded)):
        factors += (tl.load(weights + i, mask=i < count, other=0.0),)
    tl.debug_barrier()
    for i in tl.static_range(len(loaded)):
        total += factors[i] * loaded[i].to(total.dtype)
    return total


@triton.jit
def owned(size, BLOCK: tl.constexpr):
    """The start of this program's elements, in 64 bits, and how many of its BLOCK exist."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    return begin, tl.minimum(size - begin, BLOCK).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def _lincomb_stacked(out, tensors, weights, size, stride, count, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    begin, here = owned(size, BLOCK)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], weights.dtype.element_ty)
    total = add_columns(total, tensors + begin, weights, count, stride, lane, here, CHUNK)
    tl.store(out + begin + lane, total.to(out.dtype.element_ty), mask=lane < here)


@triton.jit(do_not_specialize=["count"])
def _lincomb_separate(out, tensors, weights, size, count, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    begin, here = owned(size, BLOCK)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], weights.dtype.element_ty)
    for start in tl.static_range(0, len(tensors), CHUNK):
        loaded = ()
        for i in tl.static_range(CHUNK):
            loaded += (load_known(tensors[start + i] + begin + lane, start + i < count, lane, here),)
        total = add_loaded(total, loaded, weights + start, count - start)
    tl.store(out + begin + lane, total.to(out.dtype.element_ty), mask=lane < here)


MOST_POINTERS = 128


def options(cut: Grid) -> dict[str, int | bool]:
    """Compiler options. Multiply and add are fused into one rounding, whatever Triton's default, which changes."""
    return {"num_warps": cut.warps, "enable_fp_fusion": True}


def launch_stacked(out: Tensor, tensors: Tensor, weights: Tensor) -> None:
    """out (N,) = weights (k,) . tensors (k, N), all checked by the caller."""
    cut = grid(out.numel(), tensors.element_size())
    sizes = out.numel(), tensors.stride(0), len(weights)
    _lincomb_stacked[(cut.programs,)](out, tensors, weights, *sizes, cut.block, cut.chunk, **options(cut))


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
    slots = max(cut.chunk, triton.next_power_of_2(len(tensors)))
    pointers = (*tensors, *tensors[:1] * (slots - len(tensors)))
    sizes = out.numel(), len(tensors)
    _lincomb_separate[(cut.programs,)](out, pointers, weights, *sizes, cut.block, cut.chunk, **options(cut))
