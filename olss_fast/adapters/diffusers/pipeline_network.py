"""A diffusers pipeline as a network: evaluate it at any latents and timestep, with all its conditioning and guidance.

Each call of the pipeline runs in its own greenlet, up to the scheduler's first step and no further. The object in the
scheduler slot returns the model output and waits; asked for (x, t) it writes t into the tensor of timesteps that the
pipeline iterates over, returns x as the next latents, and so gets the model output there. Prompts are encoded and
images prepared once per call, and each question costs one network evaluation, for any class of pipeline. Nothing is
decoded: a call never ends, it is closed while it waits.

Latents are network inputs here, as everywhere in a Plan: `scale_model_input` is the identity.
"""

from __future__ import annotations

import contextvars
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from olss_fast.adapters.diffusers.pipeline_calls import takes
from olss_fast.adapters.diffusers.pipeline_slot import Slot, check_answer, questions
from olss_fast.errors import InputError, NetworkError, OlssError
from olss_fast.network import OwnStart
from olss_fast.plan.plan import Plan

SAME_ANSWER = 1e-3  # of the norm: above the difference of two runs of the same kernels
OWN = ("num_inference_steps", "timesteps", "sigmas")  # arguments of a call that are ours to choose


@dataclass(eq=False)
class Session:
    """One call of a pipeline, suspended inside the scheduler's step."""

    pipe: Any
    call: Mapping[str, Any]
    name: str
    scheduler: Any
    teacher_steps: int
    repeats: int | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext  # where the pipeline runs

    def __post_init__(self) -> None:
        self.run: greenlet | None = None
        self.asked = 0  # evaluations of the whole call
        self._open()

    def _open(self) -> None:
        """Runs the call up to its first output."""
        self.slot = Slot(self.scheduler, self.teacher_steps, self.repeats)
        self.attributes = {**vars(self.pipe), "scheduler": self.slot}
        self.run = greenlet(lambda: self.pipe(**self._arguments(self.slot.length)))
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

    def _arguments(self, steps: int) -> dict[str, Any]:
        arguments = {**self.call, "num_inference_steps": steps}
        if "generator" in arguments:
            given = arguments["generator"]
            arguments["generator"] = [*map(_copied, given)] if isinstance(given, (list, tuple)) else _copied(given)
        return arguments

    def check(self) -> None:
        """InputError if the pipeline's answer from outside differs from that in its own loop."""
        outside = dict(vars(self.pipe))
        try:
            with self.within():
                asked = questions(self.pipe, self.scheduler, self._arguments, self.teacher_steps, self.name)
        finally:
            _set_attributes(self.pipe, outside)
        self.asked += len(asked)
        if asked:
            answer = self.ask(asked[-1].x, asked[-1].timestep)
            check_answer(asked[-1], answer, SAME_ANSWER, type(self.pipe).__name__)

    def _switch(self, *question: Any) -> Tensor:
        """Resumes the pipeline with the attributes it had when suspended: calls share the object."""
        assert self.run is not None
        outside = dict(vars(self.pipe))
        _set_attributes(self.pipe, self.attributes)
        try:
            self.slot.asked_from = getcurrent()
            with self.within():
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
        """Ends the suspended call."""
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


def _copied(generator: Any) -> Any:
    """A copy of a generator, which leaves the caller's state alone."""
    if not isinstance(generator, torch.Generator):
        return generator
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


class Place(NamedTuple):
    """The place of a sample: index of its call, and its row there."""

    call: int
    row: int


class PipelineNetwork(OwnStart):
    """`network(x, timestep, sample=...) -> output` over all calls of a pipeline; `sample` (B,) says which samples.

    Samples are numbered across calls; `start` (P, ...) are their initial latents, `schedule` the noise schedule from
    there on, `begin` the teacher's evaluation that they start at (0 except for image-to-image). Pixels that the
    pipeline replaces after each step (inpainting with a plain network) are zeros in `start` and in the outputs:
    samplers have no influence on them and are not judged by them.

    Raises `InputError` for calls that cannot be run together: latents of other shapes, another start, another shift.
    """

    def __init__(self, sessions: Sequence[Session], progress: Callable[[int], object]) -> None:
        self.sessions = sessions
        self._check_alike()
        sizes = [session.start.shape[0] for session in sessions]
        self.places = [Place(k, row) for k, size in enumerate(sizes) for row in range(size)]
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
        """The pixels (P, ...) of the latents that the pipeline leaves alone between steps; None for all.

        The first question of the first call is repeated; if nothing was replaced, the answer must be the same.
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

    def what_is_asked(self) -> dict[str, Any]:
        """The pipeline's parts and code, its own attributes, and the calls; see `identity`.

        Attributes with an underscore are those of the call that runs."""
        pipe = self.sessions[0].pipe
        own = {name: each for name, each in vars(pipe).items() if not name.startswith("_")}
        code = {"code": type(pipe)}
        return {**own, **getattr(pipe, "components", {}), **code, "calls": [session.call for session in self.sessions]}

    def admits(self, plan: Plan) -> bool:
        """True if the pipeline can begin as the plan does: with another noise amplitude only if it reads
        `init_noise_sigma`, at a later timestep only at its own."""
        if self.begin:
            return bool(plan.rows[0, 0] == 1.0 and abs(plan.timesteps[0] - self.first_time) < 1e-3)
        return self.scales_noise or abs(plan.rows[0, 0] - 1.0) < 1e-6

    def steps_for(self, nfe: int) -> tuple[int, int]:
        """(num_inference_steps, begin index) for `nfe` evaluations of such calls.

        Pipelines round a share of the steps in different ways, so this is tried; one evaluation per trial.
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
        for k in dict.fromkeys(self.places[i].call for i in wanted):
            rows = {position: self.places[i].row for position, i in enumerate(wanted) if self.places[i].call == k}
            positions, within = list(rows), list(rows.values())
            output[positions] = self._ask(self.sessions[k], x[positions], t, within).to(x.dtype)
        return output if self.kept is None else output * self.kept[sample].to(output)

    def _ask(self, session: Session, x: Tensor, timestep: float, within: list[int]) -> Tensor:
        """Evaluates some of a call's samples; the others stay at the start."""
        whole = session.start.clone()
        whole[within] = x
        if timestep == self.first_time and self.kept is None and torch.equal(whole, session.start):
            return session.output[within]  # the first question of every student was answered when the call began
        return session.ask(whole, timestep)[within]

    @property
    def evaluations(self) -> int:
        """Network evaluations made, times samples."""
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
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[PipelineNetwork]:
    """Begin all `calls`; afterwards, also after an error, the pipeline is restored. It always runs `within()`.

    A call without a generator gets its own, seeded with `seed` and its index, if the pipeline takes one.
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
                sessions.append(Session(pipe, call, f"calls[{i}]", scheduler, teacher_steps, within=within))
                progress(sessions[-1].start.shape[0])
            network = PipelineNetwork(sessions, progress)
            sessions[0].check()
            yield network
        finally:
            for session in sessions:
                session.close()
            _set_attributes(pipe, before)
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()


def _prepared(pipe: Any, call: Mapping[str, Any], seed: int, name: str) -> dict[str, Any]:
    own = [argument for argument in OWN if argument in call]
    if own:
        raise InputError(f"{name} has {own[0]}={call[own[0]]!r}: the steps are tuned, leave it out")
    prepared = dict(call)
    if prepared.get("generator") is None and takes(pipe, "generator"):
        prepared["generator"] = torch.Generator("cpu").manual_seed(seed)
    return prepared
