"""What pipelines and other schedulers find behind a PlanScheduler's interface: config, class and attributes.

The config is plain JSON. `_plans` are the plans and `_scheduler` is the config of the network's own scheduler, whose
entries are also at the top level, where pipelines and other schedulers look for them. Names with an underscore are
those that diffusers passes silently from one scheduler's config to the next.

Most pipelines call set_timesteps, step and the like, which a plan supports. Some check their scheduler's class
(`isinstance`) to choose what to pass: they see the class that the plan replaces, everyone else the real one. Some
compute with their scheduler's state (its betas, its list of outputs), or branch on `hasattr`: reading or testing an
attribute that the scheduler has and a plan lacks is an error. So no pipeline, of any class, takes another branch
because of the plan.

`check_slot` finds what can be detected before a call.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from olss_fast.capturing.facts import captured_facts, plain, scheduler_class
from olss_fast.errors import InputError, OlssError
from olss_fast.plan.plan import Plan

Config = dict[str, Any]
KEPT = ("_class_name", "_use_default_values")
"""Private entries to keep, which diffusers does not pass on: the config's class, and the values left at defaults."""
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


# --- config -----------------------------------------------------------------------------------------------------------


def plans_from(given: Any) -> tuple[Plan, ...]:
    """Plans (also the values of a mapping), or such plans as `Plan.to_dict` gives. InputError for anything else."""
    if isinstance(given, Mapping) and all(isinstance(item, Plan) for item in given.values()):
        given = given.values()  # by number of steps, as returned by tuning
    items = [given] if isinstance(given, (Plan, Mapping)) else given
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise InputError(
            f"plans is a {type(given).__name__}; expected a Plan, a list of Plans, or the config of a PlanScheduler "
            "(read plan files with Plan.load)"
        )
    return tuple(item if isinstance(item, Plan) else _plan(item) for item in items)


def network_config(scheduler: Any, plans: Sequence[Plan]) -> Config | None:
    """The config of the network's scheduler: given, that of another PlanScheduler, or from a captured plan."""
    if scheduler is None:
        return next((facts.network_config for plan in plans if (facts := captured_facts(plan))), None)
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise InputError(
            f"scheduler is a {type(scheduler).__name__}; expected the diffusers scheduler that the network was trained "
            "with, or its config"
        )
    if "_plans" in config:
        inner = config.get("_scheduler")
        return dict(inner) if isinstance(inner, Mapping) else None
    kept = {key: value for key, value in _plain(config).items() if not key.startswith("_") or key in KEPT}
    return kept if isinstance(scheduler, Mapping) else kept | {"_class_name": type(scheduler).__name__}


def visible_config(network: Mapping[str, Any] | None, plans: Sequence[Plan]) -> Config:
    """The entries of a scheduler's config that pipelines read."""
    if network is not None:
        return {"num_train_timesteps": 1000} | {key: value for key, value in network.items() if key != "_class_name"}
    known = {plan.metadata.get("prediction_type") for plan in plans} & {"epsilon", "v_prediction", "sample"}
    return {"num_train_timesteps": 1000} | ({"prediction_type": known.pop()} if len(known) == 1 else {})


def _plan(data: Any) -> Plan:
    try:
        return Plan(**data)
    except (OlssError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"the config holds a plan that cannot be read: {type(error).__name__}: {error}; make the PlanScheduler "
            "anew from its Plan"
        ) from error


def _plain(config: Mapping[str, Any]) -> Config:
    try:
        return dict(json.loads(json.dumps(dict(config), default=plain)))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the scheduler's config cannot be written as JSON: {error}; expected numbers, text and lists of them"
        ) from error
