"""Fits, polishes and judges the students of one recording; `tuning.tune` is the front door.

For every number of steps a path is planned and searched, rows are fitted on-policy and polished, and the students are
scored on held-out noise together with every analytic solver and every rival at the same number of evaluations.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from olss_fast import planning, solvers
from olss_fast._progress import evaluation_bar
from olss_fast.errors import PlanFileError, StoreError
from olss_fast.fitting import Float64, Student, Task, on_policy, teacher_forced
from olss_fast.network import Denoiser
from olss_fast.path_search import PathSearch, bent_paths
from olss_fast.plan import Plan
from olss_fast.polish import evaluations_of_jacobian, polish
from olss_fast.report import ANALYTIC, FITTED, KIND_NAMES, PUBLISHED, SPLIT, UNIFORM, UNPOLISHED, Candidate
from olss_fast.rollout import roll
from olss_fast.scoring import expected_evaluations, kept_scores, tournament

VERSION = 1  # of the fits in a store; raised whenever the same effort and seed would fit otherwise
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
    """A fitted plan on its way to acceptance."""

    kind: str
    path: tuple[int, ...]
    plan: Plan


@dataclass
class Clock:
    """Progress bars, and what each stage cost in network evaluations and seconds."""

    denoiser: Denoiser
    visible: bool
    evaluations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar of `total` sample evaluations; yields the function that advances it."""
        start, before = time.perf_counter(), self.denoiser.evaluations
        with evaluation_bar(title, total, self.visible) as bar:
            yield bar.update
            bar.total = bar.n  # early stopping leaves some of the estimate unused
            bar.refresh()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.evaluations[name] = self.evaluations.get(name, 0) + self.denoiser.evaluations - before


