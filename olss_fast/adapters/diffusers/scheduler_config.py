"""Writing and reading a PlanScheduler's config, all of it plain JSON.

`_plans` are the plans and `_scheduler` is the config of the network's own scheduler, whose entries are also at the top
level, where pipelines and other schedulers look for them. Names with an underscore are those that diffusers passes
silently from one scheduler's config to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from olss_fast.capturing.facts import captured_facts, plain
from olss_fast.errors import InputError, OlssError
from olss_fast.plan.plan import Plan

Config = dict[str, Any]
KEPT = ("_class_name", "_use_default_values")
"""Private entries to keep, which diffusers does not pass on: the config's class, and the values left at defaults."""


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
