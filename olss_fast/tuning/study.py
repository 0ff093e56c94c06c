"""The work that methods share at one number of steps: paths, fits and their polish, each done when first needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from olss_fast.plan.plan import Plan
from olss_fast.tuning import fitting, path_planning
from olss_fast.tuning.clock import Clock
from olss_fast.tuning.fitting import Student, Task, roll
from olss_fast.tuning.path_search import Path, PathSearch, bent_paths
from olss_fast.tuning.polish import evaluations_of_jacobian, polish

RIDGES = (1e-7, 1e-5)
PUBLISHED_RIDGE = 1e-10  # as good as none, but a singular system still has an answer
SHORTLIST = 6  # paths that are compared on all of `Effort.path_samples`, after a look at all on a quarter of them


@dataclass(frozen=True)
class Effort:
    """How much a tuning may cost: `Effort()` is the default, `Effort.light()` is for trying things out, and worse.

    polish_iterations     Levenberg-Marquardt iterations at most (they stop early by themselves)
    jacobian_samples      samples that carry a Jacobian, down to a third of them where more would cost more than
    jacobian_evaluations  network evaluations
    path_samples          fit samples, and as many validation samples, on which paths are compared
    node_moves            sizes of the moves tried on every node of a path, for a teacher of 100 steps
    robust                Huber loss on per-sample errors instead of least squares
    split_up_to           largest number of steps for which unconditional and conditional outputs are weighed apart too
    """

    polish_iterations: int = 6
    jacobian_samples: int = 48
    jacobian_evaluations: int = 2000
    path_samples: int = 32
    node_moves: tuple[int, ...] = (6, 2)
    robust: bool = True
    split_up_to: int = 4

    @staticmethod
    def light() -> Effort:
        """About a tenth of the default's polish, and a coarser search for paths."""
        return Effort(
            polish_iterations=2,
            jacobian_samples=16,
            jacobian_evaluations=500,
            path_samples=8,
            node_moves=(4,),
            split_up_to=0,
        )


@dataclass(frozen=True)
class Fit:
    """A student, the teacher's evaluations that it was fitted at, and the ridge of its rows."""

    student: Student
    path: Path
    ridge: float


@dataclass(frozen=True)
class Study:
    """The students of `steps` network evaluations of one recorded teacher."""

    task: Task
    effort: Effort
    clock: Clock
    seed: int
    steps: int

    @property
    def splits(self) -> bool:
        """True if unconditional and conditional outputs get separate weights."""
        return self.task.denoiser.guided and self.steps <= self.effort.split_up_to

    @cached_property
    def planned(self) -> Path:
        """The path whose worst stride on the teacher's own outputs is the least (`path_planning.plan_path`)."""
        recording = self.task.recording
        return path_planning.plan_path(
            recording.r, recording.grid.rows, self.steps, samples_count=recording.pixels
        ).path

    @cached_property
    def uniform(self) -> Path:
        """The evenly spaced path."""
        return path_planning.uniform_path(self.task.recording.grid.nfe, self.steps)

    @cached_property
    def searched(self) -> Path:
        """The path that does best on the student's own rollout: of the planned one, what the triangle makes of it, and
        bends of the uniform one, with nodes then moved."""
        recording, effort, steps = self.task.recording, self.effort, self.steps
        refined = path_planning.refine_all(recording.r, recording.grid.rows, self.planned)
        starts = [self.planned, *(each.path for each in refined), *bent_paths(recording.grid.nfe, steps)]
        paths = list(dict.fromkeys(starts))
        scales = sorted({max(1, scale * recording.grid.nfe // 100) for scale in effort.node_moves}, reverse=True)
        few, some = max(2, effort.path_samples // 4), effort.path_samples
        trials = SHORTLIST + len(scales) * (steps - 1)  # two moves a node, each half a rollout on average
        total = 2 * steps * (few * len(paths) + some * trials)
        with self.clock.stage("path", f"{steps:>2} steps, path", total):
            coarse = PathSearch(self.task, few)
            ranked = sorted(paths, key=lambda path: coarse.trial(path).error)
            return PathSearch(self.task, some).best(ranked[:SHORTLIST], scales)

    @cached_property
    def fitted(self) -> Fit:
        """On-policy rows on the searched path."""
        return self.on_policy(self.searched)

    def teacher_forced(self, path: Path, ridge: float = PUBLISHED_RIDGE) -> Fit:
        """Rows fitted on the teacher's own outputs, without a network call."""
        return Fit(fitting.teacher_forced(self.task, path, ridge), path, ridge)

    def on_policy(self, path: Path, *, ridges: Sequence[float] = RIDGES, branches: int = 1) -> Fit:
        """On-policy rows, of several `ridges` with the one that does best on the validation samples."""
        task, split = self.task.with_branches(branches), self.task.recording.split
        total = len(ridges) * self.steps * (len(split.fit) + len(split.validation))
        with self.clock.stage("fit", f"{self.steps:>2} steps, fit", total):
            fits = [Fit(fitting.on_policy(task, path, ridge), path, ridge) for ridge in ridges]
            if len(fits) == 1:
                return fits[0]
            rolls = [roll(task, fit.student, split.validation) for fit in fits]
        losses = [float(each.errors(fit.student.rows[-1]).mean()) for each, fit in zip(rolls, fits, strict=True)]
        return fits[int(np.argmin(losses))]

    def polished(self, fit: Fit) -> Fit:
        """The fit with rows and times improved for the error of its sample, as far as the effort goes."""
        student, split, effort = fit.student, self.task.recording.split, self.effort
        jacobian = evaluations_of_jacobian(student.nfe, student.branches)
        samples = min(len(split.fit), max(effort.jacobian_samples // 3, effort.jacobian_evaluations // jacobian, 1))
        samples = min(samples, effort.jacobian_samples)
        rolls = student.nfe * (len(split.fit) + len(split.validation) + 3 * samples)
        total = (jacobian * samples + rolls) * effort.polish_iterations
        with self.clock.stage("polish", f"{student.nfe:>2} steps, polish", total):
            student = polish(
                self.task.with_branches(student.branches),
                student,
                iterations=effort.polish_iterations,
                jacobian_samples=samples,
                ridge=fit.ridge,
                robust=effort.robust,
                rng=np.random.default_rng([self.seed, student.nfe, student.branches]),
            )
        return Fit(student, fit.path, fit.ridge)

    def plan(self, fit: Fit) -> Plan:
        """The plan of a fit; its metadata hold the path."""
        return fit.student.plan(self.task.schedule, {"method": "olss", "path": json.dumps([int(i) for i in fit.path])})
