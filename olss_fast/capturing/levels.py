"""Signal and noise level of every row of a captured plan, and its prediction type.

A row that begins a step has the levels to which the scheduler itself noises an image at that step (its add_noise or
scale_noise, times the factor of scale_model_input): an image-to-image run starts exactly there. Evaluations inside a
step, and schedulers without such a method, use the levels of `NoiseSchedule` at the timestep. A flow with sigmas above
1 (Cosmos 2) has no signal 1 - sigma there; it is read as x = x0 + sigma eps, whose steps it takes. Without a
`NoiseSchedule`, the scheduler's tables are read: `alphas_cumprod` at the timestep, or `sigmas` at the step, as flow
matching if all are at most 1 and variance exploding otherwise. The sample has the levels that the rows reach on
point-mass data, whose exact network outputs are known (see `plan.point_mass`). If the config has no prediction type,
it is the only one under which every row has its levels, or left open.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from olss_fast.capturing.driver import Driver
from olss_fast.capturing.facts import known_schedule
from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Floats, Plan
from olss_fast.plan.point_mass import EXACT_OUTPUTS, ExactOutput, edm_output, levels_of_rows
from olss_fast.schedule.from_diffusers import is_flow
from olss_fast.schedule.noise_schedule import NoiseSchedule

Pair = tuple[float, float]
Exact = Callable[[Any, int, float, float, float], Pair]
"""(scheduler, index, alpha and sigma of the network input, input scale) -> (signal, noise) of the output."""

CONSISTENT = 1e-3  # of a row's levels on point-mass data: above the error of float32 tables at small signal levels
NEARLY_CLEAN = 0.1  # schedulers that keep their lowest noise level in the sample leave about 0.03


@dataclass(frozen=True)
class Levels:
    """alphas, sigmas (S,) of the network inputs, the exact point-mass output of each, and facts for the metadata.

    No outputs: the prediction type is unknown, and the sample is assumed clean.
    """

    alphas: Floats
    sigmas: Floats
    outputs: list[Pair] | None
    metadata: Mapping[str, str] = field(default_factory=dict)


def levels_of(driver: Driver, scales: list[float], rows: Floats) -> Levels:
    """See the module's docstring. ScheduleError if the levels are unknown."""
    schedule = known_schedule(driver.scheduler)
    indices = range(driver.begin, len(driver.timesteps))
    pairs = np.array([_input_levels(driver, schedule, i, scale) for i, scale in zip(indices, scales, strict=True)])
    if pairs[:, 0].min() < -CONSISTENT:
        return _exploding(driver, pairs[:, 1], rows)
    alphas, sigmas = np.maximum(pairs, 0.0).T  # cos(1.5708) is -4e-6
    if driver.config.get("invert_sigmas"):  # time runs up to the data: its noise level is the signal's
        alphas, sigmas = sigmas, alphas
    metadata = _metadata(driver, schedule)
    exact = _exact_output(driver, metadata.get("prediction_type"))
    if exact is None:
        return _inferred(rows, alphas, sigmas)
    evaluations = zip(indices, alphas.tolist(), sigmas.tolist(), scales, strict=True)
    return Levels(alphas, sigmas, [exact(driver.scheduler, *each) for each in evaluations], metadata)


def noising(driver: Driver, scales: list[float], plan: Plan) -> dict[str, Any]:
    """How the scheduler's states and its add_noise differ from rows and levels; only what differs.

    Keys `scales`, `noised` and `noised_by_index`, as in `CapturedFacts`.
    """
    facts: dict[str, Any] = {} if all(scale == 1.0 for scale in scales) else {"scales": scales}
    indices = range(driver.begin, len(driver.timesteps))
    noised = [pair for i in indices if (pair := _noised(driver, i)) is not None]
    if len(noised) < driver.nfe:
        return facts
    levels = np.stack([plan.alphas, plan.sigmas], axis=1) / np.append(scales, 1.0)[:, None]
    end: Pair | None = None
    if driver.nfe > 1 and _noised(driver, driver.begin, indices[-1]) == noised[0] != noised[-1]:
        facts["noised_by_index"] = True
        with suppress(IndexError):  # the scheduler's tables may end before
            end = _noised(driver, len(driver.timesteps), indices[-1])
    noised.append(end or (float(levels[-1, 0]), float(levels[-1, 1])))
    same = np.allclose(noised, levels, rtol=1e-7, atol=1e-7)  # float32 tables
    return facts if same else facts | {"noised": noised}


