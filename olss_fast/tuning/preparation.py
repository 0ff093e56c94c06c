"""The checked inputs of a tuning: its numbers of steps, and the split of the samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.support.text import quoted
from olss_fast.tuning.recording import Split

PIXELS_PER_COEFFICIENT = 10


def whole_steps(steps: int | Sequence[int]) -> list[int]:
    """`steps` as a list. `InputError` for other than whole numbers."""
    wanted: list[Any] = list(steps) if isinstance(steps, (list, tuple, range, np.ndarray)) else [steps]
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in wanted):
        raise InputError(f"steps must be a whole number or a list of them, got {quoted(steps)}")
    return [int(n) for n in wanted]


def steps_to_teach(steps: int | Sequence[int], most: int) -> list[int]:
    """Numbers of steps, each once and in order, of at most `most`, those that paths choose from."""
    wanted = whole_steps(steps)
    if not wanted:
        raise InputError(f"steps must be a whole number or a list of them, got {quoted(steps)}")
    bad = [n for n in wanted if not 1 <= n <= most]
    if bad:
        raise InputError(f"steps must lie between 1 and the {most} times that paths choose from, got {bad}")
    return sorted({*wanted})


def split_samples(noise: Tensor, steps: Sequence[int], held_out: int | None) -> Split:
    """Which samples are for what; `InputError` where too few remain to fit the coefficients."""
    samples, pixels = noise.shape[0], noise[0].numel()
    judge, stop = _set_aside(samples, held_out)
    coefficients = (max(steps) + 1) * (max(steps) + 2) // 2
    needed = max(1, -(-PIXELS_PER_COEFFICIENT * coefficients // pixels))
    if samples - judge - stop < needed:
        raise InputError(
            f"{samples} noise samples are too few: {judge} are held out, {stop} stop the polish, and at least {needed} "
            f"must remain to fit {coefficients} coefficients ({PIXELS_PER_COEFFICIENT} pixels each). Give more noise: "
            f"{_enough(needed, held_out)} samples in all"
        )
    return Split.of(samples, validation=stop, held_out=judge)


def _set_aside(samples: int, held_out: int | None) -> tuple[int, int]:
    """How many samples judge, and how many stop the polish."""
    return max(1, samples // 4) if held_out is None else held_out, max(1, samples // 8)


def _enough(needed: int, held_out: int | None) -> int:
    """The least number of samples of which `needed` remain: counted up from a bound that ignores rounding."""
    least = (needed - 2) * 8 // 5 if held_out is None else (needed + held_out - 1) * 8 // 7
    return next(n for n in itertools.count(max(1, least)) if n - sum(_set_aside(n, held_out)) >= needed)
