"""`olss_fast.tune`, the main job: record a teacher, plan paths, fit, polish, and accept on held-out noise.

For every number of steps asked for, several students are fitted and compared, on noise that no fit has seen, with
every analytic solver at the same number of network evaluations. The winner's plan is the result; a tuned plan is thus
never worse than the best analytic one on held-out data.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from olss_fast import planning, solvers
from olss_fast.errors import InputError, PlanFileError, StoreError
from olss_fast.fitting import Student, Task, on_policy, teacher_forced
from olss_fast.network import Conditioning, Denoiser, Network, check_noise
from olss_fast.noise_schedule import NoiseSchedule
from olss_fast.path_search import PathSearch, bent_paths
from olss_fast.plan import Plan
from olss_fast.polish import evaluations_of_jacobian, polish
from olss_fast.report import ANALYTIC, FITTED, KIND_NAMES, PUBLISHED, SPLIT, UNIFORM, UNPOLISHED, Candidate, Report
from olss_fast.rollout import roll
from olss_fast.scoring import expected_evaluations, tournament
from olss_fast.teacher import Split, Store, fingerprint, record

VERSION = 1  # of the fits in a store; raised whenever the same effort and seed would fit otherwise
RIDGES = (1e-7, 1e-5)
PUBLISHED_RIDGE = 1e-10  # as good as none, but a singular system still has an answer
PIXELS_PER_COEFFICIENT = 10
SHORTLIST = 6  # paths that are compared on all of `Effort.path_samples`, after a look at all on a quarter of them
LARGEST_CHUNK = 2**28  # bytes of basis in memory at once


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
class TuneResult:
    """`plans[n]` is the accepted plan of n network evaluations, `report` the whole table it won."""

    plans: dict[int, Plan]
    report: Report


@dataclass(frozen=True)
class Fit:
    """A fitted plan on its way to acceptance."""

    kind: str
    path: tuple[int, ...]
    plan: Plan


def tune(
    network: Network,
    *,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int | Sequence[int],
    teacher_steps: int = 100,
    teacher: Plan | None = None,
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    effort: Effort | None = None,
    held_out: int | None = None,
    batch_size: int | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    doubled: bool = True,
) -> TuneResult:
    """Search the best sampler of each number of `steps` (network evaluations) for `network`.

    `network(x, timestep, **conditioning)` returns the raw output for x (B, ...) at timestep (B,); `noise` (P, ...) is
    unit Gaussian, one sample a row, and arguments of the conditioning whose first dimension is P belong to the
    samples. The last `held_out` samples (default: a quarter) judge, an eighth stops the polish, all others are fitted
    on. The teacher is DDIM with `teacher_steps` evaluations unless a `teacher` plan is given. `store` is a folder for
    the recording and the finished fits: a killed run that is started again with the same folder resumes. The same
    `seed` gives bitwise the same plans on the same machine.

    Source: Duan et al., Optimal Linear Subspace Search, CIKM 2023; on-policy fit and polish as in `fitting` and
    `polish`. Raises `InputError`, `NetworkError`, `StoreError`.
    """
    check_noise(noise)
    _check_whole(seed=seed, least=0)
    _check_whole(batch_size=batch_size, held_out=held_out, least=1)
    teacher = teacher or _ddim(schedule, teacher_steps)
    wanted = _check_steps(steps, teacher.nfe)
    _check_teacher(teacher, schedule)
    denoiser = Denoiser(
        network,
        samples=noise.shape[0],
        conditioning=conditioning,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        doubled=doubled,
    )
    effort = effort or Effort()
    split = _split(noise, wanted, held_out)
    size = batch_size or _batch_size(teacher, noise)
    with torch.no_grad(), ExitStack() as stack:
        folder = Path(store) if store is not None else Path(stack.enter_context(TemporaryDirectory(prefix="olss-")))
        clock = Clock(denoiser, progress)
        opened = Store(folder, fingerprint(teacher, denoiser, noise, split, size))
        with clock.stage("record", f"Teacher, {teacher.nfe} steps", noise.shape[0] * teacher.nfe) as tick:
            recording = record(teacher, denoiser, noise, store=opened, split=split, batch_size=size, progress=tick)
        tuner = Tuner(Task(recording, denoiser, noise, schedule), effort, clock, seed)
        candidates = [each for n in wanted for each in tuner.candidates(n)]
    report = Report(
        candidates=tuple(candidates),
        teacher=teacher,
        held_out=len(split.held_out),
        settings=tuner.settings() | {"steps": wanted},
        evaluations=dict(clock.evaluations),
        seconds=dict(clock.seconds),
    )
    return TuneResult({n: report.best(n).plan for n in wanted}, report)


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
        bar = tqdm(total=total, desc=f"{title:<26}", unit="eval", unit_scale=True, delay=0.5, disable=not self.visible)
        with bar:
            yield bar.update
            bar.total = bar.n  # early stopping leaves some of the estimate unused
            bar.refresh()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.evaluations[name] = self.evaluations.get(name, 0) + self.denoiser.evaluations - before


@dataclass(frozen=True)
class Tuner:
    """Fits, polishes and judges the students of one recording."""

    task: Task
    effort: Effort
    clock: Clock
    seed: int

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
        analytic = solvers.candidates(self.task.schedule, steps)
        plans = [fit.plan for fit in fits] + analytic
        held_out = self.task.recording.split.held_out
        keep = range(len(fits))
        first = max(3, len(held_out) // 8)
        total = expected_evaluations(plans, len(held_out), first)
        with self.clock.stage("accept", f"{steps:>2} steps, {len(plans)} samplers", total) as tick:
            errors = tournament(plans, self.task, held_out, keep=keep, first=first, progress=tick)
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

    def _files(self, steps: int) -> dict[str, Path]:
        """Where the store keeps the fits of `steps`, by kind; the name holds everything they depend on."""
        key = hashlib.sha256(
            repr((VERSION, self.effort, self.seed, self.task.schedule.metadata())).encode()
        ).hexdigest()[:16]
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
                raise StoreError(str(error)) from error
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


def _check_whole(*, least: int, **values: object) -> None:
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (value is None and name != "seed"):
            raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _ddim(schedule: NoiseSchedule, steps: int) -> Plan:
    if steps < 1:
        raise InputError(f"teacher_steps must be at least 1, got {steps}")
    return solvers.ddim(schedule, steps, spacing="trailing")


def _check_teacher(teacher: Plan, schedule: NoiseSchedule) -> None:
    if teacher.noises or teacher.branches != 1 or teacher.models.any():
        raise InputError("a teacher must be a deterministic plan of one network with guidance inside its outputs")
    told = teacher.metadata.get("prediction_type", schedule.prediction_type)
    if told != schedule.prediction_type:
        raise InputError(f"the teacher is for prediction_type={told!r}, the schedule says {schedule.prediction_type!r}")


def _check_steps(steps: int | Sequence[int], most: int) -> list[int]:
    wanted: list[Any] = list(steps) if isinstance(steps, (list, tuple, range, np.ndarray)) else [steps]
    if not wanted or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in wanted):
        raise InputError(f"steps must be a whole number or a list of them, got {steps!r}")
    bad = [n for n in wanted if not 1 <= n <= most]
    if bad:
        raise InputError(f"steps must lie between 1 and the teacher's {most}, got {bad}")
    return sorted({int(n) for n in wanted})


def _split(noise: Tensor, steps: Sequence[int], held_out: int | None) -> Split:
    samples, pixels = noise.shape[0], noise[0].numel()
    judge = max(1, samples // 4) if held_out is None else held_out
    stop = max(1, samples // 8)
    coefficients = (max(steps) + 1) * (max(steps) + 2) // 2
    needed = max(1, -(-PIXELS_PER_COEFFICIENT * coefficients // pixels))
    if judge < 1 or samples - judge - stop < needed:
        raise InputError(
            f"{samples} noise samples are too few: {judge} are held out, {stop} stop the polish, and at least {needed} "
            f"must remain to fit {coefficients} coefficients ({PIXELS_PER_COEFFICIENT} pixels each). Give more noise"
        )
    return Split.of(samples, validation=stop, held_out=judge)


def _batch_size(teacher: Plan, noise: Tensor) -> int:
    """As many samples at once as keep a chunk's float64 and float32 basis below `LARGEST_CHUNK`, at most 64."""
    return int(min(64, max(1, LARGEST_CHUNK // (12 * teacher.columns * noise[0].numel()))))
