"""The stand-in for a pipeline's scheduler while it is evaluated from outside (`pipeline_network`), and a check of both.

The check repeats the inputs of two of the pipeline's own steps. It runs with a copy of its own scheduler up to its
second step, and the network's latents and timestep there are then passed through the slot: the output must be the same.
It differs if a pipeline computes with its scheduler's state (StableDiffusionLatentUpscalePipeline reads `sigmas`), also
for unknown classes.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from greenlet import getcurrent
from torch import Tensor

from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler
from olss_fast.capturing.facts import steps_of
from olss_fast.errors import InputError, NetworkError
from olss_fast.schedule.noise_schedule import NoiseSchedule

QUESTIONS = 1000  # least number of timesteps for a pipeline; a call that has used them up is restarted
STEPS = 4  # for schedulers that take no more: a consistency model's own schedule is short
ENOUGH = 2


class Slot:
    """Shows the teacher's `teacher_steps` timesteps, each repeated: whatever share of them an image-to-image
    call skips (`strength`), it begins at one of the teacher's timesteps, index `begin`.
    """

    order = 1

    def __init__(self, scheduler: Any, teacher_steps: int, repeats: int | None = None) -> None:
        self._original = scheduler
        self.teacher_steps = teacher_steps
        self.repeats = repeats or max(1, math.ceil(QUESTIONS / teacher_steps))
        self.scales_noise = False
        self.schedule: NoiseSchedule | None = None
        self.begin_index: int | None = None
        self.index = 0
        self.asked_from = getcurrent()
        self.sample: Tensor | None = None

    def _class(self) -> type:
        """Pipelines that ask for their scheduler's class (`isinstance`) get the original's."""
        return type(self._original)

    __class__ = property(_class)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    # --- what pipelines call ----------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **other: Any,
    ) -> None:
        """Sets the grid of the teacher's timesteps, each repeated; `num_inference_steps` is ignored."""
        schedule = schedule_of(self._original, mu)
        times = torch.tensor(schedule.timesteps(self.teacher_steps, "trailing"), dtype=torch.float32, device="cpu")
        self.schedule, self.times, self.num_inference_steps = schedule, times, self.length
        self.timesteps = times.repeat_interleave(self.repeats).to(device)
        self.sigmas = torch.tensor(schedule.sigma(self.timesteps.cpu().numpy()), dtype=torch.float32, device="cpu")
        self._amplitude = float(schedule.start_amplitude(schedule.first) * schedule.input_scale(schedule.first))

    @property
    def init_noise_sigma(self) -> float:
        """The amplitude of the initial noise. Reading it shows that the pipeline multiplies by it."""
        self.scales_noise = True
        return self._amplitude

    @property
    def length(self) -> int:
        """Number of timesteps that the pipeline sees."""
        return self.teacher_steps * self.repeats

    @property
    def begin(self) -> int:
        """The teacher's evaluation that the pipeline begins at."""
        return math.ceil((self.begin_index or 0) / self.repeats)

    @property
    def step_index(self) -> int:
        return self.index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index
        if self.begin >= self.teacher_steps:
            raise InputError(f"the call begins at the end of the schedule (timestep {begin_index} of {self.length})")
        self.timesteps[begin_index] = self.times[self.begin]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """input_scale (alpha x0 + sigma eps) at `timesteps` (B,)."""
        if self.schedule is None:
            raise InputError("the pipeline adds noise before it has set its timesteps")
        t = timesteps.detach().double().cpu().numpy()
        scale = self.schedule.input_scale(t)
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = (
            torch.as_tensor(scale * level, device="cpu").to(original_samples).view(shape)
            for level in (self.schedule.alpha(t), self.schedule.sigma(t))
        )
        return alpha * original_samples + sigma * noise.to(original_samples)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self.add_noise(sample, noise, timestep)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **how: Any) -> Any:
        """Passes `model_output` to the caller outside, waits for the next (x, t), and returns x as the next latents."""
        if self.sample is None:
            self.index = self._place_of(timestep)
        elif float(timestep) != float(self.timesteps[self.index]):
            raise InputError(
                f"the pipeline asked its network at timestep {float(timestep):g} instead of "
                f"{float(self.timesteps[self.index]):g}: it copies its timesteps, and cannot be tuned from outside"
            )
        if model_output.shape != sample.shape:
            raise NetworkError(
                f"the pipeline hands its scheduler an output of shape {tuple(model_output.shape)} for latents of shape "
                f"{tuple(sample.shape)}: expected the same shape (networks that predict the variance cannot be tuned)"
            )
        self.sample = sample
        x, t = self.asked_from.switch(model_output)
        self.index += 1
        if self.index < self.length:  # beyond it the call ends, and is begun again
            self.timesteps[self.index] = t
        x = x.to(sample.dtype)
        if how.get("return_dict") is False:
            return x, x  # consistency models' pipelines take two
        return SchedulerOutput(prev_sample=x)

    def _place_of(self, timestep: Any) -> int:
        """The index of the first timestep in `timesteps`, of which it is a view."""
        if self.begin_index is not None:
            return self.begin_index
        if isinstance(timestep, Tensor) and timestep.data_ptr() != self.timesteps[0].data_ptr():
            raise InputError("the pipeline begins inside its timesteps without set_begin_index: it cannot be tuned")
        return 0