def check_falling(driver: Driver, levels: Levels) -> None:
    """InputError if noise over signal does not fall at every step, as custom timesteps or sigmas may have it."""
    times = driver.timesteps[driver.begin :: driver.order].tolist()
    signal, noise = levels.alphas[:: driver.order], levels.sigmas[:: driver.order]
    bad = np.flatnonzero(noise[1:] * signal[:-1] >= noise[:-1] * signal[1:] * (1.0 - 1e-9))  # equal up to rounding
    if bad.size:
        i = int(bad[0])
        raise InputError(
            f"the noise of {driver.name} does not fall between steps {i} and {i + 1}, at timesteps {times[i]:g} and "
            f"{times[i + 1]:g}; expected timesteps or sigmas along which it falls at every step"
        )


def with_final_levels(plan: Plan, levels: Levels, name: str, *, begun: bool) -> Plan:
    """The plan with the levels that its last row reaches. ScheduleError if it is no less noisy than the first.

    `begun`: the run starts at a later timestep, and may end as noisy as it starts.
    """
    if levels.outputs is None:
        return plan
    signal, noise = np.maximum(levels_of_rows(plan, levels.outputs)[-1], 0.0).tolist()  # -1e-7 is rounding
    # Started at its last timesteps, a scheduler may have nothing left to do: DDIM with set_alpha_to_one=False.
    risen, fallen = noise * plan.alphas[0], signal * plan.sigmas[0]
    if risen > fallen * (1.0 + CONSISTENT) or (risen >= fallen and not begun):
        raise ScheduleError(
            f"{name} does not run from noise to data: its start has signal {plan.alphas[0]:.3g} and noise "
            f"{plan.sigmas[0]:.3g}, its sample signal {signal:.3g} and noise {noise:.3g}; take a scheduler that samples"
        )
    return plan.replace(alphas=[*plan.alphas[:-1], signal], sigmas=[*plan.sigmas[:-1], noise])


# --- levels of the network inputs -------------------------------------------------------------------------------------


def _input_levels(driver: Driver, schedule: NoiseSchedule | None, index: int, scale: float) -> Pair:
    timestep = float(driver.timesteps[index])
    if index % driver.order and schedule is not None:
        return _scheduled(schedule, timestep)
    betas = driver.name == "SASolverScheduler" and driver.config.get("use_flow_sigmas")  # which its add_noise uses
    state = None if betas else _noised(driver, index)
    if state is None and driver.name in _LEVELS_OF_CLASS:
        state = _LEVELS_OF_CLASS[driver.name](driver.scheduler, index)
    if state is None and schedule is not None:
        return _scheduled(schedule, timestep)
    if (state := state or _from_tables(driver, index)) is None:
        raise ScheduleError(
            f"the noise levels of {driver.name} are not known: it has none of add_noise, scale_noise, alphas_cumprod "
            "for its timesteps and falling sigmas for its steps, and its config has no betas or sigmas that are "
            "understood; give it add_noise(original_samples, noise, timesteps)"
        )
    alpha, sigma = state
    return scale * alpha, scale * sigma


def _scheduled(schedule: NoiseSchedule, timestep: float) -> Pair:
    low, high = sorted((schedule.first, schedule.last))
    time = min(max(timestep, low), high)  # timesteps are float32: 1000.0001
    scale = float(schedule.input_scale(time))
    return scale * float(schedule.alpha(time)), scale * float(schedule.sigma(time))


