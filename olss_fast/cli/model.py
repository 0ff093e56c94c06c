"""A network with its schedule, sample shape and classes, for the command line and the demo."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.executors.draws import unit_noise
from olss_fast.network import network_device
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from olss_fast.adapters.diffusers import DiffusersModel
    from olss_fast.demo import DemoModel

DEMO = "demo"


Model: TypeAlias = "DemoModel | DiffusersModel"


def load_model(name: str, *, device: str | None = None, null_class: int | None = None) -> Model:
    """The embedded model for "demo", else the diffusers folder `name`. Raises `ModelError`, `InputError`."""
    if name == DEMO:
        from olss_fast import demo

        if null_class not in (None, demo.CLASSES):
            raise InputError(f"null_class is {null_class}, but the embedded model's is {demo.CLASSES}: leave it out")
        return demo.load(device)
    from olss_fast.adapters.diffusers import load_pipeline

    return load_pipeline(name, device=device, null_class=null_class)


def draw_noise(model: Model, count: int, seed: int) -> Tensor:
    """(count, *shape) unit Gaussian noise, the same on every device."""
    return unit_noise((count, *model.shape), torch.Generator().manual_seed(seed), device_of(model))


def device_of(model: Model) -> torch.device:
    """The device of the network's parameters; the CPU if it has none."""
    return network_device([model.network]) or torch.device("cpu")


def pick_labels(model: Model, count: int, classes: Sequence[int] = ()) -> list[int]:
    """`count` labels that cycle through `classes` (by default all of the model's); empty without classes."""
    if model.classes == 0:
        if classes:
            raise InputError(f"the classes {list(classes)} were asked for, but this model has none: leave them out")
        return []
    known = range(model.classes)
    unknown = [label for label in classes if label not in known]
    if unknown:
        raise InputError(f"this model has the classes 0 to {model.classes - 1}, got {unknown}")
    turns = list(classes or known)
    return [turns[i % len(turns)] for i in range(count)]


def arguments(model: Model, labels: Sequence[int], guidance_scale: float | None = None) -> dict[str, Any]:
    """`conditioning`, `unconditional` and `guidance_scale` for `tune` and `sample`; the model's own scale if None."""
    scale = model.guidance_scale if guidance_scale is None else guidance_scale
    if scale != 1.0 and model.null_class is None:
        raise InputError(
            f"guidance_scale={scale} needs a class for 'none': name the model's with --null-class (null_class=...), "
            "or use a guidance scale of 1"
        )
    if not labels:
        return {}
    asked = torch.tensor(labels, device=device_of(model))
    given = {"conditioning": {"class_labels": asked}, "guidance_scale": scale}
    if scale == 1.0:
        return given
    return {**given, "unconditional": {"class_labels": torch.full_like(asked, model.null_class or 0)}}


def tuned_guidance(plans: Iterable[Plan], guidance_scale: float | None = None) -> float | None:
    """`guidance_scale`, or if None the one that `plans` were tuned at; None if they have none."""
    told = {plan.metadata["guidance_scale"] for plan in plans if "guidance_scale" in plan.metadata}
    if guidance_scale is not None or not told:
        return guidance_scale
    try:
        (scale,) = {float(text) for text in told}
    except ValueError as error:
        raise InputError(
            f"the plans were tuned at the guidance scales {sorted(told)}: name one (guidance_scale, --guidance-scale)"
        ) from error
    return scale


def solver_plan(schedule: NoiseSchedule, settings: Mapping[str, Any]) -> Plan:
    """The plan of an analytic solver: `settings` are `solver` (its name), `steps`, and its other arguments."""
    from olss_fast.solvers.table import TABLE

    settings = dict(settings)
    name = settings.pop("solver")
    if name not in TABLE:
        raise InputError(f"the solver {name!r} is unknown; choose one of {', '.join(TABLE)}")
    if "steps" not in settings:
        raise InputError(f"the solver {name!r} needs steps, its number of network evaluations")
    solver = TABLE[name].function
    takes = inspect.signature(solver).parameters
    foreign = [setting for setting in settings if setting not in takes]
    if foreign:
        raise InputError(f"the solver {name!r} has no {foreign[0]}: leave it out")
    return solver(schedule, **settings)
