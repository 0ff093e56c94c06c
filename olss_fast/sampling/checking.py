"""Is a network hooked up right? It must denoise what its own sampler made.

Samples x of mean square s^2 are noised to several levels, the network is asked, and its x0-hat is compared with x:

    error = mean (x0-hat - x)^2 / (s^2 sigma^2 / (alpha^2 s^2 + sigma^2))

The denominator is what the best multiple of the noisy state leaves: exact denoisers stay below 1, whatever the data,
those that ignore the data are at 1, and trained networks at 0.05 to 0.5. For each of the usual mistakes the schedule is
changed, samples are made anew and the error is measured again: under the right schedule it is several times smaller.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import HookUpWarning, NetworkError
from olss_fast.executors.reference import Loop
from olss_fast.network import Conditioning, Denoiser, Network, OwnStart, require_finite
from olss_fast.schedule.curves import TIMESTEP_UNITS, ExplodingCurve
from olss_fast.schedule.noise_schedule import NoiseSchedule, checked_schedule
from olss_fast.schedule.spacings import LOWEST_LAM
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp

LEAST, PIXELS = 4, 2048  # samples that are judged, or more of few pixels, for errors within a few percent
SIGNALS = (0.125, 0.5, 1.0, 2.0, 8.0)  # alpha s / sigma, from next to no image to next to no noise
STEPS = 8  # of a run under another schedule
SOUND = 0.2  # an error below which no mistake need be tried
SUSPECT = 2.0  # an error beyond chance and weak networks
EXPLAINED = 0.5  # the largest error under a schedule that may be the right one
CLEARLY, DECISIVELY = 1.5, 4.0  # times smaller under another schedule: worth a warning, and a refusal
BLOWN_UP = 3.0  # times larger than samples that start where there is signal
FOLLOWS = 32.0  # an error on foreign images next to no noise: x0-hat misses half of their mean square


@dataclass(frozen=True)
class Check:
    """`errors` at `timesteps`, noise falling (see the module), and the `finding`: what seems wrong, or ""."""

    timesteps: tuple[float, ...]
    errors: tuple[float, ...]
    finding: str = ""

    @property
    def error(self) -> float:
        """The geometric mean of the errors; 0 where none could be measured."""
        return float(np.exp(np.mean(np.log(self.errors)))) if self.errors else 0.0


def check(
    network: Network,
    schedule: NoiseSchedule,
    *,
    noise: Tensor,
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
) -> Check:
    """Whether `network` and `schedule` belong together, on the first samples of `noise`; arguments as for `tune`.

    A HookUpWarning says what seems wrong: prediction type, sign, direction or unit of the timestep, a start without
    signal. Costs 13 evaluations of a few samples, and as many for each mistake that has to be tried. Samples are made
    with guidance, but judged by the conditional output: guidance leaves the data on purpose.

    Raises `NetworkError` where a mistake is beyond doubt, or outputs are not finite; `InputError`.
    """
    denoiser = Denoiser(
        network, noise, conditioning=conditioning, unconditional=unconditional, guidance_scale=guidance_scale
    )
    with torch.no_grad():
        return checked(denoiser, checked_schedule(schedule))


def checked(denoiser: Denoiser, schedule: NoiseSchedule, of: str = "") -> Check:
    """The check on samples of a short run from the first rows of the noise. Findings begin with `of`."""
    judge = Denoiser(denoiser.networks, denoiser.noise, conditioning=denoiser.conditioning)
    judge.tick = denoiser.count
    try:
        samples = _samples(denoiser, schedule)
    except NetworkError as error:
        finding, _ = _explained(judge, schedule, np.inf)
        if not finding:
            raise
        raise NetworkError(of + finding) from error
    _check_start(judge, schedule, samples)
    given = _measured(judge, schedule, samples)
    finding, sure = "", False
    if given.error > SOUND:
        finding, sure = _explained(judge, schedule, given.error)
    if sure:
        raise NetworkError(of + finding)
    if not finding and given.error > SUSPECT:
        finding = (
            f"the network denoises its own samples worse than a multiple of the noisy image would (error "
            f"{given.error:.2g}; expected less than 1). Is the schedule that of its training, and the guidance not too "
            "large? None of the usual mistakes explains it: prediction type, sign, direction or unit of time"
        )
    if finding:
        _warn(of + finding)
    return replace(given, finding=finding)


def _check_start(denoiser: Denoiser, schedule: NoiseSchedule, samples: Tensor) -> None:
    """NetworkError if a start with next to no signal, by which noise predictions are divided, makes samples larger."""
    divides = schedule.curve.whole and schedule.time_scale == 1.0 and "epsilon" in schedule.prediction_type
    if not divides or schedule.lam(schedule.first) > LOWEST_LAM:
        return
    later = schedule.begun_at(float(np.ceil(schedule.timestep_of_lam(LOWEST_LAM))))
    size, less = (float(each.double().square().mean()) ** 0.5 for each in (samples, _samples(denoiser, later)))
    if size > BLOWN_UP * less:
        raise NetworkError(
            f"samples blow up to a root mean square of {size:.3g}, from {less:.3g} for a start at timestep "
            f"{later.first:g}: noise predictions are divided by next to no signal, the root of alphas_cumprod = "
            f"{float(schedule.alpha(schedule.first)) ** 2:.1e}. Clamp it, as in NoiseSchedule.from_alphas_cumprod("
            "np.maximum(alphas_cumprod, 4e-5))"
        )


def _warn(message: str) -> None:
    """Warns at the line that called the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in ("olss_fast", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, HookUpWarning, stacklevel=level)


