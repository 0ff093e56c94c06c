"""The stand-in for a pipeline's scheduler while it is evaluated from outside; see `pipeline_network`."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from greenlet import getcurrent
from torch import Tensor

from olss_fast.errors import InputError, NetworkError
from olss_fast.schedule.noise_schedule import NoiseSchedule

QUESTIONS = 1000  # least number of timesteps for a pipeline; a call that has used them up is restarted


class Slot:
    """The stand-in for a pipeline's scheduler while it is evaluated from outside.

    The pipeline sees the teacher's `teacher_steps` timesteps, each repeated: whatever share of them an image-to-image
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
