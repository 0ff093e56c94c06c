"""Noise schedules: the signal and noise level a network expects at each timestep, and the meaning of its output.

Symbols. A state is x = alpha x0 + sigma eps: clean data x0, unit noise eps. lam = log(alpha / sigma). `timestep` is
always the network's own: 0 .. N-1 (or between) for a network trained on betas, N sigma for flow matching (on request
sigma, or counted from the noise), log(sigma) / 4 for EDM preconditioning, by default sigma for other variance-exploding
networks. It gets `input_scale(timestep) * x` and returns f, by `prediction_type` (n = sqrt(alpha^2 + sigma^2)):

| prediction_type | f |
|---|---|
| epsilon | eps |
| v_prediction | (alpha eps - sigma x0) / n (Salimans & Ho 2022) |
| sample | x0 |
| flow | eps - x0 (Lipman et al. 2023) |
| edm | (x0 - c_skip x) / c_out, with alpha = 1 (Karras et al. 2022, table 1) |

A leading minus, as in "-flow", is the negative of f. Also understood: "eps"; "velocity" (v_prediction; of flow matching
dx/dt in the network's own time); and by the states at times 0 and 1, of which 1 is the data if time is reversed: "x0",
"x1", "x1 - x0", "x0 - x1". Each is linear in (x, f), so x0 = a x + b f and eps = c x + d f: `prediction_maps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from olss_fast.errors import InputError, ScheduleError
from olss_fast.schedule.curves import (
    BETA_SCHEDULES,
    Curve,
    ExplodingCurve,
    FloatArray,
    FlowCurve,
    TableCurve,
    beta_schedule,
    check_range,
    number,
    without_terminal_signal,
)
from olss_fast.schedule.spacings import SPACINGS, space_timesteps
from olss_fast.support.arguments import check_steps
from olss_fast.support.text import a

__all__ = ["BETA_SCHEDULES", "PREDICTION_TYPES", "SPACINGS", "NoiseSchedule", "beta_schedule"]

PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction", "sample", "flow", "edm")
LARGEST_ALPHA_CUMPROD = 1.0 - 2.0**-24  # what float32 rounds to 1
UNIT_TIMESTEPS = 1000  # of the spacings of a flow whose time lies in [0, 1]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Make one with `from_betas`, `from_alphas_cumprod`, `named`, `from_sigmas`, `ve`, `edm`, `flow`, `from_diffusers`.

    All functions of the timestep take a number or an array of any shape, work in float64, and raise ScheduleError
    outside [last, first] (beyond rounding).
    """

    curve: Curve
    prediction_type: str
    sigma_data: float = 0.5  # standard deviation of the data; edm only
    unit_input: bool = False  # the network gets x / sqrt(1 + sigma^2); variance exploding only
    leading_offset: int = 0  # added to "leading" timesteps (diffusers' steps_offset)
    from_sample: bool = False  # x_T is the network input of the first evaluation, not unit noise
    time_scale: float = 1.0  # the network's time is time_offset + time_scale * the curve's
    time_offset: float = 0.0
    whole_times: bool = False  # solvers and `tune` ask at whole timesteps only

    def __post_init__(self) -> None:
        """ScheduleError if the prediction type does not fit the curve."""
        object.__setattr__(self, "prediction_type", self._resolved(self.prediction_type))
        if self.whole_times and abs(self.time_scale) != 1.0:
            raise ScheduleError("whole_times needs timesteps that count, not times within [0, 1]")
        if self._predicts == "epsilon" and self.alpha(self.first) == 0.0:
            raise ScheduleError(
                "prediction_type 'epsilon' does not determine the image where there is no signal, as at the first "
                f"timestep of this schedule ({self.curve.describe()}); expected v_prediction, sample or flow"
            )
        if self._predicts == "edm" and not self.curve.variance_exploding:
            raise ScheduleError(
                "prediction_type 'edm' needs a variance-exploding schedule; make it with NoiseSchedule.edm"
            )
        if self.unit_input and not self.curve.variance_exploding:
            raise ScheduleError("unit_input scales the input of variance-exploding networks; this schedule is not one")
        if not 0.0 < number("sigma_data", self.sigma_data) < np.inf:
            raise ScheduleError(f"sigma_data is {self.sigma_data!r}; expected a positive number")

    def _resolved(self, name: object) -> str:
        """The prediction type that `name` stands for."""
        data, noise, sign = ("x1", "x0", "-") if self.time_scale < 0.0 else ("x0", "x1", "")
        velocity = f"{sign}flow" if self.curve.straight else "v_prediction"
        also = {"eps": "epsilon", "velocity": velocity, data: "sample", noise: "epsilon"}
        also |= {f"-{each}": f"-{known}".removeprefix("--") for each, known in also.items()}
        also |= {f"{noise} - {data}": "flow", f"{data} - {noise}": "-flow"}
        known = also.get(name, name) if isinstance(name, str) else ""
        if known.removeprefix("-") not in PREDICTION_TYPES:
            choice = ", ".join([*PREDICTION_TYPES, *(each for each in also if not each.startswith("-"))])
            raise ScheduleError(f"prediction_type {name!r} is unknown; choose one of {choice}, or - before it")
        return known

    @property
    def _predicts(self) -> str:
        """The prediction type without its sign."""
        return self.prediction_type.removeprefix("-")

    # --- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def from_betas(
        cls,
        betas: npt.ArrayLike,
        *,
        prediction_type: str = "epsilon",
        label: str = "",
        leading_offset: int = 0,
        whole_times: bool = False,
    ) -> NoiseSchedule:
        """Variance preserving, alphas_cumprod_t = prod_{s <= t} (1 - betas_s); betas: (N,), each in (0, 1].

        A last beta of 1 means zero terminal signal-to-noise ratio. CPU tensors work too.
        """
        values = _numbers(betas, "betas")
        if np.any(values <= 0.0) or np.any(values[:-1] >= 1.0) or values[-1] > 1.0:
            raise ScheduleError(
                f"betas run from {values.min():g} to {values.max():g}; expected each in (0, 1), the last may be 1"
            )
        return cls.from_alphas_cumprod(
            np.cumprod(1.0 - values),
            prediction_type=prediction_type,
            label=label or f"betas {values[0]:.4g} to {values[-1]:.4g}",
            leading_offset=leading_offset,
            whole_times=whole_times,
        )

    @classmethod
    def from_alphas_cumprod(
        cls,
        alphas_cumprod: npt.ArrayLike,
        *,
        prediction_type: str = "epsilon",
        label: str = "alphas_cumprod",
        leading_offset: int = 0,
        whole_times: bool = False,
    ) -> NoiseSchedule:
        """Variance preserving, alpha^2 = alphas_cumprod: (N,), never rising within [0, 1]; what counts as 1 is clamped.

        Timesteps begin at the first of equal entries at the noise end: clamp values that leave next to no signal, such
        as 2e-9 of cosine schedules, with np.maximum(alphas_cumprod, 4e-5), the least value of Ho et al.'s schedule.
        """
        values = _numbers(alphas_cumprod, "alphas_cumprod")
        if np.any(values < 0.0) or np.any(values > 1.0):
            raise ScheduleError(f"alphas_cumprod run from {values[0]:g} to {values[-1]:g}; expected each in [0, 1]")
        values = np.minimum(values, LARGEST_ALPHA_CUMPROD)
        with np.errstate(divide="ignore"):
            lams = 0.5 * (np.log(values) - np.log1p(-values))
        curve = TableCurve.make(lams, label)
        return cls(curve, prediction_type, leading_offset=leading_offset, whole_times=whole_times)

    @classmethod
    def named(
        cls,
        name: str,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction_type: str = "epsilon",
        zero_terminal_snr: bool = False,
        leading_offset: int = 0,
        whole_times: bool = False,
    ) -> NoiseSchedule:
        """A schedule of `BETA_SCHEDULES`; see `beta_schedule`. Stable Diffusion: scaled_linear, 0.00085, 0.012.

        `zero_terminal_snr` shifts and scales sqrt(alphas_cumprod) to end at 0, with its first value unchanged
        (Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2024, algorithm 1).
        """
        betas = beta_schedule(name, num_train_timesteps, beta_start, beta_end)
        text = name if name == "squaredcos_cap_v2" else f"{name} {beta_start:g} to {beta_end:g}"
        values = np.asarray(np.cumprod(1.0 - betas))
        return cls.from_alphas_cumprod(
            without_terminal_signal(values) if zero_terminal_snr else values,
            prediction_type=prediction_type,
            label=f"{text}, zero terminal SNR" if zero_terminal_snr else text,
            leading_offset=leading_offset,
            whole_times=whole_times,
        )

    @classmethod
    def from_sigmas(
        cls, sigmas: npt.ArrayLike, *, prediction_type: str = "epsilon", unit_input: bool = False
    ) -> NoiseSchedule:
        """Variance exploding, sigma given at timesteps 0 .. N-1: (N,), positive, strictly rising with the timestep."""
        values = _numbers(sigmas, "sigmas")
        if np.any(values <= 0.0):
            raise ScheduleError(f"the smallest of the sigmas is {values.min():g}; expected all positive")
        curve = TableCurve.make(-np.log(values), f"sigma {values[-1]:g} to {values[0]:g}", variance_exploding=True)
        return cls(curve, prediction_type, unit_input=unit_input)

    @classmethod
    def ve(
        cls,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        *,
        prediction_type: str = "epsilon",
        timestep: str = "sigma",
        unit_input: bool = False,
    ) -> NoiseSchedule:
        """Variance exploding. `timestep`: the network gets "sigma", "log" (sigma) or "quarter_log", log(sigma) / 4.

        Stable Video Diffusion: ve(0.002, 700, prediction_type="v_prediction", timestep="quarter_log", unit_input=True).
        """
        return cls(ExplodingCurve(sigma_min, sigma_max, timestep), prediction_type, unit_input=unit_input)

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> NoiseSchedule:
        """Karras et al. 2022: f is the raw network F of D(x) = c_skip x + c_out F(c_in x, log(sigma) / 4)."""
        label = f"EDM, sigma_data {number('sigma_data', sigma_data):g}"
        curve = ExplodingCurve(sigma_min, sigma_max, "quarter_log", label)
        return cls(curve, "edm", sigma_data=sigma_data)

    @classmethod
    def flow(
        cls,
        shift: float = 1.0,
        num_train_timesteps: int = 1000,
        *,
        prediction_type: str = "flow",
        reversed_time: bool = False,
        whole_times: bool = False,
    ) -> NoiseSchedule:
        """Flow matching, x = (1 - sigma) x0 + sigma eps, timestep = num_train_timesteps * sigma: 1 for times in [0, 1].

        With `reversed_time` the network gets num_train_timesteps * (1 - sigma): noise at 0, data at the other end.
        `shift` (Esser et al. 2024, section 5.3.2) moves the timesteps of every spacing except logsnr and karras.
        """
        unit = number("num_train_timesteps", num_train_timesteps) == 1.0
        scale = 1.0 / UNIT_TIMESTEPS if unit else 1.0
        return cls(
            FlowCurve(shift, UNIT_TIMESTEPS if unit else num_train_timesteps),
            prediction_type,
            time_scale=-scale if reversed_time else scale,
            time_offset=float(num_train_timesteps) if reversed_time else 0.0,
            whole_times=whole_times,
        )

    @classmethod
    def from_diffusers(cls, scheduler: object, *, whole_times: bool = False) -> NoiseSchedule:
        """From a diffusers scheduler, or its config (a mapping). diffusers itself is not needed.

        ScheduleError for schedulers with other kinds of noise levels.
        """
        from olss_fast.schedule.from_diffusers import schedule_from_diffusers

        return replace(schedule_from_diffusers(scheduler), whole_times=whole_times)

    def begun_at(self, timestep: float) -> NoiseSchedule:
        """The rest of the schedule from `timestep` on, for sampling from a noisy image (image-to-image).

        x_T of its plans is the first network input, input_scale (alpha x0 + sigma eps) at `timestep`, hence
        rows[0, 0] = 1. ScheduleError outside the schedule, and between the timesteps of a table.
        """
        at = self._on_curve("timestep", number("timestep", timestep))
        if not self.curve.last < at <= self.curve.first:
            raise ScheduleError(
                f"a schedule from {self.first:g} to {self.last:g} cannot begin at {timestep!r}; expected a timestep in "
                "between"
            )
        return replace(self, curve=self.curve.begun_at(float(at)), from_sample=True, leading_offset=0)

    # --- functions of the timestep ------------------------------------------------------------------------------

    @property
    def first(self) -> float:
        """Timestep of the noise end."""
        return float(self._of_curve(self.curve.first))

    @property
    def last(self) -> float:
        """Timestep of the data end: the lowest noise level of training. The clean sample lies beyond."""
        return float(self._of_curve(self.curve.last))

    def _of_curve(self, time: float | FloatArray) -> FloatArray:
        """The network's timestep at a time of the curve."""
        return np.asarray(self.time_offset + self.time_scale * time)

    def _on_curve(self, what: str, timestep: npt.ArrayLike) -> FloatArray:
        """The curve's time at a timestep of the network's."""
        return np.asarray((_real(what, timestep) - self.time_offset) / self.time_scale)

    def levels(self, timestep: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
        """alpha, sigma and lam in one call."""
        if self.time_scale != 1.0:  # an error then quotes the network's own time
            ends = self._of_curve(np.array([max(self.curve.end, 0.0), self.curve.first]))
            check_range("timestep", _real("timestep", timestep), *map(float, np.sort(ends)))
        return self.curve.levels(self._on_curve("timestep", timestep))

    def alpha(self, timestep: npt.ArrayLike) -> FloatArray:
        """Signal level of the solver's state (1 for variance exploding)."""
        return self.levels(timestep)[0]

    def sigma(self, timestep: npt.ArrayLike) -> FloatArray:
        """Noise level of the solver's state."""
        return self.levels(timestep)[1]

    def lam(self, timestep: npt.ArrayLike) -> FloatArray:
        """log(alpha / sigma), rising toward the data; always finite, since it is floored where alpha is 0."""
        return self.levels(timestep)[2]

    def timestep_of_lam(self, lam: npt.ArrayLike) -> FloatArray:
        """The inverse of `lam`."""
        return self._of_curve(self.curve.timestep_of_lam(_real("log-SNR", lam)))

    def input_scale(self, timestep: npt.ArrayLike) -> FloatArray:
        """c_in: the factor from the state to the network input."""
        sigma = self.sigma(timestep)
        if self._predicts == "edm":
            return np.asarray(1.0 / np.hypot(sigma, self.sigma_data))
        return np.asarray(1.0 / np.hypot(sigma, 1.0)) if self.unit_input else np.ones_like(sigma)

    def start_amplitude(self, timestep: npt.ArrayLike) -> FloatArray:
        """The factor of x_T in a first state at `timestep`: sqrt(alpha^2 + sigma^2), the state's standard deviation
        for data of unit variance; with `from_sample` the inverse of `input_scale`."""
        alpha, sigma, _ = self.levels(timestep)
        return np.asarray(1.0 / self.input_scale(timestep)) if self.from_sample else np.hypot(alpha, sigma)

    def prediction_maps(self, timestep: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """(a, b, c, d) with x0 = a x + b f and eps = c x + d f, for the *state* x (before `input_scale`)."""
        alpha, sigma, _ = self.levels(timestep)
        zero, one = np.zeros_like(sigma), np.ones_like(sigma)
        sign = -1.0 if self.prediction_type.startswith("-") else 1.0
        if self._predicts == "epsilon":
            return one / alpha, -sign * sigma / alpha, zero, sign * one
        if self._predicts == "sample":
            return zero, sign * one, one / sigma, -sign * alpha / sigma
        if self._predicts == "flow":
            total = alpha + sigma
            return one / total, -sign * sigma / total, one / total, sign * alpha / total
        if self._predicts == "v_prediction":
            square = alpha**2 + sigma**2
            norm = sign * np.sqrt(square)
            return alpha / square, -sigma / norm, sigma / square, alpha / norm
        square = sigma**2 + self.sigma_data**2
        norm = sign * np.sqrt(square)
        return self.sigma_data**2 / square, sigma * self.sigma_data / norm, sigma / square, -self.sigma_data / norm

    def timesteps(self, steps: int, spacing: str = "trailing") -> FloatArray:
        """(steps,) timesteps, noise falling; `spacing` is one of SPACINGS (see olss_fast.schedule.spacings)."""
        times = space_timesteps(self.curve, check_steps(steps), spacing, self.leading_offset, whole=self.whole_times)
        return self._of_curve(times)

    # --- for people and for files -------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line: kind, range, prediction type."""
        return f"{self.curve.describe()}{self._clock()}, {self.prediction_type}"

    def _clock(self) -> str:
        """What the network's time is, if not the curve's."""
        own = (self.time_scale, self.time_offset) == (1.0, 0.0)
        return "" if own else f", asked at timesteps {self.time_offset:g}{self.time_scale:+g}t"

    def metadata(self) -> dict[str, str]:
        """The schedule's entries in a plan's metadata."""
        text = {"schedule": self.describe(), "prediction_type": self.prediction_type}
        if self._predicts == "edm":
            text["sigma_data"] = repr(float(self.sigma_data))
        return text

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.describe()})"


def _numbers(values: npt.ArrayLike, what: str) -> FloatArray:
    """A float64 copy of a row of at least 2 finite numbers; ScheduleError otherwise."""
    array = _real(what, values).copy()
    if array.ndim != 1 or array.size < 2 or not np.all(np.isfinite(array)):
        raise ScheduleError(f"{what} has shape {array.shape}; expected one row of at least 2 finite numbers")
    return array


def _real(what: str, values: npt.ArrayLike) -> FloatArray:
    """As float64 of any shape; ScheduleError if it cannot be read as numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{what} cannot be read as numbers: {error}; pass numbers") from error


def checked_schedule(schedule: Any) -> NoiseSchedule:
    """`schedule`, or InputError unless it is a NoiseSchedule."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    raise InputError(
        f"schedule is {a(schedule)}; expected a NoiseSchedule, such as NoiseSchedule.from_betas(betas) or "
        "NoiseSchedule.from_diffusers(scheduler)"
    )