def _first(denoiser: Denoiser) -> slice:
    """The samples that are judged."""
    return slice(0, min(denoiser.samples, max(LEAST, PIXELS // denoiser.noise[0].numel())))


def _samples(denoiser: Denoiser, schedule: NoiseSchedule) -> Tensor:
    """Those of a short run."""
    most = int(1 + schedule.curve.first - schedule.curve.last) if schedule.whole_times else STEPS
    plan, first = dpm_solver_pp(schedule, min(STEPS, most), order=2, spacing="logsnr"), _first(denoiser)
    loop, evaluate = Loop(plan, denoiser.noise[first][None]), denoiser.asking(first)
    while not loop.done:
        require_finite(loop.ask(evaluate), step=loop.evaluation - 1, first_sample=0)
    return loop.x


def _measured(
    denoiser: Denoiser, schedule: NoiseSchedule, samples: Tensor, signals: Sequence[float] = SIGNALS
) -> Check:
    """The errors at levels of these signals, as far as the schedule has them; none for samples without any signal."""
    x, power = samples.double(), float(samples.double().square().mean())
    if not 1e-30 < power < 1e30:
        return Check((), ())
    lams = np.clip(np.log(signals) - 0.5 * np.log(power), *schedule.lam(np.array([schedule.first, schedule.last])))
    times = schedule.timestep_of_lam(lams)
    times = np.round(times) if schedule.curve.whole and abs(schedule.time_scale) == 1.0 else times
    streams, errors = torch.Generator("cpu").manual_seed(0), {}
    drawn = denoiser.noise[: len(x)] != 0.0  # pixels that a pipeline puts in place have no noise
    for time in dict.fromkeys(times.tolist()):
        alpha, sigma, _ = map(float, schedule.levels(time))
        a, b, _, _ = map(float, schedule.prediction_maps(time))
        fresh = torch.randn(x.shape, generator=streams, dtype=x.dtype, device="cpu").to(x)
        state = alpha * x + sigma * drawn * fresh
        output = denoiser.asking(slice(0, len(x)))(float(schedule.input_scale(time)) * state, time)[0]
        missed = np.nan_to_num(float((a * state + b * output.double() - x).square().mean()), nan=np.inf)
        errors[time] = float(max(missed, 1e-12 * power) * (alpha**2 / sigma**2 + 1.0 / power))
    return Check(tuple(errors), tuple(errors.values()))


def _explained(denoiser: Denoiser, schedule: NoiseSchedule, error: float) -> tuple[str, bool]:
    """What the schedule under which the error is clearly less says was wrong, "" if none is, and whether that is sure.

    All are compared without guidance. The network must also follow the negative of an image next to no noise: one that
    returns the same whatever it is asked denoises its own samples perfectly, taken for their prediction.
    """
    if isinstance(denoiser.networks[0], OwnStart):  # a pipeline knows its own schedule
        return "", False
    own = error
    with suppress(NetworkError):
        own = min(error, _measured(denoiser, schedule, _samples(denoiser, schedule)).error or error)
    if own <= SOUND:
        return "", False
    best, words = min(EXPLAINED, own / CLEARLY), ""
    for why, changes in _mistakes(schedule):
        try:
            other = replace(schedule, **changes)
            samples = _samples(denoiser, other)
            found = _measured(denoiser, other, samples).error
            if 0.0 < found < best and _measured(denoiser, other, -samples, SIGNALS[-1:]).error < FOLLOWS:
                words = f"{why}. It denoises its own samples with an error of {own:.2g}, then of {found:.2g}"
                best = found
        except Exception:  # a network may refuse such times, and a schedule such a type: then that is not it
            continue
        if best < min(SOUND, own / DECISIVELY):
            break
    return words, bool(words) and best < own / DECISIVELY


def _mistakes(schedule: NoiseSchedule) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be wrong, and the fields of the schedule that would then be right."""
    own, curve = schedule.prediction_type, schedule.curve
    opposite = own[1:] if own.startswith("-") else f"-{own}"
    yield f"the sign seems wrong: the output seems to be {opposite!r}, not {own!r}", {"prediction_type": opposite}
    if isinstance(curve, ExplodingCurve):
        for unit in TIMESTEP_UNITS:
            if unit != curve.unit:
                yield f"the timestep seems to be {unit!r}, not {curve.unit!r}", {"curve": replace(curve, unit=unit)}
        yield "unit_input seems wrong", {"unit_input": not schedule.unit_input}
    else:
        yield from _clocks(schedule, opposite)
    for kind in ("epsilon", "v_prediction", "sample", "flow", "-flow"):
        if kind not in (own, opposite):
            yield f"the prediction type seems wrong: {kind!r}, not {own!r}", {"prediction_type": kind}


def _clocks(schedule: NoiseSchedule, opposite: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mistakes of the time that a table or a flow is asked at."""
    curve, scale, offset = schedule.curve, schedule.time_scale, schedule.time_offset
    turned = {"time_scale": -scale, "time_offset": offset + scale * (curve.first + max(curve.end, 0.0))}
    back = f"time seems reversed: the network wants {schedule.last:g} where the noise is, not {schedule.first:g}"
    yield back, turned
    yield f"{back}, and the output seems to be {opposite!r}", {**turned, "prediction_type": opposite}
    span = curve.first - curve.end
    factor, wanted = (1.0 / span, "[0, 1]") if abs(scale) == 1.0 else (span, f"[0, {span:g}]")
    clock = {"time_scale": scale * factor, "time_offset": offset * factor, "whole_times": False}
    yield f"the unit of time seems wrong: the network wants timesteps in {wanted}", clock
    if curve.straight:
        both = {**clock, **{name: value * factor for name, value in turned.items()}, "prediction_type": opposite}
        yield f"time seems reversed and its unit wrong: timesteps in {wanted}, and the output {opposite!r}", both
