"""The teacher of a tuning: a plan whose samples are near enough to the network's exact ones to be called the truth.

By default it is chosen by measurement. On a few samples, solvers x spacings run with 25 steps; the best of them also
with 50, 100 and so on, until one is found whose sample moves little when its steps are doubled: less than a tenth of
the error that students can be expected to reach, which is a share of what the same solvers reach in as many steps.
On schedules of few whole timesteps the truth is a run of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from olss_fast.errors import InputError, NetworkError, ScheduleError
from olss_fast.executors.reference import Loop
from olss_fast.network import Denoiser, Network, OwnStart
from olss_fast.plan.plan import Plan, checked_plan
from olss_fast.schedule.fits import check_prediction
from olss_fast.schedule.noise_schedule import NoiseSchedule, checked_schedule
from olss_fast.solvers.ddim import ddim
from olss_fast.solvers.dense import Dense, begins_by, dense, is_dense
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp
from olss_fast.solvers.tape import check_whole, levels_of
from olss_fast.solvers.unipc import unipc
from olss_fast.support.arguments import check_steps
from olss_fast.tuning.recording import distance

MOST = 400  # steps of a run that a teacher is compared with
COUNTS = (25, 50, 100, 200)
GRIDS = (100, 50, 25, 10, 4, 2, 1)  # evaluations of a grid: the most that the schedule can tell apart
SOLVERS = (partial(dpm_solver_pp, order=3), partial(dpm_solver_pp, order=2), unipc, ddim)
SPACINGS = ("karras", "logsnr", "trailing")
FINALISTS = 3  # solvers x spacings that run with more than the fewest steps
REACHED = 0.4  # error of a tuned plan, in that of the best analytic one of as many steps
SHARE = 0.1  # of the error that students reach, which the teacher's may be
ROUNDING = 1e-6  # of a sample's size: no network in single precision tells less apart
LEAST_SAMPLES, MOST_SAMPLES = 2, 4

Solver = Callable[[int], Plan]


@dataclass(frozen=True)
class Teacher:
    """What students learn from.

    plan      makes the samples that they are to make
    grid      evaluations that a path may take: their times, and rows that lead from one to the next. What the teacher
              knows there is the dense output of `plan`; the grid may be the plan itself
    schedule  of the plan, if it is not that of the grid
    """

    plan: Plan
    grid: Plan
    schedule: NoiseSchedule | None = None

    def rows(self, schedule: NoiseSchedule) -> Dense:
        """Rows of the grid's inputs and outputs over the plan's basis; `schedule` is the grid's."""
        if self.grid is self.plan:
            return Dense(self.plan.rows[:-1], np.eye(self.plan.columns)[1:])
        return dense(self.plan, self.schedule or schedule, self.grid.timesteps, schedule)


