"""A diffusers pipeline as a network: ask it at any latents and any timestep, with all of its conditioning and guidance.

Each call of the pipeline runs in a greenlet of its own, up to the scheduler's first step and no further. What stands in
the scheduler slot meanwhile hands out the model output it was given and waits; asked for (x, t) it writes t into the
tensor of timesteps that the pipeline iterates over, returns x as the next latents, and so gets the model output there.
Prompts are encoded, images are prepared once a call, and every question costs one evaluation of the network, whatever
the class of the pipeline. Nothing is decoded: a call never comes to its end, it is closed where it waits.

Latents are network inputs here, as everywhere in a Plan: `scale_model_input` is the identity.
"""

from __future__ import annotations

import contextvars
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from olss_fast.errors import InputError, NetworkError, OlssError
from olss_fast.noise_schedule import NoiseSchedule
from olss_fast.plan import Plan

QUESTIONS = 1000  # timesteps a pipeline is given at least; a call that has used them up is begun again
SAME_ANSWER = 1e-3  # of the norm: more than two runs of the same kernels differ by
OWN = ("num_inference_steps", "timesteps", "sigmas")  # arguments of a call that are ours to choose


class Slot:
    """What stands in the scheduler slot of a pipeline while it is asked from outside.

    `teacher_steps` T evaluation times of the schedule, each repeated, make the grid that the pipeline sees: so whatever
    share of it an image-to-image call skips (`strength`), it begins at a time of the teacher, number `begin`.
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
        schedule = schedule_of(self._original, mu)
        times = torch.as_tensor(schedule.timesteps(self.teacher_steps, "trailing"), dtype=torch.float32)
        self.schedule, self.times, self.num_inference_steps = schedule, times, self.length
        self.timesteps = times.repeat_interleave(self.repeats).to(device)
        self.sigmas = torch.as_tensor(schedule.sigma(self.timesteps.cpu().numpy()), dtype=torch.float32)
        self._amplitude = float(schedule.start_amplitude(schedule.first) * schedule.input_scale(schedule.first))

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by. That it was read says that the pipeline does so."""
        self.scales_noise = True
        return self._amplitude

    @property
    def length(self) -> int:
        """Timesteps that the pipeline is given."""
        return self.teacher_steps * self.repeats

    @property
    def begin(self) -> int:
        """At which of the teacher's evaluations the pipeline begins."""
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
            torch.as_tensor(scale * level).to(original_samples).view(shape)
            for level in (self.schedule.alpha(t), self.schedule.sigma(t))
        )
        return alpha * original_samples + sigma * noise.to(original_samples)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self.add_noise(sample, noise, timestep)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **how: Any) -> Any:
        """Hands `model_output` to who asked, waits for the next question, and returns it as the next latents."""
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
        return (x, x) if how.get("return_dict") is False else Answer(x)  # consistency models' pipelines take two

    def _place_of(self, timestep: Any) -> int:
        """The index of the first timestep: where it lies in `timesteps`, of which it is a view."""
        if self.begin_index is not None:
            return self.begin_index
        if isinstance(timestep, Tensor) and timestep.data_ptr() != self.timesteps[0].data_ptr():
            raise InputError("the pipeline begins inside its timesteps without set_begin_index: it cannot be tuned")
        return 0


class Answer:
    """What diffusers' schedulers return: an object with `prev_sample`."""

    def __init__(self, prev_sample: Tensor) -> None:
        self.prev_sample = prev_sample

    def __getitem__(self, index: int) -> Tensor:
        return (self.prev_sample,)[index]


def schedule_of(scheduler: Any, mu: float | None = None) -> NoiseSchedule:
    """The noise schedule of a scheduler; `mu` is the shift of flow matching that depends on the image's size."""
    config = dict(scheduler.config)
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise InputError("the scheduler shifts by resolution (use_dynamic_shifting), but its pipeline gave no mu")
        linear = config.get("time_shift_type") == "linear"
        config |= {"use_dynamic_shifting": False, "shift": float(mu) if linear else math.exp(mu)}
    return NoiseSchedule.from_diffusers({"_class_name": type(scheduler).__name__, **config})


