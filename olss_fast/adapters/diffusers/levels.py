"""A pipeline's latents between two steps: the scheduler's own state, of which the network input is a multiple.

Row k of a plan is the input of evaluation k. Schedulers that scale their input (EulerDiscreteScheduler and similar)
return x / scale instead, with signal level 1. So a split run can continue with the scheduler itself, and
image-to-image, callbacks and `init_noise_sigma` get what they expect.

A captured plan has the scales and the `add_noise` levels of its scheduler. Any other plan in the slot of a scheduler
that scales its input has states of signal 1, by the levels of its rows.

`add_noise` and `sigmas` look levels up on the device, in a table of (timestep, alpha, sigma) in the unit of the states:
the plan's own timesteps, and between them the training schedule. Linear interpolation is exact at the table's own
timesteps; for a network trained on betas it contains them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from olss_fast.capturing.facts import captured_facts, name_of, scheduler_class
from olss_fast.errors import InputError, PlanError
from olss_fast.plan.plan import Floats, Integers, Plan
from olss_fast.plan.point_mass import exact_output_of
from olss_fast.schedule.from_diffusers import check_config
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.device import Moved
from olss_fast.support.text import quoted

if TYPE_CHECKING:
    from olss_fast.executors.stepwise import Layout

SCALING = {
    "CMStochasticIterativeScheduler", "DPMSolverSDEScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
}  # fmt: skip
"""Classes whose `scale_model_input` divides by the state's standard deviation; their states have signal 1."""

LEAST_SIGNAL = 2.0**-12  # if a schedule ends without signal, diffusers' schedulers use sigma = 4096


def scales_of(plan: Plan, network: Mapping[str, Any] | None) -> Floats:
    """(S,) network input / state, for a plan in the slot of a scheduler with the config `network`.

    InputError for unreadable metadata of a captured plan, which has those of its scheduler.
    """
    if facts := captured_facts(plan):
        scales = _numbers(plan, "scales", facts.scales, (plan.nfe,))
        if scales is not None and not np.all(scales > 0.0):
            raise InputError(f"the scales of {name_of(plan)} are {quoted(facts.scales)}; expected positive numbers")
        return np.ones(plan.nfe) if scales is None else scales
    scaling = network is not None and network.get("_class_name") in SCALING
    return np.maximum(plan.alphas[:-1], LEAST_SIGNAL) if scaling else np.ones(plan.nfe)


def untimed_amplitude(plan: Plan) -> float | None:
    """`init_noise_sigma` of the scheduler that a plan was captured from, before its timesteps are set.

    None if the plan was not captured, diffusers has no such class, or the class does not define it.
    """
    facts = captured_facts(plan)
    if facts is None or (kind := scheduler_class(facts.class_name)) is None:
        return None
    check_config(facts.config)
    try:
        value = getattr(kind.from_config(facts.config), "init_noise_sigma", None)
    except Exception as error:  # any error of diffusers, from a config that may have been altered
        raise InputError(f"no {facts.class_name} can be made of the config in {name_of(plan)}: {error}") from error
    return None if value is None else float(value)


class StepOutput(SchedulerOutput):
    """The output of a step. `pred_original_sample` is computed when read."""

    def __init__(self, prev_sample: Tensor, of_step: tuple[Layout, int, Tensor, Tensor] | None = None) -> None:
        super().__init__(prev_sample=prev_sample)
        self.of_step = of_step  # layout, row, sample, model output; None in copies, which diffusers makes of fields

    @property
    def pred_original_sample(self) -> Tensor:
        """The clean image m that the output predicts: with x = alpha m + sigma eps and f = a m + b eps,
        m = (sigma f - b x) / (sigma a - b alpha). AttributeError if the prediction type is unknown or there is no
        signal."""
        if self.of_step is None:
            raise AttributeError("pred_original_sample: a copy of a step's output does not have it")
        layout, row, sample, output = self.of_step
        plan, scale = layout.plan, float(layout.scales[row])
        alpha, sigma = float(plan.alphas[row]), float(plan.sigmas[row])
        try:
            a, b = exact_output_of(plan)(alpha, sigma)
            weight = 1.0 / (sigma * a - b * alpha)
        except (PlanError, ZeroDivisionError) as error:
            raise AttributeError(f"pred_original_sample: {error}") from error
        f = output[:, : sample.shape[1]] if output.shape != sample.shape else output  # the rest is a variance
        return (sigma * weight * f - b * weight * scale * sample).to(sample.dtype)


def _numbers(plan: Plan, name: str, value: Any, shape: tuple[int, ...]) -> Floats | None:
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


POINTS = 1001  # of a training schedule that is not a table itself


