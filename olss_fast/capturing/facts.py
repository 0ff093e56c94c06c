"""What is read of a scheduler, and its record in a captured plan: JSON in metadata["scheduler"]."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from olss_fast.errors import InputError, ScheduleError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.text import quoted

GRIDS = ("timesteps", "sigmas")  # arguments of set_timesteps that say how many steps there are
MOST_STEPS = 10_000  # limit for metadata; far beyond every sampler
ENDS_AT_CLEAN = ("SCMScheduler", "DDPMWuerstchenScheduler")
"""Classes whose `timesteps` end with that of the clean sample, where the network is not evaluated."""

LEFT_OUT = {"scales": None, "noised_by_index": False, "noised": None}  # at these values, from the JSON


@dataclass(frozen=True, kw_only=True)
class CapturedFacts:
    """How to capture a plan again, and how its scheduler's states and add_noise differ from rows and levels.

    class_name, config: of the scheduler. steps, arguments: of set_timesteps. step_arguments: of every step. begin:
    number of skipped timesteps. order: evaluations per step.
    scales: (S,) network input / state; None for all 1. noised: (S+1, 2), the levels of the states that add_noise makes
    for a start at each evaluation, and after the last; None if equal to those of the rows. noised_by_index: after
    set_begin_index, add_noise uses the index of the run, not the timestep passed to it.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None
    arguments: Mapping[str, Any]
    step_arguments: Mapping[str, Any] = field(default_factory=dict)
    begin: int
    order: int = 1
    scales: Any = None
    noised_by_index: bool = False
    noised: Any = None

    def __post_init__(self) -> None:
        kinds = {"class_name": str, "begin": int, "order": int}
        kinds |= {"config": dict, "arguments": dict, "step_arguments": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {quoted(getattr(self, name))}")
        steps = 1 if self.steps is None else self.steps
        if not (0 <= self.begin < MOST_STEPS and 1 <= self.order <= MOST_STEPS and 1 <= steps <= MOST_STEPS):
            raise ValueError(f"begin {self.begin}, order {self.order} and {steps} steps cannot be")

    @property
    def network_config(self) -> dict[str, Any]:
        """The scheduler's config, with its class."""
        return {**self.config, "_class_name": self.class_name}

    def to_json(self) -> str:
        """JSON text. InputError if config or arguments hold other than plain data."""
        kept = {name: each for name, each in vars(self).items() if name not in LEFT_OUT or each != LEFT_OUT[name]}
        kept = {"class": kept.pop("class_name"), **kept}
        try:
            return json.dumps(kept, default=plain, separators=(",", ":"))
        except (TypeError, ValueError) as cause:
            raise InputError(
                f"{self.class_name} cannot be written down: {cause} among its config and arguments; expected numbers, "
                "text and lists of them"
            ) from cause


def captured_facts(plan: Plan) -> CapturedFacts | None:
    """The record of `capture`; None for a plan that was not captured. InputError if it cannot be read."""
    if plan.metadata.get("method") != "captured" or "scheduler" not in plan.metadata:
        return None
    return _read(plan.metadata["scheduler"])


@lru_cache(maxsize=64)
def _read(text: str) -> CapturedFacts:
    try:
        facts = dict(json.loads(text))
        facts["class_name"] = facts["class"]
        return CapturedFacts(**{name: facts[name] for name in CapturedFacts.__annotations__ if name in facts})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"metadata['scheduler'] of this plan is not what capture writes: {quoted(str(error), 200)}; capture the "
            "scheduler again"
        ) from error


def plain(value: Any) -> Any:
    """A value that JSON does not know as one that it does."""
    if hasattr(value, "tolist"):  # tensors, and numpy's arrays and numbers
        return value.tolist()
    raise TypeError(f"there is a {type(value).__name__}")


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """The scheduler's config, empty if it has none."""
    config = getattr(scheduler, "config", {})
    return config if isinstance(config, Mapping) else {}


def known_schedule(scheduler: Any) -> NoiseSchedule | None:
    """The training schedule of a scheduler or its config; None if its noise levels are of an unknown kind."""
    try:
        return NoiseSchedule.from_diffusers(scheduler)
    except ScheduleError:
        return None


def scheduler_class(name: str) -> Any:
    """The scheduler class of diffusers with this name; None if there is none."""
    import diffusers

    kind = getattr(diffusers.schedulers, name, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin) and hasattr(kind, "step")
    return kind if known else None


def name_of(plan: Plan) -> str:
    """The plan's title and NFE, for messages."""
    title = plan.metadata.get("title") or plan.metadata.get("method", "an unnamed plan")
    return f"{title} of {plan.nfe} evaluations"


def steps_of(plan: Plan) -> int:
    """The `num_inference_steps` that selects a plan: from its metadata, its capture, or its NFE."""
    begin, facts = begin_of(plan), captured_facts(plan)
    if "num_inference_steps" in plan.metadata:
        steps = _metadata_number(plan, "num_inference_steps")
        if begin and not facts and steps - begin != plan.nfe:
            raise InputError(
                f"the metadata of {name_of(plan)} says that it begins at step {begin} of {steps}, which leaves "
                f"{steps - begin} evaluations; correct them with plan.replace(metadata=…)"
            )
        return steps
    if facts:
        return facts.steps or (begin + plan.nfe + facts.order - 1) // facts.order
    return plan.nfe


def begin_of(plan: Plan) -> int:
    """The timestep index of the plan's first evaluation."""
    if facts := captured_facts(plan):
        return facts.begin
    return _metadata_number(plan, "begin") if "begin" in plan.metadata else 0


def _metadata_number(plan: Plan, key: str) -> int:
    try:
        number = int(plan.metadata[key])
    except ValueError:
        number = -1
    if not 0 <= number <= MOST_STEPS:
        raise InputError(
            f"metadata[{key!r}] of {name_of(plan)} is {quoted(plan.metadata[key])}; expected a whole number up to "
            f"{MOST_STEPS}, the number of steps that a plan answers to or the first of them"
        )
    return number