class Session:
    """One call of a pipeline, suspended inside the scheduler's step."""

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        name: str,
        scheduler: Any,
        teacher_steps: int,
        repeats: int | None = None,
    ) -> None:
        self.pipe, self.call, self.name = pipe, call, name
        self.scheduler, self.teacher_steps, self.repeats = scheduler, teacher_steps, repeats
        self.run: greenlet | None = None
        self.asked = 0  # evaluations of the whole call
        self._open()

    def _open(self) -> None:
        """Runs the call up to its first output."""
        self.slot = Slot(self.scheduler, self.teacher_steps, self.repeats)
        self.attributes = {**vars(self.pipe), "scheduler": self.slot}
        arguments = {**self.call, "num_inference_steps": self.slot.length}
        if "generator" in arguments:
            arguments["generator"] = _copies(arguments["generator"])
        self.run = greenlet(lambda: self.pipe(**arguments))
        self.run.gr_context = contextvars.copy_context()
        try:
            self.output = self._switch()
        except (OlssError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the pipeline says to these arguments
            raise InputError(
                f"{self.name} of {type(self.pipe).__name__} failed: {type(error).__name__}: {error}"
            ) from error
        if self.slot.sample is None:
            raise InputError(f"{self.name} of {type(self.pipe).__name__} never came to a step of its scheduler")
        self.start = self.slot.sample
        self.asked += 1

    def _switch(self, *question: Any) -> Tensor:
        """Goes on in the pipeline, with the attributes it had when it was left: calls share the object."""
        assert self.run is not None
        outside = dict(vars(self.pipe))
        _set_attributes(self.pipe, self.attributes)
        try:
            self.slot.asked_from = getcurrent()
            output: Tensor = self.run.switch(*question)
            return output
        finally:
            self.attributes = dict(vars(self.pipe))
            _set_attributes(self.pipe, outside)

    def ask(self, x: Tensor, timestep: float) -> Tensor:
        """The model output, after guidance, for latents x at `timestep`."""
        if self.slot.index + 1 >= self.slot.length:
            self.close()
            self._open()
        output = self._switch((x, timestep))
        self.asked += 1
        if self.run is None or self.run.dead:
            raise NetworkError(f"{self.name} of {type(self.pipe).__name__} ended after {self.slot.index} evaluations")
        return output

    def close(self) -> None:
        if self.run is not None and not self.run.dead:
            outside = dict(vars(self.pipe))
            self.run.throw()  # GreenletExit, which no `except Exception` of a pipeline catches
            _set_attributes(self.pipe, outside)
        self.run = None


def _set_attributes(pipe: Any, attributes: Mapping[str, Any]) -> None:
    own = vars(pipe)
    for name in own.keys() - attributes.keys():
        del own[name]
    own.update(attributes)


def _copies(generator: Any) -> Any:
    """Generators in the same state, so that the caller's stay where they are."""
    if isinstance(generator, (list, tuple)):
        return [_copies(each) for each in generator]
    if not isinstance(generator, torch.Generator):
        return generator
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


class PipelineNetwork:
    """`network(x, timestep, sample=...) -> output` over all calls of a pipeline; `sample` (B,) says which samples.

    Samples are numbered through the calls; `start` (P, ...) are the latents that each of them begins with, `schedule`
    the noise schedule from there on, `begin` the teacher's evaluation it begins at (0 but for image-to-image).
    Pixels that the pipeline replaces after each step (inpainting with a plain network) are zeros in `start` and in the
    outputs: no sampler decides over them, and none is to be judged by them.

    Raises `InputError` for calls that cannot be run together: latents of other shapes, another start, another shift.
    """

    def __init__(self, sessions: Sequence[Session], progress: Callable[[int], object]) -> None:
        self.sessions = sessions
        self._check_alike()
        sizes = [session.start.shape[0] for session in sessions]
        self.places = [(k, row) for k, size in enumerate(sizes) for row in range(size)]
        first = sessions[0].slot
        self.begin = first.begin
        assert first.schedule is not None
        self.schedule = first.schedule.begun_at(float(first.times[self.begin])) if self.begin else first.schedule
        self.full_schedule = first.schedule
        self.first_time = float(first.times[self.begin])
        self.kept = self._kept_pixels(progress)
        start = torch.cat([session.start for session in sessions])
        self.scales_noise = first.scales_noise
        amplitude = first.init_noise_sigma if self.scales_noise and not self.begin else 1.0
        self.start = start / amplitude if self.kept is None else start / amplitude * self.kept

    def _check_alike(self) -> None:
        def facts(session: Session) -> tuple[object, ...]:
            slot = session.slot
            assert slot.schedule is not None
            return tuple(session.start.shape[1:]), session.start.dtype, slot.begin, slot.schedule.describe()

        first = facts(self.sessions[0])
        for session in self.sessions:
            if facts(session) != first:
                raise InputError(
                    f"{session.name} has latents, start and schedule {facts(session)}, {self.sessions[0].name} has "
                    f"{first}: one plan is for one size and one strength, tune others apart"
                )

    def _kept_pixels(self, progress: Callable[[int], object]) -> Tensor | None:
        """Which pixels (P, ...) of the latents the pipeline leaves alone between steps; None if all of them.

        The first call is asked again what it was asked at first; if nothing was replaced the answer must be the same.
        """
        first = self.sessions[0]
        again = first.ask(first.start, self.first_time)
        progress(again.shape[0])
        if _left_alone(first).all():
            difference = float((again.double() - first.output.double()).norm())
            if not difference <= SAME_ANSWER * max(float(first.output.double().norm()), 1e-30):
                raise NetworkError(
                    f"{type(first.pipe).__name__} answers the same question otherwise at its second step (difference "
                    f"{difference:.3g}): its guidance or its network changes with the step, or it is not finite"
                )
            return None
        for session in self.sessions[1:]:
            progress(session.ask(session.start, self.first_time).shape[0])
        return torch.cat([_left_alone(session) for session in self.sessions]).to(first.start.dtype)

    def admits(self, plan: Plan) -> bool:
        """Whether the pipeline can begin as the plan does: with noise of another amplitude only where it asks for the
        amplitude, part of the way only where its own first image lies."""
        if self.begin:
            return bool(plan.rows[0, 0] == 1.0 and abs(plan.timesteps[0] - self.first_time) < 1e-3)
        return self.scales_noise or abs(plan.rows[0, 0] - 1.0) < 1e-6

    def steps_for(self, nfe: int) -> tuple[int, int]:
        """(num_inference_steps, begin index) with which the pipeline, called like this, makes `nfe` evaluations.

        Pipelines round a share of the steps in ways of their own, so they are asked; one evaluation a question.
        """
        session = self.sessions[0]
        share = 1.0 - (session.slot.begin_index or 0) / session.slot.length
        for steps in range(nfe, math.ceil((nfe + 1) / share) + 2):
            if abs(steps * share - nfe) < 1.0 + 1e-9:
                probe = Session(session.pipe, session.call, session.name, session.scheduler, steps, repeats=1)
                probe.close()
                if steps - probe.slot.begin == nfe:
                    return steps, probe.slot.begin
        raise InputError(f"no number of steps makes {nfe} of {type(session.pipe).__name__} at this strength")

    def __call__(self, x: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> Tensor:
        t = float(timestep[0])
        wanted = sample.tolist()
        output = torch.empty_like(x)
        for k in dict.fromkeys(self.places[i][0] for i in wanted):
            rows = {position: self.places[i][1] for position, i in enumerate(wanted) if self.places[i][0] == k}
            positions, within = list(rows), list(rows.values())
            output[positions] = self._ask(self.sessions[k], x[positions], t, within).to(x.dtype)
        return output if self.kept is None else output * self.kept[sample].to(output)

    def _ask(self, session: Session, x: Tensor, timestep: float, within: list[int]) -> Tensor:
        """Some of a call's samples; those that nobody asked about stay at the start."""
        whole = session.start.clone()
        whole[within] = x
        if timestep == self.first_time and self.kept is None and torch.equal(whole, session.start):
            return session.output[within]  # what every student asks first was answered when the call began
        return session.ask(whole, timestep)[within]

    @property
    def evaluations(self) -> int:
        """Samples times evaluations of the network that were really made."""
        return sum(session.asked * session.start.shape[0] for session in self.sessions)


def _left_alone(session: Session) -> Tensor:
    assert session.slot.sample is not None
    return session.slot.sample == session.start


@contextmanager
def open_pipeline(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    *,
    teacher_steps: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda samples: None,
) -> Iterator[PipelineNetwork]:
    """Begin all `calls`; afterwards, also after an error, the pipeline is as it was.

    A call without a generator gets one of its own, seeded with `seed` and its number, where the pipeline takes one.
    """
    calls = [_prepared(pipe, call, seed + i, f"calls[{i}]") for i, call in enumerate(calls)]
    before, sessions = dict(vars(pipe)), []
    scheduler = copy.deepcopy(pipe.scheduler)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    device = getattr(pipe, "device", None)  # a pipeline of modules that do not say has none
    devices = [device] if getattr(device, "type", "cpu") == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            pipe._progress_bar_config = {**bar, "disable": True}
            for i, call in enumerate(calls):
                sessions.append(Session(pipe, call, f"calls[{i}]", scheduler, teacher_steps))
                progress(sessions[-1].start.shape[0])
            yield PipelineNetwork(sessions, progress)
        finally:
            for session in sessions:
                session.close()
            _set_attributes(pipe, before)
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()


def _prepared(pipe: Any, call: Mapping[str, Any], seed: int, name: str) -> dict[str, Any]:
    from olss_fast.adapters.pipeline_calls import takes

    own = [argument for argument in OWN if argument in call]
    if own:
        raise InputError(f"{name} has {own[0]}={call[own[0]]!r}: the steps are tuned, leave it out")
    prepared = dict(call)
    if prepared.get("generator") is None and takes(pipe, "generator"):
        prepared["generator"] = torch.Generator("cpu").manual_seed(seed)
    return prepared