@dataclass(frozen=True)
class NoiseLevels:
    """Of the states of a plan whose run begins at index `begin` of its timesteps.

    alphas, sigmas: (S+1,) of `add_noise` to begin at each evaluation. by_index: after `set_begin_index`, `add_noise`
    uses the index of the run, not the timestep passed to it. table: (3, n), timesteps rising, alphas, sigmas.
    complete: it covers the whole training schedule.
    """

    plan: Plan
    begin: int
    alphas: Floats
    sigmas: Floats
    by_index: bool
    table: Floats
    complete: bool
    _on_device: Moved = field(default_factory=Moved)

    def table_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The rows of `table`, float32, moved once."""
        return self._on_device.of(device, lambda: self._moved(device))

    def _moved(self, device: torch.device) -> tuple[Tensor, ...]:
        with torch.inference_mode(False):
            return torch.tensor(self.table.tolist(), dtype=torch.float32, device=device).unbind(0)

    def at(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (float32) at (B,) timesteps, shaped to multiply `like` (B, …).

        InputError for other timesteps (checked on the CPU only) if only the plan's own are known.
        """
        try:
            times = torch.as_tensor(timesteps, dtype=torch.float32, device=like.device).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the timesteps of add_noise are {quoted(timesteps)}; expected a number, or one for each sample"
            ) from error
        grid, alphas, sigmas = self.table_on(like.device)
        if not self.complete and times.device.type == "cpu" and not torch.isin(times, grid).all():
            raise InputError(
                f"the noise level at timestep {times.tolist()[:4]} is not known, only those of the plan, "
                f"{grid.tolist()[:4]}…; make it PlanScheduler(plan, scheduler=…) with the network's own scheduler"
            )
        left = (torch.searchsorted(grid, times, right=True) - 1).clamp(0, max(0, len(grid) - 2))
        right = (left + 1).clamp(max=len(grid) - 1)
        start = grid.gather(0, left)
        share = ((times - start) / (grid.gather(0, right) - start).clamp(min=1e-30)).clamp(0.0, 1.0)
        shape = (-1, *([1] * (like.ndim - 1)))
        alpha, sigma = (
            torch.lerp(levels.gather(0, left), levels.gather(0, right), share).view(shape)
            for levels in (alphas, sigmas)
        )
        return alpha, sigma

    def at_index(self, index: int | None) -> tuple[float, float] | None:
        """alpha and sigma at an index of `timesteps`; None if the timestep decides."""
        if index is None or not self.by_index or index < self.begin:
            return None
        row = min(index - self.begin, self.plan.nfe)
        return float(self.alphas[row]), float(self.sigmas[row])

    def ratios(self) -> Tensor:
        """(S+1,) float32 on the CPU, as in diffusers: sigma / alpha of every row, or sigma of flow matching."""
        return torch.tensor(self._ratios, dtype=torch.float32, device="cpu")

    @cached_property
    def _ratios(self) -> list[float]:
        alphas, sigmas = self.plan.alphas, self.plan.sigmas
        flow = np.allclose(alphas + sigmas, 1.0)
        with np.errstate(divide="ignore"):
            ratios: list[float] = (sigmas if flow else sigmas / alphas).tolist()
        return ratios


def noise_levels(plan: Plan, begin: int, scales: Floats, schedule: NoiseSchedule | None) -> NoiseLevels:
    """Levels at the plan's own timesteps, and of the training schedule if known; for states of these input scales."""
    facts, ends = captured_facts(plan), np.append(scales, 1.0)
    noised = _numbers(plan, "noised", facts.noised, (plan.nfe + 1, 2)) if facts else None
    alphas, sigmas = (plan.alphas / ends, plan.sigmas / ends) if noised is None else noised.T
    times = plan.timesteps.astype(np.float32).astype(np.float64)
    own, places = _second_places(times)
    table = np.stack([own, alphas[places], sigmas[places]])
    if schedule is not None:
        trained = _trained(schedule, bool(np.any(scales != 1.0)))
        table = np.concatenate([table, trained[:, ~np.isin(trained[0], own)]], axis=1)
    by_index, table = bool(facts and facts.noised_by_index), table[:, table[0].argsort()]
    return NoiseLevels(plan, begin, alphas, sigmas, by_index, table, complete=schedule is not None)


def _second_places(times: Floats) -> tuple[Floats, Integers]:
    """Distinct times, rising, and their indices: of equal ones the second, as in diffusers' lookup."""
    own, first = np.unique(times, return_index=True)
    second = np.minimum(first + 1, times.size - 1)
    return own, np.where(times[second] == own, second, first)


def _trained(schedule: NoiseSchedule, scaled: bool) -> Floats:
    """(3, n): timesteps, alphas and sigmas of the training schedule; for states of signal 1 if they are scaled."""
    times = np.linspace(schedule.last, schedule.first, POINTS)
    if schedule.first == np.round(schedule.first) and schedule.first < 1e6:
        times = np.arange(np.ceil(schedule.last), schedule.first + 1.0)
    alphas, sigmas, _ = schedule.levels(times)
    unit = np.maximum(alphas, LEAST_SIGNAL) if scaled else 1.0 / schedule.input_scale(times)
    return np.stack([times.astype(np.float32).astype(np.float64), alphas / unit, sigmas / unit])
