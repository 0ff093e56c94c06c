"""GPU code of `step` and `start`: one kernel, with compile-time constants in capitals.

How the programs agree on the step without waiting for each other: `finished` counts programs, not steps. Every program
reads it when it begins and adds one when all its threads have read. During step k each of the P programs thus reads a
number in [k P, k P + P), and k = finished // P for all of them, in any order. No program needs to know that it is the
last; the atomic addition is relaxed and returns nothing, and the end of the kernel publishes it.
"""

import triton
import triton.language as tl
from torch import Tensor

from olss_fast.kernels._grid import grid
from olss_fast.kernels._lincomb_triton import add_columns, options, owned
from olss_fast.kernels.step import StepState


@triton.jit(do_not_specialize=["width", "height", "times"])
def _step(
    output,
    history,
    rows,
    timesteps,
    guidance,
    finished,
    noise_counts,
    noise_start,
    anchored,
    x,
    time,
    size,
    stride,
    width,
    height,
    times,
    START: tl.constexpr,
    DOUBLED: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x = the next row over the history of `size` elements; rows are (height, width), `time` has `times` elements."""
    begin, here = owned(size, BLOCK)
    lane = tl.arange(0, BLOCK)
    wide = tl.cast(stride, tl.int64)
    dtype = history.dtype.element_ty
    sums = rows.dtype.element_ty

    # Loads that do not depend on the step come first. No branch precedes their use, behind which they could move.
    if not START:
        first = tl.load(output + begin + lane, mask=lane < here, other=0.0)
        if dtype == sums:
            base = column_0(history + begin + lane, x + begin + lane, tl.load(anchored) != 0, lane, here)
        scale = tl.load(guidance)
        if DOUBLED:
            second = tl.load(output + size + begin + lane, mask=lane < here, other=0.0)
    row, current, beyond = position(finished, height, START, BRANCHES)
    here = tl.where(beyond, 0, here)
    weights = rows + row * width
    noise = tl.load(noise_start)
    noises = tl.load(noise_counts + row)
    timestep = tl.load(timesteps + row)
    if not START:
        base_weight = tl.load(weights)
        first_weight = tl.load(weights + current)
        if BRANCHES == 2:
            second_weight = tl.load(weights + current + 1)

    total = tl.zeros([BLOCK], sums)
    if dtype == sums and not START:
        total += base_weight * base
        total = add_columns(total, history + wide + begin, weights + 1, current - 1, stride, lane, here, CHUNK)
    else:
        total = add_columns(total, history + begin, weights, current, stride, lane, here, CHUNK)
    # Few plans have noises: less code to load for those without.
    total = add_columns(total, history + begin + noise * wide, weights + noise, noises, stride, lane, here, 4)
    if not START:
        slot = history + begin + current * wide + lane
        if DOUBLED and BRANCHES == 1:
            unconditional = first.to(sums)
            first = (unconditional + scale * (second.to(sums) - unconditional)).to(dtype)
        total += first_weight * first.to(sums)
        tl.store(slot, first, mask=lane < here)
        if BRANCHES == 2:
            total += second_weight * second.to(sums)
            tl.store(slot + wide, second, mask=lane < here)
    tl.store(x + begin + lane, total.to(dtype), mask=lane < here)
    if DOUBLED:
        tl.store(x + size + begin + lane, total.to(dtype), mask=lane < here)
    if tl.program_id(0) == 0:
        fill(time, timestep, tl.where(beyond, 0, times))
        if START:
            tl.store(finished, 0)
    if not START:
        tl.debug_barrier()  # all threads of this program have read `finished`
        tl.atomic_add(finished, tl.where(beyond, 0, 1), sem="relaxed")


@triton.jit
def column_0(first, x, anchored, lane, here):
    """The content of column 0: x_T, or the current x. Only that one is read."""
    initial = tl.load(first, mask=lane < tl.where(anchored, 0, here), other=0.0)
    return tl.where(anchored, tl.load(x, mask=lane < tl.where(anchored, here, 0), other=0.0), initial)


@triton.jit
def position(finished, height, START: tl.constexpr, BRANCHES: tl.constexpr):
    """The row to form (at most the last), the history column of the current output, and whether it is past the end."""
    if START:
        return 0, 1, False
    step = tl.load(finished) // tl.num_programs(0)
    beyond = step + 1 >= height
    step = tl.minimum(step, height - 2)
    return step + 1, 1 + step * BRANCHES, beyond


@triton.jit
def fill(values, value, count):
    """values[:count] = value."""
    for start in range(0, count, 32):
        entry = start + tl.arange(0, 32)
        tl.store(values + entry, value + tl.zeros([32], tl.float32), mask=entry < count)


def launch(output: Tensor | None, state: StepState) -> None:
    """`step_reference` on a GPU, or `start_reference` if output is None. Checked by the caller."""
    *tensors, branches, doubled = state
    size, height, width = state.history.shape[1], *state.rows.shape
    cut = grid(size, state.history.element_size())
    sizes = size, state.history.stride(0), width, height, state.time.numel()
    known = output is None, doubled, branches, cut.block, cut.chunk
    _step[(cut.programs,)](output, *tensors, *sizes, *known, **options(cut))
