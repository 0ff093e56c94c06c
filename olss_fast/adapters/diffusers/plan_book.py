"""The plans of one PlanScheduler: which one a call selects, and how it changes for other grids and starts.

A captured plan is captured again (its metadata holds the scheduler), an analytic one is derived again, and a fitted one
is fixed: its timesteps are absolute, so it accepts any `mu` and the plain grid of `sigmas` that flow pipelines always
pass, and refuses everything else.

A plan's coefficients hold for one value of each further argument of `step`, eta, s_churn and the like. A captured plan
expects the value it was captured with: `step_arguments`, else the default in the signature of the scheduler's own
class. So pipe(eta=0.0) with a plan of a TCDScheduler, whose default is 0.3, does not go unnoticed.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
from torch import Generator, Tensor

from olss_fast.adapters.diffusers.levels import NoiseLevels, noise_levels, scales_of
from olss_fast.capturing.facts import (
    GRIDS,
    CapturedFacts,
    begin_of,
    captured_facts,
    known_schedule,
    name_of,
    scheduler_class,
    steps_of,
)
from olss_fast.capturing.refusals import row_of_numbers
from olss_fast.errors import InputError
from olss_fast.executors.stepwise import Layout, check_runnable, lay_out
from olss_fast.plan.plan import Floats, Plan
from olss_fast.sampling.starts import later_start
from olss_fast.schedule.from_diffusers import check_config
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.support.arguments import checked_number
from olss_fast.support.text import first_few, quoted

REMEMBERED = 32  # entries and later starts: a pipeline's image sizes and strengths
SHOWN, WIDTH = 8, 120  # plans, and characters per line, of a summary
Made = TypeVar("Made")

NEUTRAL = {"s_noise": 1.0, "s_tmax": math.inf}
"""Neutral values, besides None, 0 and False, for a plan without expected arguments."""
ORDER = ("generator", "return_dict")  # by position, if no scheduler's own order is known
SOMETIMES = frozenset({"eta"})  # which pipelines pass if the signature of `step` has it
OURS = {"generator", "return_dict", "prev_timestep"}  # which PlanScheduler.step checks itself


@dataclass(frozen=True)
class StepArguments:
    """The expected values of the plan called `name`, by argument; others must be neutral.

    order: the arguments of `step` after the sample, in the captured scheduler's order. dropped: those that pipelines
    pass only to schedulers that have them, which the captured one does not.
    """

    name: str
    expected: Mapping[str, Any]
    order: tuple[str, ...]
    dropped: frozenset[str] = frozenset()

    def named(self, positional: Sequence[Any]) -> dict[str, Any]:
        """Positional arguments by name. InputError for too many."""
        if len(positional) > len(self.order):
            raise InputError(
                f"step was given {len(positional)} arguments after the sample; {self.name} takes "
                f"{', '.join(self.order)}: give them by name"
            )
        pairs = zip(self.order, positional, strict=False)
        return {"generator" if _is_generator(value) else argument: value for argument, value in pairs}

    def check(self, asked: Mapping[str, Any]) -> None:
        """InputError for a value other than expected. None is ignored."""
        for argument, value in asked.items():
            if isinstance(value, (Tensor, np.ndarray)):
                raise InputError(
                    f"step was asked for {argument} of shape {tuple(value.shape)}, values for parts of the sample, and "
                    f"{self.name} has one coefficient for all of it at a step. Run this pipeline with its own scheduler"
                )
            if value is not None and argument not in self.dropped and not self._is_met(argument, value):
                raise InputError(
                    f"step was asked for {argument}={quoted(value)}, and {self.name} {self._has(argument)}; its "
                    f"coefficients are fixed. Call the pipeline with what it has, or "
                    f"capture(scheduler, steps, step_arguments={{{argument!r}: {quoted(value)}}})"
                )

    def _is_met(self, argument: str, value: Any) -> bool:
        if self.expected.get(argument) is None:
            return not value or bool(value == NEUTRAL.get(argument))
        return bool(value == self.expected[argument])

    def _has(self, argument: str) -> str:
        if self.expected.get(argument) is None:
            return f"has no {argument}"
        return f"was captured with {argument}={quoted(self.expected[argument])}"


@dataclass(frozen=True, eq=False)
class Entry:
    """A plan ready to run, and what selects it: `steps` as pipelines count them, its only start if that is not 0.

    timesteps: of the whole run, `begin` fillers and then the plan's. expected: the arguments of its steps. facts: of
    the scheduler that it was captured from, if it was.
    """

    plan: Plan
    steps: int
    begin: int
    timesteps: Floats
    layout: Layout
    levels: NoiseLevels
    expected: StepArguments
    facts: CapturedFacts | None

    @property
    def class_name(self) -> str:
        """Of the scheduler that the plan was captured from; "" if it was not."""
        return self.facts.class_name if self.facts else ""


@dataclass
class PlanBook:
    """Entries by number of steps; `network` is the config of the scheduler that the network was trained with."""

    plans: tuple[Plan, ...]
    network: Mapping[str, Any] | None
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.plans:
            raise InputError("no plan was given; a PlanScheduler needs at least one")
        if self.network is not None:
            check_config(self.network)
        self._by_steps: dict[int, Plan] = {}
        for plan in self.plans:
            check_runnable(plan)
            if (other := self._by_steps.setdefault(steps_of(plan), plan)) is not plan:
                raise InputError(
                    f"two plans answer to {steps_of(plan)} steps, {name_of(other)} and {name_of(plan)}; give one a "
                    "number of steps, or make a PlanScheduler of each"
                )

    @property
    def steps(self) -> list[int]:
        return sorted(self._by_steps)

    def __str__(self) -> str:
        """The plan for each number of steps, and the network's schedule, in a few lines for any number of plans."""
        shown = self.steps if len(self.steps) <= SHOWN else self.steps[: SHOWN - 1]
        lines = [f"{steps} steps: {name_of(self._by_steps[steps])}" for steps in shown]
        lines += [f"… and {len(self.steps) - len(shown)} more"] if len(shown) < len(self.steps) else []
        trained = "not known" if self.schedule is None else self.schedule.describe()
        return "\n".join([*(line[:WIDTH] for line in lines), f"network's schedule: {trained}"[:WIDTH]])

    @cached_property
    def schedule(self) -> NoiseSchedule | None:
        """The network's training schedule; None without a config or if its noise levels are of an unknown kind."""
        # A shift by the size of the image only moves timesteps.
        return None if self.network is None else known_schedule({**self.network, "use_dynamic_shifting": False})

    def choose(self, steps: int | None, asked: Mapping[str, Any]) -> Entry:
        """The entry for `set_timesteps(steps, **asked)`. InputError if there is none."""
        asked = {name: _checked(name, value) for name, value in asked.items()}
        steps = _count(asked) if steps is None else whole("num_inference_steps is", steps)
        if steps not in self._by_steps:
            have = "; ".join(f"{count}: {name_of(self._by_steps[count])}" for count in self.steps)
            raise InputError(
                f"there is no plan for num_inference_steps={steps!r}; this PlanScheduler has {have}. Ask for one of "
                "these, or make a PlanScheduler with a plan for that number of steps as well"
            )
        return self._remember(f"{steps} {asked}", lambda: self._entry(steps, asked))

    def begun_at(self, entry: Entry, begin: int) -> Layout:
        """The layout of a run that begins at evaluation `begin` of the entry. InputError if there is none."""
        if begin == entry.begin:
            return entry.layout
        return self._remember((entry, begin), lambda: self._laid_out(later_start(entry.plan, begin, self.schedule)))

    def _laid_out(self, plan: Plan) -> Layout:
        return lay_out(plan, scales_of(plan, self.network))

    def __deepcopy__(self, memo: Any) -> PlanBook:
        return self  # it never changes

    def _grid(self, plan: Plan, steps: int, asked: Mapping[str, Any]) -> Plan:
        """The plan on the requested timesteps, sigmas or mu."""
        if facts := captured_facts(plan):
            return self._captured(plan, facts, steps, asked)
        unknown = sorted(set(asked) - {"timesteps", "sigmas", "mu"})
        if unknown or not _is_plain(asked.get("sigmas"), steps):
            what = ", ".join(unknown) or "sigmas"
            raise InputError(
                f"set_timesteps got {what}, but {name_of(plan)} has its own timesteps; call the pipeline "
                f"without {what}, or capture a scheduler with them"
            )
        times = asked.get("timesteps")
        if times is None or _equal(times, plan.timesteps):
            return plan
        from olss_fast.solvers.rederive import is_analytic, rederive

        if not is_analytic(plan):
            raise InputError(
                f"{name_of(plan)} is fitted to its timesteps {first_few(plan.timesteps)}, but {first_few(times)} were "
                "given; call the pipeline without timesteps"
            )
        if self.schedule is None:
            raise InputError(
                f"{name_of(plan)} has to be derived again for other timesteps, which needs the network's noise "
                "schedule; make it PlanScheduler(plan, scheduler=…) with the scheduler that "
                "the network was trained with, or PlanScheduler.from_pipe(pipe, plan)"
            )
        return rederive(plan, self.schedule, times)

    def _captured(self, plan: Plan, facts: CapturedFacts, steps: int, asked: Mapping[str, Any]) -> Plan:
        changed = {name: value for name, value in asked.items() if not _is_met(name, value, steps, facts)}
        _check_shifted(plan, facts, asked, changed)
        if not changed and (not facts.begin or scheduler_class(facts.class_name) is None):
            return plan
        from olss_fast.capturing.capturing import recapture  # like the solvers: most runs use a plan unchanged

        return recapture(plan, begin=0, **changed)

    def _entry(self, steps: int, asked: Mapping[str, Any]) -> Entry:
        plan = self._grid(self._by_steps[steps], steps, asked)
        begin = begin_of(plan)
        schedule = self.schedule if begin else None
        first, second = plan.timesteps[0], plan.timesteps[min(1, plan.nfe - 1)]
        noisiest = schedule.first if schedule is not None else first + (begin * (first - second) or begin)
        fillers = np.linspace(noisiest, first, begin + 1)[:-1]
        layout = self._laid_out(plan)
        return Entry(
            plan,
            steps,
            begin,
            timesteps=np.concatenate([fillers, plan.timesteps]),
            layout=layout,
            levels=noise_levels(plan, begin, layout.scales, self.schedule),
            expected=step_arguments_of(plan),
            facts=captured_facts(plan),
        )

    def _remember(self, key: Hashable, make: Callable[[], Made]) -> Made:
        made: Made | None = self._made.get(key)
        if made is None:
            for oldest in list(self._made)[: 1 - REMEMBERED]:  # other threads may do the same
                self._made.pop(oldest, None)
            made = self._made[key] = make()
        return made


