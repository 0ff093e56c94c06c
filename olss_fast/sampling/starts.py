"""A run that starts from an image: noised to the level of one of the plan's rows, and sampled from there on."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.support.text import quoted


def begun(plan: Plan, noise: Tensor, image: Any, strength: Any) -> tuple[Plan | None, Tensor]:
    """The plan of the last `strength` of its steps, and its x_T: alphas[0] image + sigmas[0] noise, in units of row 0.

    As in diffusers, n steps at strength s run the last int(n s) of them; where none is left, the plan is None and the
    tensor the image. Without an image both stay as they are.
    """
    if image is None and strength is None:
        return plan, noise
    image, strength = _checked(noise, image, strength)
    rest = _rest(plan, strength, tuple(plan.metadata.items()))
    if rest is None:
        return None, image.clone()
    start = image.double() * rest.alphas[0] + noise.double() * rest.sigmas[0]
    return rest, (start / rest.rows[0, 0]).to(noise.dtype)


@lru_cache(maxsize=16)  # deriving takes longer than some networks, and gives the same plan again
def _rest(plan: Plan, strength: float, metadata: tuple[tuple[str, str], ...]) -> Plan | None:
    """`metadata` tells plans apart that are equal, which says nothing of where they come from."""
    from olss_fast.adapters.diffusers.plan_book import PlanBook, steps_of

    book = PlanBook((plan,), None)
    entry = book.choose(steps_of(plan), {})
    begin = (entry.steps - min(int(entry.steps * strength), entry.steps)) * entry.order
    return None if begin >= len(entry.timesteps) else book.begun_at(entry, begin)


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
