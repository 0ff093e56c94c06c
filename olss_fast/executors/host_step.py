"""A step on the host as one call: the CPU path of the fused executor in float32 and float64.

On the CPU the operators of `olss_fast.kernels` are some twenty small operations. With warm caches they cost 30
microseconds; between two network calls, which evict them, ten times that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.kernels.step import StepState

HostStep = Callable[[Tensor | None], None]
"""`step(output)`: as `kernels.step`, for an output of x's dtype, shape and memory order; `step(None)`: as `start`."""


def host_step(state: StepState) -> HostStep | None:
    """The compiled step over the memory of `state`, or None: not on the CPU, half precision, or not compiled."""
    x = state.x
    try:
        from olss_fast import _C
    except ImportError:
        return None
    kinds = {torch.float32: _C.HostStep32, torch.float64: _C.HostStep64}
    if x.device.type != "cpu" or x.dtype not in kinds or type(x) is not Tensor:
        return None
    begin, size = x.data_ptr(), x.numel() * x.element_size()
    run = kinds[x.dtype](
        [each.data_ptr() for each in state if isinstance(each, Tensor)],
        [state.history.stride(0), state.history.shape[1], *state.rows.shape, state.time.numel()],
        state.programs,
        state.branches,
        state.doubled,
    )

    def step(output: Tensor | None) -> None:
        address = 0
        if output is not None:
            if abs(output.data_ptr() - begin) < size:  # shares memory with x, which would be written while it is read
                output = output.clone()
            address = output.data_ptr()
        if not run(address):
            # Naming the state here also keeps its memory alive: `run` has only the addresses.
            raise InputError(f"a step was asked for beyond the rows of this run, {len(state.rows) - 1}; call start")

    return step
