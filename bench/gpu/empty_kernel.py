"""A kernel that does nothing: what a launch costs by itself."""

import triton


@triton.jit
def _empty():
    pass


def launch() -> None:
    _empty[(1,)](num_warps=1)