def schedule_of(scheduler: Any, mu: float | None = None) -> NoiseSchedule:
    """The noise schedule of a scheduler; `mu` is the shift of flow matching that depends on the image's size."""
    config = dict(scheduler.config)
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise InputError("the scheduler shifts by resolution (use_dynamic_shifting), but its pipeline gave no mu")
        linear = config.get("time_shift_type") == "linear"
        config |= {"use_dynamic_shifting": False, "shift": float(mu) if linear else math.exp(mu)}
    return NoiseSchedule.from_diffusers({"_class_name": type(scheduler).__name__, **config})


# --- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A network input and its timestep, in the network's unit, with its output after guidance."""

    x: Tensor
    timestep: float
    output: Tensor


class _Enough(BaseException):
    """Ends a call; no `except Exception` of a pipeline catches it."""


def questions(
    pipe: Any, scheduler: Any, arguments: Callable[[int], Mapping[str, Any]], steps: int, name: str
) -> list[Question]:
    """The first two questions of the pipeline with its own `scheduler`; fewer if its run is shorter.

    arguments: of the call, by its number of steps. InputError if the call fails.
    """
    planned = [steps_of(plan) for plan in scheduler.plans] if isinstance(scheduler, PlanScheduler) else None
    for count in planned or dict.fromkeys([steps, min(steps, STEPS)]):  # a PlanScheduler takes only those of its plans
        asked: list[Question] = []
        pipe.scheduler = watched(scheduler, asked)
        try:
            pipe(**arguments(count))
        except _Enough:
            pass
        except Exception as error:  # the pipeline or its scheduler may refuse these steps with any error
            problem = error
            continue
        return asked
    raise InputError(
        f"{name} of {type(pipe).__name__} failed with its own {type(scheduler).__name__}: "
        f"{type(problem).__name__}: {problem}"
    ) from problem


def watched(scheduler: Any, asked: list[Question]) -> Any:
    """A copy of the scheduler whose `step` records the question it answers, and ends the call in time."""
    copied = copy.deepcopy(scheduler)
    step, scale = copied.step, getattr(copied, "scale_model_input", None)

    @functools.wraps(step)
    def noting(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **how: Any) -> Any:
        x = sample if scale is None else scale(sample, timestep)
        time = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        asked.append(Question(x.clone(), float(time), model_output.clone()))
        if len(asked) == ENOUGH:
            raise _Enough
        return step(model_output, timestep, sample, *args, **how)

    copied.step = noting
    return copied


def check_answer(question: Question, answer: Tensor, tolerance: float, pipeline: str) -> None:
    """InputError unless the pipeline's answer from outside equals that in its own loop."""
    expected = question.output.double()
    difference = float((answer.double() - expected).norm() / max(float(expected.norm()), 1e-30))
    if not difference <= tolerance:
        raise InputError(
            f"{pipeline} asks its network something else in its own loop than from outside (its answers at timestep "
            f"{question.timestep:g} differ by {difference:.3g}): it computes with what its scheduler keeps, or with "
            "the number of the step. It cannot be tuned; a captured plan may run in it"
        )
