"""The curves behind a `NoiseSchedule`: signal and noise level as functions of the network's own timestep.

A state is x = alpha x0 + sigma eps, and lam = log(alpha / sigma) is its (half) log signal-to-noise ratio. Three curves
cover every network: a table of lam over integer timesteps, variance exploding (alpha = 1), and flow matching
(alpha = 1 - sigma). Each knows

- `first`, `last`: the timesteps of its noise end and its data end;
- `end`: the target of "trailing" timesteps, one step beyond `last` on grids that count from 0;
- `levels(timestep) -> (alpha, sigma, lam)` and `timestep_of_lam(lam)`, both vectorised.

Where alpha is exactly 0, `lam` is floored to keep its differences finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from olss_fast.errors import ScheduleError

FloatArray = npt.NDArray[np.float64]

ZERO_SNR_LAM = -12.0 * np.log(2.0)
"""lam of the last timestep of a table with zero terminal signal-to-noise ratio: alpha there counts as 2**-12."""

FLOW_ALPHA_FLOOR = 1e-6
"""Signal level below which flow matching's lam stops falling."""

_SLACK = 1e-9  # relative tolerance at the ends of a range, for rounded timesteps


BETA_SCHEDULES: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class Curve(Protocol):
    """What all curves have in common; the module's docstring defines the members."""

    whole: bool = False  # whether the network was trained on whole timesteps
    straight: bool = False  # whether timesteps are noise levels, up to the shift that `bend` applies
    variance_exploding: bool = False

    @property
    def first(self) -> float: ...
    @property
    def last(self) -> float: ...
    @property
    def end(self) -> float: ...
    def levels(self, timestep: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]: ...
    def timestep_of_lam(self, lam: FloatArray) -> FloatArray: ...
    def describe(self) -> str: ...
    def begun_at(self, timestep: float) -> Curve:
        """The part of the curve from `timestep` (inside it) to the data end."""
        ...

    def bend(self, timestep: FloatArray) -> FloatArray:
        return timestep


def check_range(what: str, values: FloatArray, low: float, high: float) -> FloatArray:
    """`values` clipped to [low, high] if they lie there up to rounding; ScheduleError otherwise (or if not finite)."""
    slack = _SLACK * max(1.0, abs(low), abs(high))
    bad = ~((values >= low - slack) & (values <= high + slack))
    if np.any(bad):
        raise ScheduleError(
            f"{what} {float(np.atleast_1d(values)[np.atleast_1d(bad)][0])!r} is outside the schedule's range "
            f"[{low:g}, {high:g}]; clip it to that range"
        )
    return np.clip(values, low, high)


