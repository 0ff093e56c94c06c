"""The arguments of `capture`, checked before anything is run.

A plan of S evaluations has S + 1 rows of at least S + 1 numbers, so S is bounded. Custom timesteps or sigmas must lie
where the scheduler's noise levels are defined, because most schedulers accept others silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.plan.plan import Floats
from olss_fast.schedule.from_diffusers import FLOW_CLASSES
from olss_fast.support.arguments import check_count, check_steps
from olss_fast.support.text import quoted

GRIDS = ("timesteps", "sigmas")  # arguments of set_timesteps that say how many steps there are


def checked_arguments(
    scheduler: Any, steps: int | None, arguments: Mapping[str, Any], step_arguments: object
) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
    """(steps, arguments of set_timesteps, arguments of step). InputError if they are unusable."""
    if step_arguments is not None and not isinstance(step_arguments, Mapping):
        raise InputError(
            f'step_arguments is {quoted(step_arguments)}; expected a mapping of names to values, such as {{"eta": 0.5}}'
        )
    if steps is not None:
        steps = check_steps(steps)
    elif all(arguments.get(name) is None for name in GRIDS):
        raise InputError("steps is None; pass a whole number of at least 1, or timesteps= or sigmas=")
    for name, value in arguments.items():
        if name in GRIDS and value is not None:
            _check_grid(name, value, config_of(scheduler), type(scheduler).__name__)
        elif isinstance(value, (float, np.floating)) and not np.isfinite(value):
            raise InputError(f"{name} is {value}; expected a finite number")
    _check_device(arguments.get("device"))
    return steps, dict(arguments), dict(step_arguments or {})


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """The scheduler's config, empty if it has none."""
    config = getattr(scheduler, "config", {})
    return config if isinstance(config, Mapping) else {}


def is_flow(name: str, config: Mapping[str, Any]) -> bool:
    """True if a scheduler of this class and config samples x = (1 - sigma) x0 + sigma eps."""
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow or name.startswith(FLOW_CLASSES))


def _check_grid(name: str, value: Any, config: Mapping[str, Any], scheduler: str) -> None:
    grid = _numbers(name, value)
    check_count(grid.size, f"{name} has length")
    high = np.inf
    if name == "timesteps":
        high = float(config.get("num_train_timesteps") or np.inf)
    elif is_flow(scheduler, config):
        high = max(1.0, float(config.get("sigma_max") or 1.0))
    bad = np.flatnonzero(~(np.isfinite(grid) & (grid >= 0.0) & (grid <= high)))
    if bad.size:
        above = f"from 0 to {high:g}" if np.isfinite(high) else "of at least 0"
        raise InputError(f"{name}[{bad[0]}] is {grid[bad[0]]:g}; {scheduler} takes finite numbers {above}")


def _numbers(name: str, value: Any) -> Floats:
    """(N,), N >= 1, from a list, tuple, array or tensor of real numbers. InputError otherwise."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InputError(f"{name} is {quoted(value)}; expected a list of numbers: {cause}") from cause
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iuf":
        raise InputError(f"{name} is {quoted(value)}; expected a list of at least one number, noise falling")
    return array.astype(np.float64)


def _check_device(device: Any) -> None:
    try:
        usable = device is None or torch.device(device).type == "cpu"
    except (TypeError, RuntimeError):
        usable = False
    if not usable:
        raise InputError(f"device is {quoted(device)}; coefficients are computed on the CPU: leave device out")