def _noised(driver: Driver, index: int, told: int | None = None) -> Pair | None:
    """(alpha, sigma) with which the scheduler mixes image and noise at a timestep; None if it has no such method.

    `told`: the index of the timestep passed to it, if not `index`, where the run begins.
    """
    scheduler = copy.copy(driver.scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    image, noise = torch.eye(2, dtype=torch.float64).view(2, 1, 1, 1, 2)
    place = index if told is None else told
    timestep = driver.timesteps[place : place + 1]
    if hasattr(scheduler, "add_noise"):
        mixed = scheduler.add_noise(image, noise, timestep)
    elif hasattr(scheduler, "scale_noise"):
        mixed = scheduler.scale_noise(sample=image, timestep=timestep, noise=noise)
    else:
        return None
    alpha, sigma = mixed.flatten().tolist()
    return alpha, sigma


def _from_tables(driver: Driver, index: int) -> Pair | None:
    """(alpha, sigma) from the scheduler's alphas_cumprod or sigmas; None if none fit."""
    timestep = float(driver.timesteps[index])
    signals = _table(driver.scheduler, "alphas_cumprod")
    if timestep.is_integer() and 0 <= timestep < signals.size and np.all((signals >= 0) & (signals <= 1)):
        signal = float(signals[int(timestep)])
        return math.sqrt(signal), math.sqrt(1.0 - signal)
    sigmas = _table(driver.scheduler, "sigmas")
    if sigmas.size not in (len(driver.timesteps), len(driver.timesteps) + 1) or np.any(sigmas < 0):
        return None
    if np.any(np.diff(sigmas) > 0):
        return None
    sigma = float(sigmas[index])
    return (1.0 if sigmas[0] > 1 else 1.0 - sigma), sigma


def _table(scheduler: Any, name: str) -> Floats:
    """(N,) finite numbers of an attribute; empty if there are none."""
    try:
        table = np.asarray(getattr(scheduler, name, ()), dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        return np.empty(0)
    return table if table.ndim == 1 and np.all(np.isfinite(table)) else np.empty(0)


def _ipndm(scheduler: Any, index: int) -> Pair:
    return float(scheduler.alphas[index]), float(scheduler.betas[index])


def _trigonometric(scheduler: Any, index: int) -> Pair:
    # This noise has the data's standard deviation, by which pipelines multiply the initial noise.
    timestep, spread = float(scheduler.timesteps[index]), float(scheduler.config.sigma_data)
    return math.cos(timestep), spread * math.sin(timestep)


def _consistency_decoder(scheduler: Any, index: int) -> Pair:
    timestep = scheduler.timesteps[index]
    return float(scheduler.sqrt_alphas_cumprod[timestep]), float(scheduler.sqrt_one_minus_alphas_cumprod[timestep])


_LEVELS_OF_CLASS: dict[str, Callable[[Any, int], Pair]] = {
    "IPNDMScheduler": _ipndm,
    "SCMScheduler": _trigonometric,
    "ConsistencyDecoderScheduler": _consistency_decoder,
}

# --- prediction type --------------------------------------------------------------------------------------------------

_PREDICTIONS = {
    "IPNDMScheduler": ("v_prediction", "diffusers' IPNDM: noise level sin^2"),
    "DDPMWuerstchenScheduler": ("epsilon", "cosine in continuous time"),
}


def _metadata(driver: Driver, schedule: NoiseSchedule | None) -> dict[str, str]:
    """prediction_type and schedule, as in `NoiseSchedule.metadata`; without those that have no name here."""
    name, config = driver.name, driver.config
    if schedule is not None:
        return schedule.metadata()
    if name in _PREDICTIONS:
        prediction, text = _PREDICTIONS[name]
        return {"prediction_type": prediction, "schedule": f"{text}, {prediction}"}
    if is_flow(name, config) and not config.get("invert_sigmas"):
        count = config.get("num_train_timesteps", 1000)
        return {"prediction_type": "flow", "schedule": f"flow matching, {count} timesteps, flow"}
    prediction = str(config.get("prediction_type"))
    return {"prediction_type": prediction} if prediction in EXACT_OUTPUTS and not name.startswith("EDM") else {}


def _exploding(driver: Driver, sigmas: Floats, rows: Floats) -> Levels:
    """Levels of the steps x + (sigma' - sigma) f with sigma above 1: x = x0 + sigma eps, f = eps.

    ScheduleError for other rows, such as those that add noise again at signal 1 - sigma.
    """
    alphas, outputs = np.ones_like(sigmas), [EXACT_OUTPUTS["epsilon"](1.0, sigma) for sigma in sigmas.tolist()]
    if (_errors(rows, alphas, sigmas, outputs)[:-1] > CONSISTENT * np.maximum(sigmas, 1.0)).any():
        raise ScheduleError(
            f"{driver.name} begins at sigma {sigmas[0]:g}, where the signal 1 - sigma of a flow is negative, and its "
            "steps are not those of x0 + sigma noise either; take sigmas from 0 to 1"
        )
    schedule = f"flow beyond sigma 1, sigma up to {sigmas[0]:g}, epsilon"
    return Levels(alphas, sigmas, outputs, {"prediction_type": "epsilon", "schedule": schedule})


def _inferred(rows: Floats, alphas: Floats, sigmas: Floats) -> Levels:
    """The one prediction under which the rows have their levels on point-mass data, and end nearly clean."""
    fitting: dict[str, list[Pair]] = {}
    for prediction, exact in EXACT_OUTPUTS.items():
        outputs = [exact(*levels) for levels in zip(alphas.tolist(), sigmas.tolist(), strict=True)]
        errors = _errors(rows, alphas, sigmas, outputs)
        if errors[:-1].max() <= CONSISTENT and errors[-1] <= NEARLY_CLEAN:
            fitting[prediction] = outputs
    if len(fitting) != 1:
        return Levels(alphas, sigmas, None)
    ((prediction, outputs),) = fitting.items()
    return Levels(alphas, sigmas, outputs, {"prediction_type": prediction})


def _errors(rows: Floats, alphas: Floats, sigmas: Floats, outputs: list[Pair]) -> Floats:
    """(S+1,) distance of the rows' levels on point-mass data from the given ones, and of the sample from clean."""
    levels = np.column_stack([np.append(alphas, 1.0), np.append(sigmas, 0.0)])
    plan = Plan(timesteps=np.zeros_like(alphas), rows=rows, alphas=levels[:, 0], sigmas=levels[:, 1])
    distances: Floats = np.abs(levels_of_rows(plan, outputs) - levels).max(axis=1)
    return distances


def _exact_output(driver: Driver, prediction: str | None) -> Exact | None:
    """The exact point-mass output of an evaluation; None if the prediction type is unknown."""
    if prediction is not None:
        known = EXACT_OUTPUTS.get(prediction) or _edm(driver)
        return lambda _, __, alpha, sigma, ___: known(alpha, sigma)
    if driver.name == "MiniMaxH3Scheduler" or driver.config.get("invert_sigmas"):
        return lambda *_: (1.0, -1.0)  # the velocity toward the data
    if driver.name.startswith("EDM"):  # v_prediction here is F with its sign flipped
        flipped = _edm(driver)
        return lambda _, __, *levels: tuple(-part for part in flipped(*levels[:2]))
    return _OUTPUTS_OF_CLASS.get(driver.name)


def _edm(driver: Driver) -> ExactOutput:
    return edm_output(float(driver.config.get("sigma_data", 0.5)))


def _trigonometric_output(scheduler: Any, index: int, *_: float) -> Pair:
    """x0 = cos(t) x - sin(t) f."""
    timestep = float(scheduler.timesteps[index])
    return -math.sin(timestep), float(scheduler.config.sigma_data) * math.cos(timestep)


def _boundary_output(scheduler: Any, index: int, *levels: float) -> Pair:
    return _consistency(scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[index]), *levels)


def _decoder_output(scheduler: Any, index: int, *levels: float) -> Pair:
    timestep = scheduler.timesteps[index]
    return _consistency((scheduler.c_skip[timestep], scheduler.c_out[timestep]), *levels)


def _consistency(boundary: Sequence[Any], alpha: float, sigma: float, scale: float) -> Pair:
    """f = (m - c_skip x) / c_out of a consistency model (Song et al. 2023, eq. 5); x = alpha m + sigma eps."""
    c_skip, c_out = map(float, boundary)
    if c_out == 0.0:  # at the lowest noise level the output is not used
        return 0.0, 0.0
    return (1.0 - c_skip * alpha / scale) / c_out, -c_skip * sigma / scale / c_out


_OUTPUTS_OF_CLASS: dict[str, Exact] = {
    "CMStochasticIterativeScheduler": _boundary_output,
    "ConsistencyDecoderScheduler": _decoder_output,
    "SCMScheduler": _trigonometric_output,
}
