"""What a pipeline holds between two steps: its scheduler's own state, of which the network's input is a multiple.

Row k of a plan is the input of evaluation k. Schedulers that scale their input (EulerDiscreteScheduler and its kin)
hand out x / scale instead, where the signal has level 1. So a run that is cut can go on with the scheduler itself, and
image-to-image, callbacks and `init_noise_sigma` meet what they expect.

A captured plan knows the scales and the levels of `add_noise` of its scheduler. Any other plan in the slot of a
scheduler that scales its input has states of signal 1, by the levels of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from olss_fast._from_diffusers import check_config
from olss_fast._text import quoted
from olss_fast.adapters._plan_book import captured_facts, is_captured, name_of, scheduler_class
from olss_fast.errors import InputError
from olss_fast.plan import Floats, Plan

SCALING = {
    "CMStochasticIterativeScheduler", "DPMSolverSDEScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
}  # fmt: skip
"""Classes whose `scale_model_input` divides by the state's spread; their states have signal 1."""

LEAST_SIGNAL = 2.0**-12  # where a schedule ends without signal, diffusers' schedulers count sigma as 4096


@dataclass(frozen=True)
class Latents:
    """scales: (S,) network input / state. alphas, sigmas: (S+1,) what `add_noise` mixes by to begin at each evaluation.

    by_index: after `set_begin_index`, `add_noise` looks at where the run is, not at the timestep it is given.
    """

    scales: Floats
    alphas: Floats
    sigmas: Floats
    by_index: bool = False

    @cached_property  # asked for in every step
    def scaled(self) -> bool:
        return bool(np.any(self.scales != 1.0))


def latents_of(plan: Plan, network: Mapping[str, Any] | None) -> Latents:
    """Of a plan in the slot of a scheduler with the config `network`. InputError for facts that cannot be read."""
    if is_captured(plan):
        return _captured(plan)
    scaling = network is not None and network.get("_class_name") in SCALING
    scales = np.maximum(plan.alphas[:-1], LEAST_SIGNAL) if scaling else np.ones(plan.nfe)
    return _scaled(plan, scales)


def untimed_amplitude(plan: Plan) -> float | None:
    """`init_noise_sigma` of the scheduler that a plan was captured from, before its timesteps are set.

    None where the plan was not captured, diffusers has no such class, or this one says nothing of the kind.
    """
    if not is_captured(plan):
        return None
    facts = captured_facts(plan)
    kind = scheduler_class(facts["class"])
    if kind is None:
        return None
    check_config(facts["config"])
    try:
        value = getattr(kind.from_config(facts["config"]), "init_noise_sigma", None)
    except Exception as error:  # of diffusers' own, from a config that somebody may have altered
        raise InputError(f"no {facts['class']} can be made of the config in {name_of(plan)}: {error}") from error
    return None if value is None else float(value)


def _captured(plan: Plan) -> Latents:
    facts = captured_facts(plan)
    scales = _numbers(plan, facts, "scales", (plan.nfe,))
    if scales is not None and not np.all(scales > 0.0):
        raise InputError(f"the scales of {name_of(plan)} are {quoted(facts['scales'])}; expected positive numbers")
    latents = _scaled(plan, np.ones(plan.nfe) if scales is None else scales)
    noised = _numbers(plan, facts, "noised", (plan.nfe + 1, 2))
    alphas, sigmas = (latents.alphas, latents.sigmas) if noised is None else noised.T
    return Latents(latents.scales, alphas, sigmas, bool(facts.get("noised_by_index")))


def _scaled(plan: Plan, scales: Floats) -> Latents:
    """Levels of the rows themselves, in the unit of the states."""
    ends = np.append(scales, 1.0)
    return Latents(scales, plan.alphas / ends, plan.sigmas / ends)


def _numbers(plan: Plan, facts: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Floats | None:
    value = facts.get(name)
    if value is None:
        return None
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise InputError(
            f"{name} of {name_of(plan)} is {quoted(value)}; expected finite numbers of shape {shape}: capture the "
            "scheduler again"
        )
    return numbers
