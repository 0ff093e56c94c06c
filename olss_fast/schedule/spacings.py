"""Where to evaluate the network: `steps` timesteps from the noise end to the data end of a curve.

| spacing | rule |
|---|---|
| trailing | uniform in the timestep, starts at the noise end, stops one stride short of the clean sample |
| leading | uniform in the timestep, ends at the data end, starts one stride late |
| linspace | uniform in the timestep, both ends included |
| logsnr | uniform in lam = log(alpha / sigma), both ends included (Lu et al., DPM-Solver, 2022) |
| karras | uniform in (sigma / alpha)^(1/7), both ends included (Karras et al. 2022, eq. 5); flow: in sigma^(1/7) |
| quadratic | uniform in the square root of the timestep, both ends included (Song et al., DDIM, 2021, appendix D.2) |

"uniform in the timestep" rounds to whole timesteps if the network was trained on whole ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from olss_fast.errors import ScheduleError

if TYPE_CHECKING:
    from olss_fast.schedule.curves import Curve, FloatArray

KARRAS_RHO = 7.0

LOWEST_LAM = -5.1
"""lam below which variance-preserving and flow curves hold (next to) no signal: logsnr and karras spacings take one
step from the noise end to here. Just below the noise end of Ho et al.'s linear schedule (-5.06)."""


def space_timesteps(
    curve: Curve, steps: int, spacing: str, leading_offset: int = 0, *, whole: bool = False
) -> FloatArray:
    """(steps,) times of the curve, noise falling; `whole`: the nearest whole ones, each once. ScheduleError for an
    unknown spacing."""
    if not isinstance(spacing, str) or spacing not in _RULES:
        raise ScheduleError(f"spacing {spacing!r} is unknown; choose one of {', '.join(_RULES)}")
    times = _RULES[spacing](curve, steps, leading_offset)
    if whole:  # of equal ones the noisier move up, as far as there is room
        ranks = np.arange(steps)[::-1]
        times = np.maximum.accumulate((np.round(times) - ranks)[::-1])[::-1] + ranks
        times = np.minimum(times, curve.first - ranks[::-1])
    if np.any(np.diff(times) >= 0) or (whole and times[-1] < np.floor(curve.last)):
        raise ScheduleError(f"{steps} steps are more than {spacing} spacing can tell apart on {curve.describe()}")
    return times


def _on_grid(curve: Curve, times: FloatArray) -> FloatArray:
    """Rounds on tables; bends by the shift for flow matching."""
    return np.round(times) if curve.whole else curve.bend(times)


def _unbent_last(curve: Curve) -> float:
    return 1.0 if curve.straight else curve.last


def _trailing(curve: Curve, steps: int, _: int) -> FloatArray:
    # Counted from `end`: halves then round as for a grid of 1 .. N.
    span = curve.first - curve.end
    return curve.end + _on_grid(curve, np.asarray(span - np.arange(steps) * (span / steps)))


def _leading(curve: Curve, steps: int, offset: int) -> FloatArray:
    stride = (curve.first - curve.end) / steps
    if curve.whole:
        stride = float(np.floor(stride))
    times: FloatArray = np.asarray(_unbent_last(curve) + np.arange(steps)[::-1] * stride)
    if curve.whole:
        times = np.minimum(times + offset, curve.first)
    return _on_grid(curve, times)


def _linspace(curve: Curve, steps: int, _: int) -> FloatArray:
    return _on_grid(curve, np.linspace(curve.first, _unbent_last(curve), steps))


def _quadratic(curve: Curve, steps: int, _: int) -> FloatArray:
    last = _unbent_last(curve)
    times: FloatArray = last + (curve.first - last) * np.linspace(1.0, 0.0, steps) ** 2
    return curve.bend(times)


def _lam_span(curve: Curve) -> tuple[float, float]:
    ends = curve.levels(np.array([curve.first, curve.last]))[2]
    return float(ends[0] if curve.variance_exploding else max(ends[0], LOWEST_LAM)), float(ends[1])


def _from_first(curve: Curve, times: FloatArray) -> FloatArray:
    return np.concatenate([[curve.first], times[1:]])


def _logsnr(curve: Curve, steps: int, _: int) -> FloatArray:
    return _from_first(curve, curve.timestep_of_lam(np.linspace(*_lam_span(curve), steps)))


def _karras(curve: Curve, steps: int, _: int) -> FloatArray:
    ramp = np.linspace(0.0, 1.0, steps)
    if curve.straight:
        return _bridge(curve.first, curve.last, ramp)
    low, high = _lam_span(curve)
    sigmas = _bridge(np.exp(-low), np.exp(-high), ramp)
    return _from_first(curve, curve.timestep_of_lam(np.clip(-np.log(sigmas), low, high)))


def _bridge(start: float, stop: float, ramp: FloatArray) -> FloatArray:
    root = start ** (1.0 / KARRAS_RHO)
    return np.asarray((root + ramp * (stop ** (1.0 / KARRAS_RHO) - root)) ** KARRAS_RHO)


_RULES: dict[str, Callable[[Curve, int, int], FloatArray]] = {
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _linspace,
    "logsnr": _logsnr,
    "karras": _karras,
    "quadratic": _quadratic,
}

SPACINGS: tuple[str, ...] = tuple(_RULES)
