"""Runs that start from an image, noised to the level of one of the plan's rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from olss_fast.capturing.facts import begin_of, captured_facts, name_of, steps_of
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.text import quoted


def begun(plan: Plan, noise: Tensor, image: Any, strength: Any) -> tuple[Plan | None, Tensor]:
    """The plan of the last part `strength` of its steps, and x_T: alphas[0] image + sigmas[0] noise, scaled to row 0.

    As in diffusers, n steps at strength s run the last int(n s) of them; if none is left, the plan is None and the
    tensor is the image. Without an image both are returned unchanged.
    """
    if image is None and strength is None:
        return plan, noise
    image, strength = _checked(noise, image, strength)
    rest = _rest(plan, strength, tuple(plan.metadata.items()))
    if rest is None:
        return None, image.clone()
    if rest.rows[0, 0] == 0.0:
        raise InputError(f"{name_of(plan)} takes nothing of x_T into its first row, so no image can be put there")
    start = image.double() * rest.alphas[0] + noise.double() * rest.sigmas[0]
    return rest, (start / rest.rows[0, 0]).to(noise.dtype)


@lru_cache(maxsize=16)  # deriving takes longer than some networks, and gives the same plan again
def _rest(plan: Plan, strength: float, metadata: tuple[tuple[str, str], ...]) -> Plan | None:
    """`metadata` is part of the cache key: equal plans may come from different solvers."""
    facts, steps = captured_facts(plan), steps_of(plan)
    begin = (steps - min(int(steps * strength), steps)) * (facts.order if facts else 1)
    return None if begin >= begin_of(plan) + plan.nfe else later_start(plan, begin)


def later_start(plan: Plan, begin: int, schedule: NoiseSchedule | None = None) -> Plan:
    """The plan of a run that starts at index `begin` of its timesteps: captured again, or derived again on `schedule`.

    InputError if there is none. Solvers and capture are imported when first needed.
    """
    first = begin_of(plan)
    count, steps, facts = first + plan.nfe, steps_of(plan), captured_facts(plan)
    if not 0 <= begin < count:
        problem = f"a run of {count} timesteps cannot begin at index {begin}"
        if count <= begin <= max(count, steps * (facts.order if facts else 1)):
            problem += (
                ", where no step is left: the strength of this call times its num_inference_steps is less than one "
                "step. Raise strength, or num_inference_steps to at least 1 / strength"
            )
        raise InputError(problem)
    if begin == first:
        return plan
    if plan.branches != 1 or plan.models.any():
        what = (
            "keeps the unconditional and the conditional output apart"
            if plan.branches != 1
            else "asks several networks"
        )
        raise InputError(f"{name_of(plan)} {what}, and begins only where it was made to: at {_taken(count, first)}")
    if facts:
        from olss_fast.capturing.capturing import recapture

        return recapture(plan, begin=begin)
    from olss_fast.solvers.rederive import is_analytic, schedule_of, truncate

    if first == 0 and is_analytic(plan):
        return truncate(plan, schedule or schedule_of(plan), begin)
    raise InputError(
        f"{name_of(plan)} was fitted for {_taken(count, first)}, but this run takes {_taken(count, begin)}, by its "
        "strength. Fit plans with olss_fast.tune_pipeline and calls of that strength, or use a captured or analytic "
        "plan"
    )


def _taken(count: int, begin: int) -> str:
    """The steps of a run that starts at index `begin`, in words."""
    return f"all {count} steps" if begin == 0 else f"the last {count - begin} of {count} steps"


def _checked(noise: Tensor, image: Any, strength: Any) -> tuple[Tensor, float]:
    if image is None or strength is None:
        missing, given = ("init_image", "strength") if image is None else ("strength", "init_image")
        raise InputError(f"{given} came without {missing}; expected both, as init_image=images, strength=0.6")
    if not isinstance(image, Tensor) or image.shape != noise.shape or not image.is_floating_point():
        what = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"init_image is {what}; expected clean samples of the noise's shape, {tuple(noise.shape)}")
    number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not number or not 0.0 <= strength <= 1.0:
        raise InputError(f"strength is {quoted(strength)}; expected a number from 0, the image itself, to 1")
    if not bool(torch.isfinite(image).all()):
        raise InputError("init_image holds NaN or infinity")
    return image.to(noise), float(strength)
