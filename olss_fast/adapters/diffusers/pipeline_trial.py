"""Checks that a pipeline's network can be evaluated from outside, by repeating the inputs of two of its own steps.

The pipeline runs with a copy of its own scheduler up to its second step. The network's latents and timestep there are
then passed through the slot (`pipeline_network`): the output must be the same. It differs if a pipeline computes with
its scheduler's state (StableDiffusionLatentUpscalePipeline reads `sigmas`), also for unknown classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler
from olss_fast.capturing.facts import steps_of
from olss_fast.errors import InputError

STEPS = 4  # for schedulers that take no more: a consistency model's own schedule is short
ENOUGH = 2


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
    for count in _counts(scheduler, steps):
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


def _counts(scheduler: Any, steps: int) -> list[int]:
    """Numbers of steps to try. A PlanScheduler takes only those of its plans."""
    if isinstance(scheduler, PlanScheduler):
        return [steps_of(plan) for plan in scheduler.plans]
    return list(dict.fromkeys([steps, min(steps, STEPS)]))


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
