"""A PlanScheduler's behaviour for pipelines that look behind the scheduler interface.

Most pipelines call set_timesteps, step and the like, which a plan supports. Some check their scheduler's class
(`isinstance`) to choose what to pass: they see the class that the plan replaces, everyone else the real one. Some
compute with their scheduler's state (its betas, its list of outputs), or branch on `hasattr`: reading or testing an
attribute that the scheduler has and a plan lacks is an error. So no pipeline, of any class, takes another branch
because of the plan.

`check_slot` finds what can be detected before a call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from olss_fast.capturing.facts import scheduler_class
from olss_fast.errors import InputError

OFFERED = ["model_output", "timestep", "sample"]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_slot(pipe: Any) -> Any:
    """The pipeline's scheduler. InputError if a PlanScheduler cannot replace it."""
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
    """InputError for a pipeline of pipelines, which uses their slots and not its own."""
    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)}
    inner = [name for name, part in parts.items() if getattr(part, "scheduler", None) is not None]
    if inner:
        slots = " and ".join(f"pipe.{name}.scheduler" for name in inner)
        raise InputError(
            f"{type(pipe).__name__} runs other pipelines, each with a scheduler slot of its own ({slots}), and does "
            f"not use pipe.scheduler. Give them the plans: pipe.{inner[-1]}.scheduler = "
            f"PlanScheduler.from_pipe(pipe.{inner[-1]}, plan)"
        )


class StandIn:
    """Base, before ConfigMixin, of a scheduler that replaces another one, whose config is `_stands_for()`."""

    def _stands_for(self) -> Mapping[str, Any] | None:
        raise NotImplementedError

    def _class(self) -> type:
        """The class that `isinstance` sees besides the type."""
        network = None if asking_pipeline(sys._getframe(1)) is None else self._stands_for()
        return (None if network is None else scheduler_class(network["_class_name"])) or type(self)

    __class__ = property(_class)

    def __getattr__(self, name: str) -> Any:
        """For missing attributes. InputError, which `hasattr` does not catch, if a pipeline depends on it."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            pipeline = None if name.startswith("__") else asking_pipeline(sys._getframe(1))
            network = None if pipeline is None else self._stands_for()
            if network is not None and _has(network, name):
                raise InputError(
                    f"{pipeline} reads scheduler.{name}: {network['_class_name']} has it, but a plan, which is only "
                    "timesteps and coefficients, does not. Run this pipeline with its own scheduler"
                ) from None
            raise


def asking_pipeline(frame: FrameType) -> str | None:
    """The pipeline whose code runs in `frame`, by its class or its module; None for other code."""
    if torch.compiler.is_compiling():
        return None
    module, asking = frame.f_globals.get("__name__", ""), frame.f_locals.get("self")
    if issubclass(type(asking), DiffusionPipeline):
        return type(asking).__name__ if module in _modules(type(asking)) - _modules(DiffusionPipeline) else None
    kinds = (kind for kind in frame.f_globals.values() if isinstance(kind, type) and kind.__module__ == module)
    return next(
        (kind.__name__ for kind in kinds if issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline), None
    )


def _modules(kind: type) -> set[str]:
    return {each.__module__ for each in kind.__mro__}


def _has(network: Mapping[str, Any], name: str) -> bool:
    """True if a scheduler of this config has its own attribute of this name."""
    kind = scheduler_class(network["_class_name"])
    if kind is None:
        return False
    try:
        return name in vars(kind.from_config(dict(network))) or hasattr(kind, name)
    except Exception:  # the config may have been altered
        return hasattr(kind, name)