@dataclass(frozen=True)
class Source:
    """Whose samples are the truth: a network with its schedule, and its plan, None if one is to be measured."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    plan: Plan | None = None


def checked_source(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    network: Network | None,
    own: NoiseSchedule | None,
    teacher: Plan | None,
    steps: int | None,
) -> Source:
    """The student's own network, or `network`, whose schedule is `own` if it is another; with the plan that
    `checked_teacher` returns.

    Raises `InputError` for an unusable teacher, and for a schedule that begins with less noise than the student's.
    """
    if network is None:
        if own is not None:
            raise InputError("teacher_schedule is that of teacher_network: give both")
        return Source(denoiser, schedule, checked_teacher(teacher, steps, schedule))
    theirs = checked_schedule(schedule) if own is None else checked_schedule(own)
    source = Source(denoiser.also(network), theirs, checked_teacher(teacher, steps, theirs))
    if not begins_by(*(levels_of(each, [each.first])[0] for each in (theirs, schedule))):
        raise InputError(
            f"teacher_schedule ({theirs.describe()}) begins with less noise than schedule ({schedule.describe()}), at "
            f"log-SNR {float(theirs.lam(theirs.first)):.3g} instead of {float(schedule.lam(schedule.first)):.3g}: the "
            "teacher must be known where students begin"
        )
    return source


def checked_teacher(teacher: Plan | None, steps: int | None, schedule: NoiseSchedule) -> Plan | None:
    """`teacher`, or DDIM of so many trailing steps, or None: to be measured. `InputError` for what cannot teach on this
    schedule."""
    checked_schedule(schedule)
    if teacher is None:
        return None if steps is None else ddim(schedule, check_steps(steps, "teacher_steps"), spacing="trailing")
    if checked_plan(teacher, "teacher").noises or teacher.branches != 1 or teacher.models.any():
        raise InputError("a teacher must be a deterministic plan of one network with guidance inside its outputs")
    check_prediction(teacher, schedule)
    check_whole(schedule, teacher.timesteps, "the teacher's timesteps")
    return teacher


def grid_for(teacher: Plan | None, schedule: NoiseSchedule, own: NoiseSchedule | None = None) -> Plan:
    """Evenly spaced times, from the teacher's start on; those of the teacher where they are, or where its run is not
    known in between.

    InputError for such a teacher that has a schedule of its `own`.
    """
    if own not in (None, schedule):
        if teacher is not None and not is_dense(teacher, own):
            raise InputError(
                "with teacher_schedule the noise must fall from each evaluation of the teacher to the next, from the "
                "schedule's first timestep on: its run is not known at the student's times"
            )
    elif teacher is not None and (_is_trailing(teacher, schedule) or not is_dense(teacher, schedule)):
        return teacher
    start = None
    if teacher is not None and own in (None, schedule):
        start = float(teacher.rows[0, 0] / schedule.input_scale(teacher.timesteps[0]))
    for count in GRIDS:
        with suppress(ScheduleError):  # a schedule of few whole timesteps
            return dpm_solver_pp(schedule, count, order=3, start=start)
    raise ScheduleError(f"{schedule.describe()} has fewer than {GRIDS[-1]} timesteps: too few to choose from")


def long_plan(schedule: NoiseSchedule, steps: int) -> Plan:
    """A good plan of `steps` evaluations without any measurement; evenly spaced on schedules of few timesteps."""
    with suppress(ScheduleError):
        return dpm_solver_pp(schedule, steps, order=3, spacing="karras")
    return grid_for(None, schedule)


def _is_trailing(plan: Plan, schedule: NoiseSchedule) -> bool:
    with suppress(ScheduleError):
        return np.allclose(plan.timesteps, schedule.timesteps(plan.nfe))
    return False


def measured_teacher(denoiser: Denoiser, schedule: NoiseSchedule, most_steps: int) -> Plan:
    """The cheapest teacher good enough for students of `most_steps` evaluations, or else the best of the most steps.

    Its metadata say its "own_error": the root mean square by which its samples move when its steps are doubled.

    Raises `NetworkError` if no solver's sample is finite, `ScheduleError` if no solver fits.
    """
    counts = counts_for(schedule)
    trial, network = _Trial(denoiser, counts[-1]), denoiser.networks[0]
    families = list(_families(schedule, counts, network.admits if isinstance(network, OwnStart) else lambda plan: True))
    if not families:
        raise ScheduleError(
            f"no teacher can be measured on {schedule.describe()}: no solver has {counts[0]} and {counts[-1]} steps "
            "there. Give teacher_steps, or a plan as teacher"
        )
    runs = (trial.sample(each, counts[-3:][0]) for each in families)
    reference = next((run for run in runs if run.isfinite().all()), None)
    if reference is None:
        raise NetworkError("no solver's sample is finite: the network, or its schedule, is not what it was taken for")
    families = sorted(families, key=lambda solver: trial.distance(trial.sample(solver, counts[0]), reference))
    finalists = families[:FINALISTS]
    reached = min(trial.distance(trial.sample(each, min(most_steps, counts[-1])), reference) for each in families)
    goal = max(REACHED * SHARE * reached, ROUNDING * trial.distance(reference, 0.0 * reference))
    for count in counts[:-1] if counts[-1] == MOST else counts:
        best = min(finalists, key=lambda solver: trial.moved(solver, count))
        if trial.moved(best, count) <= goal:
            break
    plan = best(count)
    return plan.replace(metadata={**plan.metadata, "own_error": repr(trial.moved(best, count))})


def counts_for(schedule: NoiseSchedule) -> tuple[int, ...]:
    """Numbers of steps, the most last: of `COUNTS` and `MOST` as many times less as there are fewer whole timesteps."""
    curve = schedule.curve
    most = min(MOST, int(1 + curve.first - curve.last)) if schedule.whole_times else MOST
    return tuple(sorted({max(1, count * most // MOST) for count in (*COUNTS, MOST)}))


def _families(schedule: NoiseSchedule, counts: tuple[int, ...], admits: Callable[[Plan], bool]) -> Iterator[Solver]:
    """Solvers x spacings that can be made with every number of steps."""
    for spacing in SPACINGS:
        for function in SOLVERS:
            solver = partial(function, schedule, spacing=spacing)
            try:
                plans = [solver(count) for count in (counts[0], counts[-1])]
            except (InputError, ScheduleError):
                continue
            if all(map(admits, plans)):
                yield solver


class _Trial:
    """Samples of plans of up to `most` steps on a few noises, each made once."""

    def __init__(self, denoiser: Denoiser, most: int) -> None:
        count = min(denoiser.samples, max(LEAST_SAMPLES, min(MOST_SAMPLES, denoiser.samples // 64)))
        stride = -(-denoiser.samples // count) | 1  # odd, for conditioning often repeats
        self.chosen = slice(0, denoiser.samples, stride)
        self.denoiser, self.most = denoiser, most
        self.samples: dict[tuple[Solver, int], Tensor] = {}

    def sample(self, solver: Solver, count: int) -> Tensor:
        if (solver, count) not in self.samples:
            loop = Loop(solver(count), self.denoiser.noise[self.chosen][None])
            self.samples[solver, count] = loop.finish(self.denoiser.asking(self.chosen)).x
        return self.samples[solver, count]

    def moved(self, solver: Solver, count: int) -> float:
        """By how much the sample moves when the number of steps is doubled; 0 if there are no more steps."""
        return self.distance(self.sample(solver, count), self.sample(solver, min(2 * count, self.most)))

    def distance(self, first: Tensor, second: Tensor) -> float:
        error = float(distance(first, second).mean())
        return error if np.isfinite(error) else float("inf")
