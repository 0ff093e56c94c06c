"""What `capture` refuses before it runs anything: arguments, schedulers that cannot be plans, and nonlinear options.

A plan of S evaluations has S + 1 rows of at least S + 1 numbers, so S is bounded. Custom timesteps or sigmas must lie
where the scheduler's noise levels are defined, because most schedulers accept others silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.capturing.facts import GRIDS, config_of
from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Floats
from olss_fast.schedule.from_diffusers import is_flow
from olss_fast.support.arguments import check_count, check_steps
from olss_fast.support.text import quoted

_TOKENS = "it samples discrete tokens, which no linear combination makes"
_BROWNIAN = (
    "its noise comes from a Brownian tree (torchsde) with a seed of its own, not from draws that a plan could repeat; "
    "DPMSolverMultistepScheduler with algorithm_type sde-dpmsolver++ draws fresh noise"
)
REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CosineDPMSolverMultistepScheduler": _BROWNIAN,
    "DPMSolverSDEScheduler": _BROWNIAN,
    "HeliosDMDScheduler": "its step needs the noise and the schedule of the stage from the pipeline",
    "PiflowScheduler": "the network output is a policy that it integrates, of another shape than the sample",
    "RePaintScheduler": "its step needs the image and the mask",
    "RFD4ProteinaScheduler": "its step needs a mask of atoms",
}
"""Classes that no option turns into a plan. Others are refused by what they do when run."""

_IGNORE_CLIP_SAMPLE = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}  # in the config, but nothing is clipped
_CLIPPING = ("clip_sample", "clip_denoised", "thresholding")


def check_protocol(scheduler: Any) -> None:
    """ScheduleError unless there is a usable set_timesteps, timesteps and step(model_output, timestep, sample)."""
    name = type(scheduler).__name__
    if isinstance(scheduler, type) or not hasattr(scheduler, "set_timesteps"):
        raise ScheduleError(f"{scheduler!r} is no diffusers scheduler; expected an object with set_timesteps and step")
    if name in REFUSED:
        raise ScheduleError(f"{name} cannot be captured: {REFUSED[name]}")
    if not callable(getattr(scheduler, "step", None)):
        raise ScheduleError(f"{name} cannot be captured: it has no step(model_output, timestep, sample)")
    names = list(inspect.signature(scheduler.step).parameters)
    if name != "CogVideoXDPMScheduler" and names[:3] != ["model_output", "timestep", "sample"]:
        raise ScheduleError(
            f"{name} cannot be captured: its step takes {', '.join(names)}; expected model_output, timestep, sample"
        )


def refuse_known(scheduler: Any, step_arguments: Mapping[str, Any]) -> None:
    """ScheduleError for options known to be nonlinear, and for steps with missing arguments."""
    name, config = type(scheduler).__name__, config_of(scheduler)
    clipping = clipping_options(scheduler)
    if clipping:
        switched = ", ".join(f"{option}=False" for option in clipping)
        raise ScheduleError(
            f"{name} clips its samples ({', '.join(clipping)}), which is not linear; switch it off: "
            f"{name}.from_config(scheduler.config, {switched})"
        )
    if str(config.get("variance_type")) in ("learned", "learned_range"):
        raise ScheduleError(
            f"{name} has variance_type {config['variance_type']!r}: the network's output decides the noise, which is "
            "not linear; take fixed_small or fixed_large"
        )
    if int(config.get("stages") or 1) > 1:
        raise ScheduleError(
            f"{name} samples in {config['stages']} stages of growing resolution; only stages=1 is a plan"
        )
    parameters = list(inspect.signature(scheduler.step).parameters.values())[3:]
    missing = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in missing if name not in step_arguments]
    if missing and name != "CogVideoXDPMScheduler":
        raise ScheduleError(f"{name} cannot be captured: its step needs {', '.join(missing)}; pass step_arguments=")


def clipping_options(scheduler: Any) -> list[str]:
    """The scheduler's enabled clipping options."""
    config = config_of(scheduler)
    ignored = {"clip_sample"} if type(scheduler).__name__ in _IGNORE_CLIP_SAMPLE else set()
    return [option for option in _CLIPPING if config.get(option) and option not in ignored]


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


def _check_grid(name: str, value: Any, config: Mapping[str, Any], scheduler: str) -> None:
    grid = row_of_numbers(name, value)
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


def row_of_numbers(name: str, value: Any) -> Floats:
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
