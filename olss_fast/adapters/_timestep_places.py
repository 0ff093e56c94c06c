"""Where a timestep that a pipeline hands to `step` stands in the timesteps of the run, without waiting for a device."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast._text import quoted
from olss_fast.errors import InputError
from olss_fast.plan import Floats

HALF = (torch.float16, torch.bfloat16)


def first_index(timestep: Any, timesteps: Tensor, values: Floats) -> int:
    """The place of a run's first timestep in `timesteps`, whose numbers are `values`; 0 where it cannot be known.

    Of equal timesteps the second is meant, as in diffusers: the first belongs to the step before (Heun). InputError for
    a number, or a tensor on the CPU, that is none of them.
    """
    found = places(timestep, timesteps, values)
    if found is None:
        return 0
    if not found:
        shown = ", ".join(f"{value:g}" for value in values[:4]) + (", …" if len(values) > 4 else "")
        raise InputError(
            f"the first timestep of this run is {quoted(timestep)}, and the plan has {shown}; hand step the entries of "
            "`timesteps`, or say with set_begin_index where the run begins"
        )
    return found[min(1, len(found) - 1)]


def places(timestep: Any, timesteps: Tensor, values: Floats) -> list[int] | None:
    """All places of a timestep; None where looking would wait for a device or stop a compiler.

    A view of `timesteps` says its place by its offset. Numbers and CPU tensors are compared in float32, or in the
    dtype of the tensor where that rounds more. InputError for what is no number.
    """
    if torch.compiler.is_compiling():
        return None
    grid = values.astype(np.float32)
    if isinstance(timestep, Tensor) and timestep.numel():
        if timestep._base is timesteps:
            return [int(timestep.storage_offset())]
        if timestep.device.type != "cpu":
            return None
        if timestep.dtype in HALF:
            grid = torch.from_numpy(grid).to(timestep.dtype).float().numpy()
        timestep = timestep.flatten()[0].item()
    try:
        number = np.float32(timestep)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or np.ndim(number):
        raise InputError(f"the timestep of a step is {quoted(timestep)}; expected a number or a tensor of one")
    return [int(i) for i in np.flatnonzero(number == (np.trunc(grid) if isinstance(timestep, Integral) else grid))]
