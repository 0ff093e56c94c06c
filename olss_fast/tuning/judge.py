"""Records a teacher, and scores plans by their distance to it: given ones, analytic solvers, and rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import NetworkError
from olss_fast.methods import ANALYTIC, kind_of, title_of
from olss_fast.network import Denoiser, OwnStart
from olss_fast.plan.plan import Plan
from olss_fast.report.report import Candidate
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.table import candidates, display_name
from olss_fast.support.arguments import checked_count
from olss_fast.tuning.clock import Clock
from olss_fast.tuning.fitting import Task
from olss_fast.tuning.recording import Split, probe, record
from olss_fast.tuning.scoring import expected_evaluations, kept_scores, plan_key, score, tournament
from olss_fast.tuning.store import Store, open_store
from olss_fast.tuning.teacher import MOST, Source, Teacher, grid_for, long_plan, measured_teacher

LARGEST_CHUNK = 2**28  # bytes of basis, in float64 and float32, in memory at once by default


@contextmanager
def recorded(
    source: Source,
    schedule: NoiseSchedule,
    *,
    most_steps: int = 0,
    clock: Clock,
    split: Split | None = None,
    store: str | Path | None = None,
    batch_size: int | None = None,
    check: Callable[[], object] = lambda: None,
) -> Iterator[Task]:
    """Runs the source's plan on all noise, and yields what fits and scores of the clock's denoiser need of it.

    Without a plan one is measured that is good enough for students of `most_steps` (`teacher.measured_teacher`).
    The recording lies in the folder `store`, or in a temporary one. All samples judge unless there is a `split`.
    `check` is called before that, unless an earlier run with the same store has passed it.
    Raises `InputError` for an unusable `batch_size`, `NetworkError`, `StoreError`.
    """
    denoiser, samples = clock.denoiser, clock.denoiser.samples
    split = split or Split(range(0), range(0), range(samples))
    teacher, theirs = source.plan, None if source.schedule is schedule else source.schedule
    grid = grid_for(teacher, schedule, theirs)
    columns = grid.columns + (teacher or grid).columns
    most = min(64, max(1, LARGEST_CHUNK // (12 * columns * denoiser.noise[0].numel())))
    size = most if batch_size is None else checked_count("batch_size", batch_size)
    question = {
        "teacher": (teacher.rows, teacher.timesteps) if teacher else "measured",
        "schedule": schedule,
        "split": (split.fit, split.validation, split.held_out, size),
        **denoiser.what_is_asked(),
    }
    if source.denoiser is not denoiser:
        question |= {"teacher_network": source.denoiser.networks[0], "teacher_schedule": source.schedule}
    with torch.no_grad(), ExitStack() as stack:
        with clock.stage("record", "Teacher", samples * (teacher or grid).nfe) as tick:
            opened = stack.enter_context(open_store(store, question, lambda: _probed(grid, denoiser, source)))
            if opened.empty:
                check()
            plan = teacher or _kept_teacher(opened, source, most_steps)
            kept = opened if teacher else opened.of(plan_key(plan))
            how: dict[str, Any] = {"store": kept, "split": split, "batch_size": size, "progress": tick}
            recording = record(Teacher(plan, grid, theirs), source.denoiser, schedule, **how)
        yield Task(recording, denoiser, schedule, fixed_start=isinstance(denoiser.networks[0], OwnStart))


def _kept_teacher(store: Store, source: Source, most_steps: int) -> Plan:
    """One that was measured for as many steps, or for more if there is one; otherwise it is measured now."""
    steps = next((n for n in range(most_steps, MOST) if store.has(f"teacher-{n:03d}")), most_steps)
    return store.plan(f"teacher-{steps:03d}", partial(measured_teacher, source.denoiser, source.schedule, steps))


def _probed(grid: Plan, denoiser: Denoiser, source: Source) -> Tensor:
    """The answers of the network, and of the source's if that is another. `NetworkError` if it cannot be asked."""
    answers = probe(grid, denoiser)
    if source.denoiser is denoiser:
        return answers
    try:
        others = probe(grid_for(None, source.schedule), source.denoiser)
    except Exception as error:  # whatever a foreign network raises
        raise NetworkError(
            f"teacher_network cannot be asked what network is, samples of shape {tuple(denoiser.noise.shape[1:])} with "
            f"the arguments {sorted(denoiser.conditioning)}: {type(error).__name__}: {error}"
        ) from error
    coarser = max(answers.dtype, others.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.cat([answers.to(coarser), others.to(coarser)], 1)


def own_run(task: Task, source: Source, clock: Clock) -> dict[str, Any]:
    """What a long run of the student's network reaches of another network's truth: "steps" and held-out "error" of the
    teacher's plan, or of one as long if that has another schedule. Empty if the truth is the network's own."""
    if source.denoiser is task.denoiser:
        return {}
    recording = task.recording
    plan, held_out = recording.teacher.plan, recording.split.held_out
    if recording.teacher.schedule is not None:
        plan = long_plan(task.schedule, plan.nfe)
    with clock.stage("own run", "Own long run", len(held_out) * plan.nfe):
        (errors,) = kept_scores(recording.store, [plan], "own", lambda: score([plan], task, held_out))
    error = float(errors.mean())
    return {"own_run": {"steps": plan.nfe, "error": error if np.isfinite(error) else None}}


@dataclass(frozen=True)
class Judge:
    """Scores plans on held-out noise, beside analytic solvers and `rivals`, those that an `OwnStart` admits.

    stage  what the report calls the work
    first  how many samples every plan is scored on before hopeless ones are dropped
    """

    task: Task
    clock: Clock
    rivals: Sequence[Plan]
    stage: str
    first: int

    def candidates(self, nfe: int, own: Sequence[Plan]) -> list[Candidate]:
        """All plans of `nfe` evaluations with their errors: first `own`, which are scored on all samples."""
        held_out, store = self.task.recording.split.held_out, self.task.recording.store
        network = self.task.denoiser.networks[0]
        others = with_rivals(candidates(self.task.schedule, nfe), self.rivals)
        if isinstance(network, OwnStart):
            others = list(filter(network.admits, others))
        plans = [*own, *(plan for plan in others if plan not in own)]
        total = expected_evaluations(plans, len(held_out), self.first)
        with self.clock.stage(self.stage, f"{nfe:>2} steps, {len(plans)} samplers", total):
            keep = range(len(own))
            errors = kept_scores(
                store,
                plans,
                f"tournament {len(own)} {self.first}",
                lambda: tournament(plans, self.task, held_out, keep=keep, first=self.first),
            )
        return [_candidate(plan, tuple(error)) for plan, error in zip(plans, errors, strict=True)]


def _candidate(plan: Plan, errors: tuple[float, ...]) -> Candidate:
    kind = kind_of(plan)
    name = display_name(plan) if kind == ANALYTIC else title_of(kind)
    return Candidate(name=name, kind=kind, spacing=plan.metadata.get("spacing", ""), plan=plan, errors=errors)


def with_rivals(analytic: Sequence[Plan], rivals: Sequence[Plan]) -> list[Plan]:
    """`analytic` and those deterministic `rivals` of the same NFE that differ from all of them in single precision."""
    every = list(analytic)
    for rival in rivals:
        fits = rival.noises == 0 and rival.branches == 1 and not rival.models.any()
        if fits and rival.nfe == analytic[0].nfe and not any(same_sampler(rival, other) for other in every):
            every.append(rival)
    return every


def same_sampler(first: Plan, second: Plan) -> bool:
    """True if two plans of one shape are equal up to single precision, like a captured DDIM and ours."""
    scale = max(1.0, float(np.abs(first.rows).max()))
    return np.allclose(first.timesteps, second.timesteps, rtol=1e-6, atol=1e-3) and np.allclose(
        first.rows, second.rows, rtol=0.0, atol=1e-5 * scale
    )
