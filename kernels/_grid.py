"""The grid of a GPU launch: a function of the sizes only, so equal calls run equal code, without autotuning."""

from __future__ import annotations

from typing import NamedTuple

VECTOR_BYTES = 16  # the widest load or store of one thread
THREADS = 32  # of one warp
PROGRAMS = 512  # aimed at while blocks are still growing: a few for each multiprocessor of a large GPU


class Grid(NamedTuple):
    """`programs` blocks of `block` elements on `warps` warps each; `chunk` columns are loaded before the first is used.

    Every thread owns one vector of 16 bytes per column: one load instruction per column. With few elements there are
    many small blocks and more columns in flight, since too few threads could not hide the latency.
    """

    programs: int
    block: int
    warps: int
    chunk: int


def grid(numel: int, itemsize: int) -> Grid:
    """The launch for `numel` elements of `itemsize` bytes. At least one program, to count the step of empty data."""
    unit = THREADS * VECTOR_BYTES // itemsize
    warps = 1
    while warps < 8 and numel > 2 * warps * unit * PROGRAMS:
        warps *= 2
    block = warps * unit
    return Grid(max(1, -(-numel // block)), block, warps, 16 if warps == 1 else 8)