def whole(what: str, value: Any) -> int:
    """`value` as an int; InputError that begins with `what` and the value."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{what} {quoted(value)}; expected a whole number") from error


def _checked(name: str, value: Any) -> Any:
    """An argument of set_timesteps as plain numbers, if it is one common to all schedulers."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if name == "mu":
        checked_number(name, plain)
    elif name in GRIDS and not np.isfinite(row_of_numbers(name, plain)).all():
        raise InputError(f"{name} is {quoted(value)}; expected finite numbers")
    return plain


def _count(asked: Mapping[str, Any]) -> int | None:
    """Number of steps of a custom grid; a final sigma of 0 does not count."""
    if "timesteps" in asked:
        return len(asked["timesteps"])
    sigmas = asked.get("sigmas")
    return None if sigmas is None else len(sigmas) - int(float(sigmas[-1]) == 0.0)


def _is_met(name: str, value: Any, steps: int, facts: CapturedFacts) -> bool:
    """True if a captured plan already has an argument: the same, or the plain grid if it was captured on its own."""
    same = name in facts.arguments and _equal(value, facts.arguments[name])
    return same or (name == "sigmas" and not facts.arguments.keys().isdisjoint(GRIDS) and _is_plain(value, steps))


def _is_plain(sigmas: Any, steps: int) -> bool:
    """True for None, and for 1, 1 - 1/N, … 1/N, which pipelines of flow models pass by default."""
    return sigmas is None or _equal(sigmas, np.linspace(1.0, 1.0 / steps, steps))


