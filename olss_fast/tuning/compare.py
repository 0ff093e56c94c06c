"""Score all analytic solvers, and given plans, against one teacher at several numbers of evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.network import Conditioning, Denoiser, Network
from olss_fast.plan.plan import Plan, checked_plans
from olss_fast.report.report import Report
from olss_fast.sampling.sampling import check_plan_fits
from olss_fast.schedule.fits import check_prediction
from olss_fast.schedule.noise_schedule import NoiseSchedule, checked_schedule
from olss_fast.solvers.table import display_name
from olss_fast.support.arguments import check_count
from olss_fast.tuning.clock import Clock
from olss_fast.tuning.judge import Judge, own_run, recorded
from olss_fast.tuning.preparation import whole_steps
from olss_fast.tuning.teacher import checked_source

FIRST = 8  # samples on which every candidate is scored


def compare(
    network: Network | Sequence[Network],
    *,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: Sequence[int],
    plans: Iterable[Plan] = (),
    teacher_steps: int | None = None,
    teacher: Plan | None = None,
    teacher_network: Network | None = None,
    teacher_schedule: NoiseSchedule | None = None,
    rivals: Sequence[Plan] = (),
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Report:
    """A report of all analytic solvers at each of `steps` evaluations, and of `plans`, on all of `noise` (P, ...).

    `plans` are scored at their own number of evaluations, together with the analytic solvers and `rivals` there, which
    ask the first of several networks, as the teacher does. Arguments are those of `tune`.

    Raises `InputError`, `NetworkError`, `StoreError`.
    """
    plans, rivals = checked_plans(plans, "plans"), checked_plans(rivals, "rivals")
    wanted = sorted({*whole_steps(steps), *(plan.nfe for plan in plans)})
    _check(wanted, plans, checked_schedule(schedule))
    denoiser = Denoiser(
        network, noise, conditioning=conditioning, unconditional=unconditional, guidance_scale=guidance_scale
    )
    source = checked_source(denoiser, schedule, teacher_network, teacher_schedule, teacher, teacher_steps)
    for plan in plans:
        check_plan_fits(plan, denoiser)
    clock = Clock(denoiser, progress)
    with recorded(source, schedule, most_steps=wanted[-1], clock=clock, batch_size=batch_size) as task:
        teacher = task.recording.teacher.plan
        judge = Judge(task, clock, rivals, stage="score", first=FIRST)
        candidates = [
            each for nfe in wanted for each in judge.candidates(nfe, [plan for plan in plans if plan.nfe == nfe])
        ]
        own = own_run(task, source, clock)
    settings = {"steps": wanted, "teacher_steps": teacher.nfe, "guidance_scale": denoiser.guidance_scale, **own}
    return Report(tuple(candidates), teacher, denoiser.samples, settings, dict(clock.evaluations), dict(clock.seconds))


def _check(steps: Sequence[int], plans: Sequence[Plan], schedule: NoiseSchedule) -> None:
    if not steps or steps[0] < 1:
        raise InputError(f"steps must be whole numbers of at least 1, got {list(steps)}")
    check_count(steps[-1], "steps holds")
    for plan in plans:
        check_prediction(plan, schedule)
        if plan.noises:
            raise InputError(f"the plan {display_name(plan)!r} draws fresh noise: no teacher's sample is its aim")
