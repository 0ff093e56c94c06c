"""Schedulers that cannot be plans, and the options that keep others from being one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from olss_fast.capturing.arguments import config_of
from olss_fast.errors import ScheduleError

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


def linear_advice(scheduler: Any) -> str:
    """The likely reason why a scheduler is not linear, and what to switch off."""
    config = config_of(scheduler)
    on = [option for option in _CLIPPING if config.get(option)]
    if on:
        return f"Switch off {', '.join(on)}"
    return "It adds a constant, looks at the values or mixes pixels; no option of its config is known to be the cause"