def number(what: str, value: object) -> float:
    """`value`, or ScheduleError unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ScheduleError(f"{what} is {value!r}; expected a number")
    return float(value)


@dataclass(frozen=True, eq=False)
class TableCurve(Curve):
    """lam given at the integer timesteps 0 .. N-1 and interpolated linearly between them.

    Variance preserving (alpha^2 = sigmoid(2 lam)) or, with `variance_exploding`, alpha = 1 and sigma = exp(-lam).
    `lams[-1]` may be -inf (zero terminal signal-to-noise ratio): alpha is then exactly 0 and sigma exactly 1 at
    timestep N-1, while lam and the times in between use ZERO_SNR_LAM.
    """

    whole, last, end = True, 0.0, -1.0

    lams: FloatArray
    label: str
    variance_exploding: bool = False
    zero_terminal: bool = False

    @classmethod
    def make(cls, lams: FloatArray, label: str, *, variance_exploding: bool = False) -> TableCurve:
        """Checks the table: at least 2 entries, never rising with the timestep, finite; the last may be -inf.

        Equal entries: the table ends with the first of those of most noise; others are on the line between neighbours.
        """
        table = np.array(lams, dtype=np.float64)
        rises = bool(np.any(table[1:] > table[:-1]))
        table = table[: 1 + int(np.argmin(table))]
        zero_terminal = bool(table.size > 1 and np.isneginf(table[-1]))
        if zero_terminal:
            table[-1] = min(ZERO_SNR_LAM, table[-2] - 1.0)
        if rises or table.size < 2 or not np.all(np.isfinite(table)):
            raise ScheduleError(
                f"{label}: {len(lams)} noise levels must increase with the timestep, with some signal left (the last "
                "may have none)"
            )
        falls = np.append(True, np.diff(table) < 0)
        table = np.interp(np.arange(table.size), np.flatnonzero(falls), table[falls])
        table.flags.writeable = False
        return cls(table, label, variance_exploding, zero_terminal)

    @property
    def first(self) -> float:
        return float(self.lams.size - 1)

    def levels(self, timestep: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        t = check_range("timestep", timestep, self.last, self.first)
        lam = np.interp(t, np.arange(self.lams.size), self.lams)
        if self.variance_exploding:
            return np.ones_like(lam), np.exp(-lam), lam
        alpha, sigma = _variance_preserving(lam)
        if self.zero_terminal:
            alpha, sigma = np.where(t == self.first, 0.0, alpha), np.where(t == self.first, 1.0, sigma)
        return alpha, sigma, lam

    def timestep_of_lam(self, lam: FloatArray) -> FloatArray:
        lam = check_range("log-SNR", lam, float(self.lams[-1]), float(self.lams[0]))
        return np.interp(lam, self.lams[::-1], np.arange(self.lams.size)[::-1])

    def describe(self) -> str:
        kind = "VE" if self.variance_exploding else "VP"
        low = "-inf" if self.zero_terminal else f"{self.lams[-1]:.3f}"
        return f"{kind} {self.label}, {self.lams.size} timesteps, log-SNR {low} to {self.lams[0]:.3f}"

    def begun_at(self, timestep: float) -> TableCurve:
        whole = round(timestep)
        if whole != timestep or whole < 1:
            raise ScheduleError(f"a table begins at one of its timesteps 1 to {self.lams.size - 1}, got {timestep!r}")
        if timestep == self.first:
            return self
        return replace(self, lams=self.lams[: whole + 1], zero_terminal=False)


def _variance_preserving(lam: FloatArray) -> tuple[FloatArray, FloatArray]:
    """alpha, sigma with alpha^2 + sigma^2 = 1 and alpha / sigma = exp(lam), without cancellation at either end."""
    return 1.0 / np.sqrt(1.0 + np.exp(-2.0 * lam)), 1.0 / np.sqrt(1.0 + np.exp(2.0 * lam))


TIMESTEP_UNITS = ("sigma", "log", "quarter_log")


@dataclass(frozen=True)
class ExplodingCurve(Curve):
    """alpha = 1, sigma in [sigma_min, sigma_max]; the timestep is sigma, log(sigma) or log(sigma) / 4 (EDM)."""

    variance_exploding = True

    sigma_min: float
    sigma_max: float
    unit: str
    label: str = "VE"

    def __post_init__(self) -> None:
        if not 0.0 < number("sigma_min", self.sigma_min) < number("sigma_max", self.sigma_max) < np.inf:
            raise ScheduleError(
                f"sigma_min {self.sigma_min!r} and sigma_max {self.sigma_max!r}: expected 0 < sigma_min < sigma_max"
            )
        if not isinstance(self.unit, str) or self.unit not in TIMESTEP_UNITS:
            raise ScheduleError(f"timestep unit {self.unit!r} is unknown; choose one of {', '.join(TIMESTEP_UNITS)}")

    @property
    def first(self) -> float:
        return float(self._timestep(np.asarray(self.sigma_max)))

    @property
    def last(self) -> float:
        return float(self._timestep(np.asarray(self.sigma_min)))

    end = last

    def _timestep(self, sigma: FloatArray) -> FloatArray:
        if self.unit == "sigma":
            return sigma
        return np.asarray(np.log(sigma) * (0.25 if self.unit == "quarter_log" else 1.0))

    def levels(self, timestep: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        t = check_range("timestep", timestep, self.last, self.first)
        lam = -np.log(t) if self.unit == "sigma" else -t * (4.0 if self.unit == "quarter_log" else 1.0)
        sigma = t if self.unit == "sigma" else np.exp(-lam)
        return np.ones_like(lam), sigma, lam

    def timestep_of_lam(self, lam: FloatArray) -> FloatArray:
        lam = check_range("log-SNR", lam, -float(np.log(self.sigma_max)), -float(np.log(self.sigma_min)))
        return self._timestep(np.exp(-lam))

    def describe(self) -> str:
        return f"{self.label}, sigma {self.sigma_max:g} to {self.sigma_min:g}"

    def begun_at(self, timestep: float) -> ExplodingCurve:
        return replace(self, sigma_max=float(self.levels(np.asarray(timestep))[1]))


@dataclass(frozen=True)
class FlowCurve(Curve):
    """alpha = 1 - sigma, timestep = N sigma. `shift` bends the spacings only: u -> shift u / (1 + (shift - 1) u).

    `noisiest` is the timestep it begins at, N if None.
    """

    straight, end = True, 0.0

    shift: float
    num_train_timesteps: int
    noisiest: float | None = None

    def __post_init__(self) -> None:
        shift, count = number("shift", self.shift), number("num_train_timesteps", self.num_train_timesteps)
        if not (0.0 < shift < np.inf and count >= 2):
            raise ScheduleError(
                f"flow matching with shift {self.shift!r} and {self.num_train_timesteps!r} training timesteps: "
                "expected shift > 0 and at least 2 timesteps, or 1 for times in [0, 1]"
            )

    @property
    def first(self) -> float:
        return float(self.num_train_timesteps) if self.noisiest is None else self.noisiest

    @property
    def last(self) -> float:
        return float(self.bend(np.asarray(1.0)))

    def bend(self, timestep: FloatArray) -> FloatArray:
        """The shifted timestep; 0 and `first` are fixed points."""
        start = self.first / self.num_train_timesteps
        u = timestep / self.first * start / (self.shift - (self.shift - 1.0) * start)
        return np.asarray(self.num_train_timesteps * self.shift * u / (1.0 + (self.shift - 1.0) * u))

    def levels(self, timestep: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        # The curve is well defined below `last` too; only sigma = 0 has no finite lam.
        t = check_range("timestep", timestep, 1e-6 * self.num_train_timesteps, self.first)
        sigma = t / self.num_train_timesteps
        alpha = 1.0 - sigma
        return alpha, sigma, np.log(np.maximum(alpha, FLOW_ALPHA_FLOOR)) - np.log(sigma)

    def timestep_of_lam(self, lam: FloatArray) -> FloatArray:
        lowest = float(np.log(FLOW_ALPHA_FLOOR))
        lam = check_range("log-SNR", lam, lowest, -lowest)
        return np.where(lam <= lowest, self.first, self.num_train_timesteps / (1.0 + np.exp(lam)))

    def describe(self) -> str:
        part = "" if self.noisiest is None else f" from {self.noisiest:g}"
        return f"flow matching, shift {self.shift:g}, {self.num_train_timesteps} timesteps{part}"

    def begun_at(self, timestep: float) -> FlowCurve:
        self.levels(np.asarray(timestep))  # refuses what is out of range
        return replace(self, noisiest=None if timestep == self.num_train_timesteps else float(timestep))


def beta_schedule(
    name: str, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> FloatArray:
    """(N,) betas. linear: Ho et al. 2020; scaled_linear: linear in sqrt(beta), Rombach et al. 2022;
    squaredcos_cap_v2: Nichol & Dhariwal 2021, eq. 17, capped at 0.999; sigmoid: logistic over [-6, 6], Xu et al. 2022.
    """
    count = num_train_timesteps
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise ScheduleError(f"num_train_timesteps is {count!r}; expected a whole number of at least 2")
    beta_start, beta_end = number("beta_start", beta_start), number("beta_end", beta_end)
    if count < 2 or not 0.0 < beta_start <= beta_end < 1.0:
        raise ScheduleError(
            f"num_train_timesteps {count!r}, betas {beta_start!r} to {beta_end!r}: expected at least 2 timesteps and "
            "0 < beta_start <= beta_end < 1"
        )
    if name == "linear":
        return np.linspace(beta_start, beta_end, count)
    if name == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, count) ** 2
    if name == "squaredcos_cap_v2":
        alpha_bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.asarray(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999))
    if name == "sigmoid":
        return beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, count)))
    raise ScheduleError(f"beta schedule {name!r} is unknown; choose one of {', '.join(BETA_SCHEDULES)}")


def without_terminal_signal(alphas_cumprod: FloatArray) -> FloatArray:
    """Shifts and scales sqrt(alphas_cumprod) to end at 0, with its first value unchanged (Lin et al. 2024)."""
    root = np.sqrt(alphas_cumprod)
    return np.asarray(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)