def _check_shifted(plan: Plan, facts: CapturedFacts, asked: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """InputError for another grid without the mu that its scheduler would need too."""
    grids = [name for name in GRIDS if name in changed]
    if grids and facts.config.get("use_dynamic_shifting") and "mu" not in asked:
        raise InputError(
            f"set_timesteps was asked for {grids[0]} without mu, and the {facts.class_name} that {name_of(plan)} was "
            "captured from shifts them by the size of the image (use_dynamic_shifting): pass mu as well"
        )


def _equal(one: Any, other: Any) -> bool:
    try:
        a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    except (TypeError, ValueError):
        return bool(one == other)
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=1e-9)


# --- arguments of step ------------------------------------------------------------------------------------------------


def step_arguments_of(plan: Plan) -> StepArguments:
    """The step arguments of a plan. InputError for a captured plan with unreadable metadata."""
    if (facts := captured_facts(plan)) is None:
        return StepArguments(name_of(plan), {}, ORDER)
    optional = _optional(facts.class_name)
    defaults = {name: value for name, value in optional.items() if name not in OURS}
    dropped = SOMETIMES - optional.keys() if optional else frozenset[str]()
    return StepArguments(name_of(plan), {**defaults, **facts.step_arguments}, (*optional,) or ORDER, dropped)


@cache
def _optional(class_name: str) -> Mapping[str, Any]:
    """The further arguments of the class's `step`, with defaults; none for a class that diffusers does not have."""
    kind = scheduler_class(class_name)
    parameters = [] if kind is None else list(inspect.signature(kind.step).parameters.values())
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _is_generator(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(each, Generator) for each in several)
