"""Whether a PlanScheduler can stand in a pipeline's scheduler slot: what can be seen before a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from olss_fast.errors import InputError

OFFERED = ["model_output", "timestep", "sample"]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_slot(pipe: Any) -> Any:
    """The pipeline's scheduler. InputError where a PlanScheduler cannot stand in its place."""
    slot = getattr(pipe, "scheduler", None)
    name = type(pipe).__name__
    if slot is None:
        raise InputError(f"{name} has no scheduler to replace; expected a diffusers pipeline with a `scheduler`")
    step = getattr(slot, "step", None)
    if not callable(step) or not callable(getattr(slot, "set_timesteps", None)):
        raise InputError(
            f"the {type(slot).__name__} of this {name} has no step or no set_timesteps; its pipeline speaks another "
            "protocol, which a PlanScheduler does not know"
        )
    parameters = inspect.signature(step).parameters.values()
    names = [parameter.name for parameter in parameters]
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in VARIADIC]
    if names[:3] != OFFERED or not {*needed} <= {*OFFERED}:
        raise InputError(
            f"{type(slot).__name__}.step of this {name} takes {', '.join(names)}; a PlanScheduler stands in for "
            "schedulers that need model_output, timestep and sample alone"
        )
    _check_combined(pipe)
    return slot


def _check_combined(pipe: Any) -> None:
    """InputError for a pipeline of pipelines: their slots are used, its own is not."""
    inner = list(_pipelines_within(pipe))
    if inner:
        slots = " and ".join(f"pipe.{name}.scheduler" for name in inner)
        raise InputError(
            f"{type(pipe).__name__} runs other pipelines, each with a scheduler slot of its own ({slots}), and does "
            f"not use pipe.scheduler. Give them the plans: pipe.{inner[-1]}.scheduler = "
            f"PlanScheduler.from_pipe(pipe.{inner[-1]}, plan)"
        )


def _pipelines_within(pipe: Any) -> Iterator[str]:
    """Names of the attributes that are pipelines with a scheduler."""
    from diffusers import DiffusionPipeline

    for name, part in vars(pipe).items():
        if isinstance(part, DiffusionPipeline) and getattr(part, "scheduler", None) is not None:
            yield name
