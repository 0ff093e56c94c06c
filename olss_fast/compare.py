"""Score every analytic solver, and plans of one's own, against the same teacher at many numbers of evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from olss_fast import solvers
from olss_fast._arguments import check_prediction, checked_count, checked_plans, checked_schedule
from olss_fast._bounds import check_count
from olss_fast._progress import evaluation_bar
from olss_fast.errors import InputError
from olss_fast.fitting import Task
from olss_fast.network import Conditioning, Denoiser, Network, check_noise
from olss_fast.noise_schedule import NoiseSchedule
from olss_fast.plan import Plan
from olss_fast.report import ANALYTIC, FITTED, KIND_NAMES, Candidate, Report
from olss_fast.sampling import check_plan_fits
from olss_fast.scoring import expected_evaluations, tournament
from olss_fast.teacher import Recording, Split, record, recording_store
from olss_fast.tuner import with_rivals
from olss_fast.tuning import ddim_teacher, whole_steps

BATCH = 64
FIRST = 8  # samples on which every candidate is scored


def compare(
    network: Network,
    *,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: Sequence[int],
    plans: Iterable[Plan] = (),
    teacher_steps: int = 100,
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Report:
    """A report of all analytic solvers at each of `steps` evaluations, and of `plans`, on all of `noise` (P, ...).

    `plans` are scored at their own number of evaluations, together with the analytic solvers there. Arguments are
    those of `tune`. Raises `InputError`, `NetworkError`, `StoreError`.
    """
    check_noise(noise)
    plans = checked_plans(plans, "plans")
    wanted = sorted({*whole_steps(steps), *(plan.nfe for plan in plans)})
    _check(wanted, plans, checked_schedule(schedule))
    teacher = ddim_teacher(schedule, teacher_steps)
    if batch_size is not None:
        checked_count("batch_size", batch_size)
    denoiser = Denoiser(
        network,
        samples=noise.shape[0],
        conditioning=conditioning,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
    )
    return compare_denoiser(
        denoiser,
        noise=noise,
        schedule=schedule,
        steps=wanted,
        plans=plans,
        teacher=teacher,
        batch_size=batch_size,
        progress=progress,
    )


def compare_denoiser(
    denoiser: Denoiser,
    *,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: Sequence[int],
    plans: Sequence[Plan],
    teacher: Plan,
    rivals: Sequence[Plan] = (),
    admits: Callable[[Plan], bool] = lambda plan: True,
    batch_size: int | None = None,
    progress: bool = True,
) -> Report:
    """`compare` for a network that already has its conditioning; `rivals` are judged beside the analytic solvers, of
    all of these only what `admits` lets through."""
    for plan in plans:
        check_plan_fits(plan, denoiser)
    start = time.perf_counter()
    with torch.no_grad(), ExitStack() as stack:
        recording = _record(teacher, denoiser, noise, schedule, stack, batch_size or BATCH, progress)
        seconds, evaluations = {"record": time.perf_counter() - start}, {"record": denoiser.evaluations}
        task = Task(recording, denoiser, noise, schedule)
        candidates = [each for nfe in steps for each in _score(nfe, plans, rivals, admits, task, progress)]
    seconds["score"] = time.perf_counter() - start - seconds["record"]
    evaluations["score"] = denoiser.evaluations - evaluations["record"]
    settings = {"steps": list(steps), "teacher_steps": teacher.nfe, "guidance_scale": denoiser.guidance_scale}
    return Report(tuple(candidates), teacher, noise.shape[0], settings, evaluations, seconds)


def kind_of(plan: Plan) -> str:
    """The kind of candidate a plan is by its metadata: what `tune` wrote, else "analytic"."""
    if plan.metadata.get("method") != "olss":
        return ANALYTIC
    return plan.metadata.get("variant", FITTED)


def _check(steps: Sequence[int], plans: Sequence[Plan], schedule: NoiseSchedule) -> None:
    if not steps or steps[0] < 1:
        raise InputError(f"steps must be whole numbers of at least 1, got {list(steps)}")
    check_count(steps[-1], "steps holds")
    for plan in plans:
        check_prediction(plan, schedule)
        if plan.noises:
            raise InputError(
                f"the plan {solvers.display_name(plan)!r} draws fresh noise: no teacher's sample is its aim"
            )


def _record(
    teacher: Plan,
    denoiser: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    stack: ExitStack,
    batch_size: int,
    progress: bool,
) -> Recording:
    """The teacher's samples of all noise, in a folder that is there as long as `stack`."""
    samples = noise.shape[0]
    split = Split(range(0), range(0), range(samples))
    place = recording_store(None, teacher, denoiser, noise, schedule=schedule, split=split, batch_size=batch_size)
    with evaluation_bar(f"Teacher, {teacher.nfe} steps", samples * teacher.nfe, progress) as bar:
        store = stack.enter_context(place)
        return record(teacher, denoiser, noise, store=store, split=split, batch_size=batch_size, progress=bar.update)


def _score(
    nfe: int,
    plans: Sequence[Plan],
    rivals: Sequence[Plan],
    admits: Callable[[Plan], bool],
    task: Task,
    progress: bool,
) -> list[Candidate]:
    own = [plan for plan in plans if plan.nfe == nfe]
    analytic = with_rivals(solvers.candidates(task.schedule, nfe), rivals)
    everything = own + [plan for plan in analytic if plan not in own and admits(plan)]
    samples = range(task.noise.shape[0])
    total = expected_evaluations(everything, len(samples), FIRST)
    with evaluation_bar(f"{nfe:>2} NFE, {len(everything)} samplers", total, progress) as bar:
        errors = tournament(everything, task, samples, keep=range(len(own)), first=FIRST, progress=bar.update)
        bar.total = bar.n
    return [_candidate(plan, tuple(error)) for plan, error in zip(everything, errors, strict=True)]


def _candidate(plan: Plan, errors: tuple[float, ...]) -> Candidate:
    kind = kind_of(plan)
    name = solvers.display_name(plan) if kind == ANALYTIC else KIND_NAMES.get(kind, kind)
    return Candidate(name=name, kind=kind, spacing=plan.metadata.get("spacing", ""), plan=plan, errors=errors)
