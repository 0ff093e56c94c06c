"""How a GPU launch is cut up: a function of the sizes alone, so that equal calls run equal code, with no search."""

from __future__ import annotations

from typing import NamedTuple

VECTOR_BYTES = 16  # the widest load and store of one thread
THREADS = 32  # of one warp
PROGRAMS = 512  # aimed at while blocks are still growing: a few for each multiprocessor of a large GPU


class Grid(NamedTuple):
    """`programs` blocks of `block` elements on `warps` warps each; `chunk` columns are loaded before the first is used.

    Every thread owns one vector of 16 bytes in a column, so one load instruction a column. Few elements: many small
    blocks, and more columns in flight, since there are too few threads to hide the latency otherwise.
    """

    programs: int
    block: int
    warps: int
    chunk: int


def grid(numel: int, itemsize: int) -> Grid:
    """The launch for `numel` elements of `itemsize` bytes. At least one program, for the books of empty data."""
    unit = THREADS * VECTOR_BYTES // itemsize
    warps = 1
    while warps < 8 and numel > 2 * warps * unit * PROGRAMS:
        warps *= 2
    block = warps * unit
    return Grid(max(1, -(-numel // block)), block, warps, 16 if warps == 1 else 8)
