"""GPU code of `step` and `start`: one kernel, with what is known when it is compiled in capitals.

How the programs agree on the step without waiting for each other: `finished` counts programs, not steps. Every program
reads it when it begins and adds one when all its threads have read, so that during step k each of the P programs reads
a number in [k P, k P + P), and k = finished // P for all of them, whatever their order. No program needs to know that
it is the last; the addition asks for no answer and orders nothing but itself, and the end of the kernel publishes it.
"""

import triton
import triton.language as tl
from torch import Tensor

from olss_fast.kernels._grid import grid
from olss_fast.kernels._lincomb_triton import add_columns, owned


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
    inside = lane < here
    wide = tl.cast(stride, tl.int64)
    dtype = history.dtype.element_ty
    sums = rows.dtype.element_ty

    # What does not depend on the step is asked for first.
    if not START:
        first = tl.load(output + begin + lane, mask=inside, other=0.0)
        if DOUBLED:
            second = tl.load(output + size + begin + lane, mask=inside, other=0.0)
    if START:
        row = 0
    else:
        row = tl.load(finished) // tl.num_programs(0) + 1
        if row >= height:  # more steps than rows: no memory of ours to read or write
            return
    current = 1 + (row - 1) * BRANCHES if not START else 1
    weights = rows + row * width
    noise = tl.load(noise_start)
    noises = tl.load(noise_counts + row)

    total = tl.zeros([BLOCK], sums)
    total = add_columns(total, history + begin, weights, 0, current, stride, lane, here, CHUNK)
    total = add_columns(total, history + begin, weights, noise, noise + noises, stride, lane, here, CHUNK)
    if not START:
        slot = history + begin + current * wide + lane
        if DOUBLED and BRANCHES == 1:
            unconditional = first.to(sums)
            guided = unconditional + tl.load(guidance) * (second.to(sums) - unconditional)
            first = guided.to(dtype)
        total += tl.load(weights + current) * first.to(sums)
        tl.store(slot, first, mask=inside)
        if BRANCHES == 2:
            total += tl.load(weights + current + 1) * second.to(sums)
            tl.store(slot + wide, second, mask=inside)
    tl.store(x + begin + lane, total.to(dtype), mask=inside)
    if DOUBLED:
        tl.store(x + size + begin + lane, total.to(dtype), mask=inside)

    if tl.program_id(0) == 0:
        timestep = tl.load(timesteps + row)
        for start in range(0, times, BLOCK):
            tl.store(time + start + lane, timestep + tl.zeros([BLOCK], tl.float32), mask=start + lane < times)
        if START:
            tl.store(finished, 0)
    if not START:
        tl.debug_barrier()  # all threads of this program have read `finished`
        tl.atomic_add(finished, 1, sem="relaxed")


def launch(
    output: Tensor | None,
    history: Tensor,
    rows: Tensor,
    timesteps: Tensor,
    guidance: Tensor,
    finished: Tensor,
    noise_counts: Tensor,
    noise_start: Tensor,
    x: Tensor,
    time: Tensor,
    branches: int,
    doubled: bool,
) -> None:
    """What `step_reference` computes, or `start_reference` where output is None. Checked by the caller."""
    size = history.shape[1]
    cut = grid(size, history.element_size())
    sizes = size, history.stride(0), rows.shape[1], rows.shape[0], time.numel()
    known = output is None, doubled, branches, cut.block, cut.chunk
    tensors = output, history, rows, timesteps, guidance, finished, noise_counts, noise_start, x, time
    _step[(cut.programs,)](*tensors, *sizes, *known, num_warps=cut.warps)
