"""Reading a `NoiseSchedule` from a diffusers scheduler or from its configuration. diffusers is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from olss_fast.errors import ScheduleError
from olss_fast.schedule.curves import FloatArray, beta_schedule, without_terminal_signal
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.text import quoted

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample", "flow_prediction": "flow"}
MOST_TIMESTEPS = 100_000  # of a training schedule: a hundred times the usual, still fast
_NEVER_NONE = ("beta_start", "beta_end", "sigma_data")
_NUMBERS = (*_NEVER_NONE, "shift", "flow_shift", "sigma_min", "sigma_max", "snr_shift_scale", "steps_offset")
FLOW_CLASSES = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF")  # beginnings of names


def schedule_from_diffusers(scheduler: object) -> NoiseSchedule:
    """See `NoiseSchedule.from_diffusers`."""
    config = _config(scheduler)
    check_config(config)
    name = str(config.get("_class_name") or type(scheduler).__name__)
    prediction = str(config.get("prediction_type", "epsilon"))
    if is_flow(name, config):
        return _flow(config, name)
    if prediction not in _PREDICTIONS:
        raise ScheduleError(f"{name} has prediction_type {prediction!r}; expected one of {', '.join(_PREDICTIONS)}")
    if name.startswith("EDM"):
        return _edm(config, name, prediction)
    if config.get("timestep_type") == "continuous":
        return _continuous(config, name, prediction)
    if config.get("trained_betas") is None and "beta_schedule" not in config:
        raise ScheduleError(
            f"{name} has neither betas nor sigmas that are understood; make the schedule with NoiseSchedule."
            "from_alphas_cumprod, .ve, .edm or .flow"
        )
    return _variance_preserving(config, _PREDICTIONS[prediction])


def is_flow(name: str, config: Mapping[str, Any]) -> bool:
    """True if a scheduler of this class and config samples x = (1 - sigma) x0 + sigma eps."""
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow or name.startswith(FLOW_CLASSES))


def check_config(config: Mapping[str, Any]) -> None:
    """ScheduleError if a config entry that defines noise levels cannot be read, for any scheduler."""
    count = config.get("num_train_timesteps", 1000)
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= MOST_TIMESTEPS:
        raise ScheduleError(
            f"num_train_timesteps is {quoted(count)}; expected a whole number from 1 to {MOST_TIMESTEPS}"
        )
    for name in _NUMBERS:
        if name in config and not _is_number(config[name], none=name not in _NEVER_NONE):
            raise ScheduleError(f"{name} is {quoted(config[name])}; expected a finite number")
    betas = config.get("trained_betas")
    try:
        np.asarray(0.0 if betas is None else betas, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"trained_betas is {quoted(betas)}; expected a list of numbers") from error


def _is_number(value: Any, *, none: bool) -> bool:
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return none and value is None
    return bool(-1e300 < value < 1e300)


def _config(scheduler: object) -> Mapping[str, Any]:
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise ScheduleError(
            f"{type(scheduler).__name__} is no diffusers scheduler; expected one, or its config as a mapping"
        )
    return config


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else float(value)


def _flow(config: Mapping[str, Any], name: str) -> NoiseSchedule:
    if config.get("use_dynamic_shifting"):
        raise ScheduleError(
            f"{name} shifts by resolution (use_dynamic_shifting); use NoiseSchedule.flow(shift=exp(mu)) with the mu of "
            "your image size"
        )
    if config.get("invert_sigmas"):
        raise ScheduleError(f"{name} runs from data to noise (invert_sigmas); only noise to data is supported")
    if (config.get("sigma_max") or 0.0) > 1.0 and not config.get("use_flow_sigmas"):
        raise ScheduleError(
            f"{name} has sigma_max {config['sigma_max']:g}, where the signal 1 - sigma of a flow is negative; "
            "olss_fast.capture takes it as x0 + sigma noise"
        )
    shift = _number(config, "flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
    return NoiseSchedule.flow(shift, int(config.get("num_train_timesteps", 1000)))


def _edm(config: Mapping[str, Any], name: str, prediction: str) -> NoiseSchedule:
    low, high = _number(config, "sigma_min", 0.002), _number(config, "sigma_max", 80.0)
    sigma_data = _number(config, "sigma_data", 0.5)
    if prediction == "epsilon":
        return NoiseSchedule.edm(low, high, sigma_data)
    if prediction == "v_prediction" and sigma_data == 1.0:  # the same preconditioning with the sign of F turned
        return NoiseSchedule.ve(low, high, prediction_type=prediction, timestep="quarter_log", unit_input=True)
    raise ScheduleError(
        f"{name} with prediction_type {prediction!r} and sigma_data {sigma_data:g} is not supported; expected epsilon, "
        "or v_prediction with sigma_data 1"
    )


def _continuous(config: Mapping[str, Any], name: str, prediction: str) -> NoiseSchedule:
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if low is None or high is None:
        raise ScheduleError(f"{name} with timestep_type 'continuous' needs sigma_min and sigma_max in its config")
    return NoiseSchedule.ve(
        float(low), float(high), prediction_type=_PREDICTIONS[prediction], timestep="quarter_log", unit_input=True
    )


def _variance_preserving(config: Mapping[str, Any], prediction: str) -> NoiseSchedule:
    betas = config.get("trained_betas")
    label = "trained betas"
    if betas is None:
        kind = str(config["beta_schedule"])
        start, end = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02)
        betas = beta_schedule(kind, int(config.get("num_train_timesteps", 1000)), start, end)
        label = kind if kind == "squaredcos_cap_v2" else f"{kind} {start:g} to {end:g}"
    alphas_cumprod: FloatArray = np.asarray(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    if (scale := config.get("snr_shift_scale")) is not None:  # CogVideoX
        alphas_cumprod = alphas_cumprod / (scale + (1.0 - scale) * alphas_cumprod)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = without_terminal_signal(alphas_cumprod)
        label += ", zero terminal SNR"
    return NoiseSchedule.from_alphas_cumprod(
        alphas_cumprod, prediction_type=prediction, label=label, leading_offset=int(_number(config, "steps_offset", 0))
    )