@dataclass(frozen=True)
class Tuner:
    """Fits, polishes and judges the students of one recording.

    `rivals` are judged beside the analytic solvers, of all of these only what `admits` lets through.
    """

    task: Task
    effort: Effort
    clock: Clock
    seed: int
    rivals: tuple[Plan, ...] = ()
    admits: Callable[[Plan], bool] = lambda plan: True

    def settings(self) -> dict[str, Any]:
        """What the run was asked to do, for the report."""
        recording = self.task.recording
        return {
            "samples": {name: len(part) for name, part in vars(recording.split).items()},
            "teacher_steps": recording.teacher.nfe,
            "guidance_scale": self.task.denoiser.guidance_scale,
            "schedule": self.task.schedule.metadata(),
            "effort": asdict(self.effort),
            "seed": self.seed,
        }

    def candidates(self, steps: int) -> list[Candidate]:
        """Every fit and every analytic solver of `steps` evaluations, scored on held-out noise, the winner marked."""
        fits = self._finished(steps) or self._keep(steps, list(self._fits(steps)))
        analytic = [
            plan
            for plan in with_rivals(solvers.candidates(self.task.schedule, steps), self.rivals)
            if self.admits(plan)
        ]
        plans = [fit.plan for fit in fits] + analytic
        held_out = self.task.recording.split.held_out
        errors = self._judged(plans, len(fits))
        scored = [
            Candidate(
                name=KIND_NAMES[fit.kind],
                kind=fit.kind,
                spacing="fitted",
                plan=fit.plan,
                errors=tuple(error),
                path=fit.path,
            )
            for fit, error in zip(fits, errors, strict=False)
        ]
        for plan, error in zip(analytic, errors[len(fits) :], strict=True):
            name, spacing = solvers.display_name(plan), plan.metadata.get("spacing", "")
            scored.append(Candidate(name=name, kind=ANALYTIC, spacing=spacing, plan=plan, errors=tuple(error)))
        complete = [i for i, each in enumerate(scored) if each.samples == len(held_out)]
        winner = min(complete, key=lambda i: scored[i].mean)
        scored[winner] = replace(scored[winner], accepted=True)
        return scored

    def _judged(self, plans: list[Plan], fits: int) -> list[Float64]:
        """Errors of all plans on held-out noise, the first `fits` of them on all of it; kept in the store."""
        recording = self.task.recording
        held_out = recording.split.held_out
        first = max(3, len(held_out) // 8)
        total = expected_evaluations(plans, len(held_out), first)
        with self.clock.stage("accept", f"{plans[0].nfe:>2} steps, {len(plans)} samplers", total) as tick:
            return kept_scores(
                recording.store,
                plans,
                f"tournament {fits} {first}",
                lambda: tournament(plans, self.task, held_out, keep=range(fits), first=first, progress=tick),
            )

    def _files(self, steps: int) -> dict[str, Path]:
        """Where the store keeps the fits of `steps`, by kind; names hold what fits depend on beside the recording."""
        key = hashlib.sha256(repr((VERSION, self.effort, self.seed, self.task.fixed_start)).encode()).hexdigest()[:16]
        kinds = [PUBLISHED, UNIFORM, UNPOLISHED, FITTED] + ([SPLIT] if self._splits(steps) else [])
        store = self.task.recording.store
        return {kind: store.path(f"fit-{steps:03d}-{kind}-{key}") for kind in kinds}

    def _finished(self, steps: int) -> list[Fit]:
        """The fits of an earlier run with the same store, effort and seed, if all of them were finished."""
        files = self._files(steps)
        if not all(file.exists() for file in files.values()):
            return []
        try:
            plans = {kind: Plan.load(file) for kind, file in files.items()}
        except PlanFileError:  # damaged: fitting again is cheaper than asking what to do
            return []
        return [Fit(kind, tuple(json.loads(plan.metadata["path"])), plan) for kind, plan in plans.items()]

    def _keep(self, steps: int, fits: list[Fit]) -> list[Fit]:
        files = self._files(steps)
        for fit in fits:
            try:
                fit.plan.save(files[fit.kind])
            except PlanFileError as error:
                raise StoreError(f"{error}. {self.task.recording.store.advice}") from error
        return fits

    def _splits(self, steps: int) -> bool:
        return self.task.denoiser.guided and steps <= self.effort.split_up_to

    def _fits(self, steps: int) -> Iterator[Fit]:
        recording = self.task.recording
        planned = self._paths(steps)
        path = self._search(planned)
        samples = len(recording.split.fit) + len(recording.split.validation)
        with self.clock.stage("fit", f"{steps:>2} steps, fit", (1 + len(RIDGES)) * steps * samples) as tick:
            student, ridge = self._fit(self.task, path, tick)
            uniform_path = planning.uniform_path(recording.teacher.nfe, steps)
            uniform = on_policy(self.task, uniform_path, ridge, progress=tick)
        published = teacher_forced(self.task, planned[0], PUBLISHED_RIDGE)
        yield self._finish(PUBLISHED, planned[0], published)
        yield self._finish(UNIFORM, uniform_path, uniform)
        yield self._finish(UNPOLISHED, path, student)
        yield self._finish(FITTED, path, self._polish(self.task, student, ridge))
        if self._splits(steps):
            apart = self.task.with_branches(2)
            with self.clock.stage("fit", f"{steps:>2} steps, fit split", steps * samples * len(RIDGES)) as tick:
                student, ridge = self._fit(apart, path, tick)
            yield self._finish(SPLIT, path, self._polish(apart, student, ridge))

    def _paths(self, steps: int) -> list[tuple[int, ...]]:
        """Paths to start the search from: the planned one, what the triangle makes of it, and bends of the uniform."""
        recording = self.task.recording
        planned = planning.plan_path(recording.r, recording.teacher.rows, steps, samples_count=recording.pixels)
        refined = planning.refine_all(recording.r, recording.teacher.rows, planned.path)
        starts = [planned.path, *(each.path for each in refined), *bent_paths(recording.teacher.nfe, steps)]
        return list(dict.fromkeys(starts))

    def _search(self, paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The path that does best on the student's own rollout."""
        steps, teacher_steps = len(paths[0]), self.task.recording.teacher.nfe
        scales = sorted({max(1, scale * teacher_steps // 100) for scale in self.effort.node_moves}, reverse=True)
        some = self.effort.path_samples
        few = max(2, some // 4)
        trials = SHORTLIST + len(scales) * (steps - 1)  # two moves a node, each half a rollout on average
        with self.clock.stage(
            "path", f"{steps:>2} steps, path", 2 * steps * (few * len(paths) + some * trials)
        ) as tick:
            coarse = PathSearch(self.task, few, tick)
            ranked = sorted(paths, key=lambda path: coarse.trial(path).error)
            return PathSearch(self.task, some, tick).best(ranked[:SHORTLIST], scales)

    def _fit(self, task: Task, path: Sequence[int], tick: Callable[[int], object]) -> tuple[Student, float]:
        """On-policy rows with the ridge that does best on the validation samples."""
        students = [on_policy(task, path, ridge, progress=tick) for ridge in RIDGES]
        losses = [self._validate(task, student, tick) for student in students]
        best = int(np.argmin(losses))
        return students[best], RIDGES[best]

    def _validate(self, task: Task, student: Student, tick: Callable[[int], object]) -> float:
        rollout = roll(task, student, task.recording.split.validation, tick)
        return float(rollout.errors(student.rows[-1]).mean())

    def _polish(self, task: Task, student: Student, ridge: float) -> Student:
        split, effort = task.recording.split, self.effort
        jacobian = evaluations_of_jacobian(student.nfe, task.branches)
        samples = min(len(split.fit), max(effort.jacobian_samples // 3, effort.jacobian_evaluations // jacobian, 1))
        samples = min(samples, effort.jacobian_samples)
        rolls = student.nfe * (len(split.fit) + len(split.validation) + 3 * samples)
        each = jacobian * samples + rolls
        with self.clock.stage("polish", f"{student.nfe:>2} steps, polish", each * effort.polish_iterations) as tick:
            polished = polish(
                task,
                student,
                iterations=effort.polish_iterations,
                jacobian_samples=samples,
                ridge=ridge,
                robust=effort.robust,
                rng=np.random.default_rng([self.seed, student.nfe, task.branches]),
                progress=tick,
            )
        return polished.student

    def _finish(self, kind: str, path: Sequence[int], student: Student) -> Fit:
        teacher = self.task.recording.teacher
        metadata = {
            "method": "olss",
            "variant": kind,
            "teacher": f"{teacher.metadata.get('method', 'plan')} {teacher.nfe}",
            "guidance_scale": repr(self.task.denoiser.guidance_scale),
            "path": json.dumps([int(i) for i in path]),
        }
        return Fit(kind, tuple(path), student.plan(self.task.schedule, metadata))


def with_rivals(analytic: Sequence[Plan], rivals: Sequence[Plan]) -> list[Plan]:
    """`analytic` and those deterministic `rivals` of the same NFE that are none of them up to single precision."""
    every = list(analytic)
    for rival in rivals:
        fits = rival.noises == 0 and rival.branches == 1 and not rival.models.any()
        if fits and rival.nfe == analytic[0].nfe and not any(same_sampler(rival, other) for other in every):
            every.append(rival)
    return every


def same_sampler(first: Plan, second: Plan) -> bool:
    """Whether two plans of one shape are equal up to single precision, as a captured DDIM and ours are."""
    scale = max(1.0, float(np.abs(first.rows).max()))
    return np.allclose(first.timesteps, second.timesteps, rtol=1e-6, atol=1e-3) and np.allclose(
        first.rows, second.rows, rtol=0.0, atol=1e-5 * scale
    )
