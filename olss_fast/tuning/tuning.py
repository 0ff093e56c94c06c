"""`olss_fast.tune`, the main job: record a teacher, plan paths, fit, polish, and accept on held-out noise.

For every number of steps asked for, several students are fitted and compared, on noise that no fit has seen, with
every analytic solver at the same number of network evaluations. The winner's plan is the result; a tuned plan is thus
never worse than the best analytic one on held-out data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.methods import METHODS, OLSS, Method
from olss_fast.network import Conditioning, Denoiser, Network
from olss_fast.plan.plan import Plan, checked_plans
from olss_fast.report.report import Candidate, Report
from olss_fast.sampling.checking import checked
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.tape import check_whole
from olss_fast.support.arguments import checked_count
from olss_fast.support.identity import digest
from olss_fast.tuning.clock import Clock
from olss_fast.tuning.judge import Judge, own_run, recorded
from olss_fast.tuning.preparation import split_samples, steps_to_teach
from olss_fast.tuning.study import Effort, Study
from olss_fast.tuning.teacher import Source, checked_source, grid_for

__all__ = ["Effort", "TuneResult", "tune"]

VERSION = 1  # of the plans in a store; raised whenever the same effort and seed would make others


@dataclass(frozen=True)
class TuneResult:
    """`plans[n]` is the accepted plan of n network evaluations, `report` the whole table it won."""

    plans: dict[int, Plan]
    report: Report


def tune(
    network: Network,
    *,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int | Sequence[int],
    teacher_steps: int | None = None,
    teacher: Plan | None = None,
    teacher_network: Network | None = None,
    teacher_schedule: NoiseSchedule | None = None,
    rivals: Sequence[Plan] = (),
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
    on. The teacher is the cheapest plan whose own error is a tenth of what students can reach, found by measurement on
    a few samples (`teacher`); or DDIM with `teacher_steps` evaluations; or the plan `teacher`. With `teacher_network`
    it asks that one, with the same arguments: the full network whose samples a quantised, pruned or smaller one is to
    make. Students are run and fitted on `network` alone. `teacher_schedule` is the schedule of that network if its
    noise levels or prediction type are others: states are compared at equal noise.

    `rivals` are plans that are judged beside the analytic ones, each at its own number of evaluations. `store` is a
    folder for the recording, the finished fits and their judgement: a killed run that is started again with the same
    folder resumes, and one that asks something else (another weight, attribute, argument, schedule; see `identity`) is
    refused by name. Other `steps` may be asked: a teacher that was measured for more is good enough, otherwise one is
    measured. The same `seed` gives bitwise the same plans on the same machine.

    A short run tells whether network and schedule belong together (`sampling.checking`): a HookUpWarning or
    `NetworkError` says which of the usual mistakes was made.

    Source: Duan et al., Optimal Linear Subspace Search, CIKM 2023; on-policy fit and polish as in `fitting` and
    `polish`. Raises `InputError`, `NetworkError`, `StoreError`.
    """
    denoiser = Denoiser(
        network,
        noise,
        conditioning=conditioning,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        doubled=doubled,
    )
    checked_count("seed", seed, least=0)
    if effort is not None and not isinstance(effort, Effort):
        raise InputError(f"effort is {effort!r}; expected an Effort, such as Effort.light(), or None")
    if store is not None and not isinstance(store, (str, Path)):
        raise InputError(f"store is {store!r}; expected a folder")
    if held_out is not None:
        checked_count("held_out", held_out)
    source = checked_source(denoiser, schedule, teacher_network, teacher_schedule, teacher, teacher_steps)
    wanted = steps_to_teach(steps, grid_for(source.plan, schedule, source.schedule).nfe)
    rivals = checked_plans(rivals, "rivals")
    for rival in rivals:
        check_whole(schedule, rival.timesteps, "a rival's timesteps")
    split, clock = split_samples(noise, wanted, held_out), Clock(denoiser, progress)
    effort = effort or Effort()
    how: dict[str, Any] = {"split": split, "store": store, "batch_size": batch_size}
    how["check"] = partial(_check, source, denoiser, schedule)
    with recorded(source, schedule, most_steps=wanted[-1], clock=clock, **how) as task:
        teacher = task.recording.teacher.plan
        judge = Judge(task, clock, rivals, stage="accept", first=max(3, len(split.held_out) // 8))
        candidates = [each for n in wanted for each in _candidates(Study(task, effort, clock, seed, n), judge)]
        own = own_run(task, source, clock)
    settings = {
        "samples": {name: len(part) for name, part in vars(split).items()},
        "teacher_steps": teacher.nfe,
        "guidance_scale": denoiser.guidance_scale,
        "schedule": schedule.metadata(),
        "effort": asdict(effort),
        "seed": seed,
        "steps": wanted,
        **own,
    }
    spent = dict(clock.evaluations), dict(clock.seconds)
    report = Report(tuple(candidates), teacher, len(split.held_out), settings, *spent)
    return TuneResult({n: report.best(n).plan for n in wanted}, report)


def _check(source: Source, denoiser: Denoiser, schedule: NoiseSchedule) -> None:
    """The hook-up of the network, and of the source's if that is another."""
    if source.denoiser is not denoiser:
        checked(source.denoiser, source.schedule, "teacher_network: ")
    checked(denoiser, schedule)


def _candidates(study: Study, judge: Judge) -> list[Candidate]:
    """Every method's plan and every analytic one, scored, the winner marked."""
    plans = [_made(study, kind, method) for kind, method in METHODS.items() if method.offered(study)]
    scored = judge.candidates(study.steps, plans)
    for i, plan in enumerate(plans):
        path = json.loads(plan.metadata["path"]) if "path" in plan.metadata else None
        scored[i] = replace(scored[i], spacing="fitted", path=path)
    winner = min(range(len(scored)), key=lambda i: (-scored[i].samples, scored[i].mean))
    scored[winner] = replace(scored[winner], accepted=True)
    return scored


def _made(study: Study, kind: str, method: Method) -> Plan:
    """The method's plan: of an earlier run with the same store, effort and seed, or made now and kept there."""
    task, teacher = study.task, study.task.recording.teacher.plan

    def make() -> Plan:
        plan = method.make(study)
        facts = {
            "variant" if plan.metadata.get("method") == OLSS else "kind": kind,
            "teacher": f"{teacher.metadata.get('method', 'plan')} {teacher.nfe}",
            "guidance_scale": repr(task.denoiser.guidance_scale),
        }
        return plan.replace(metadata={**plan.metadata, **facts})

    key = digest(repr((VERSION, study.effort, study.seed, task.fixed_start)))[:16]
    return task.recording.store.plan(f"fit-{study.steps:03d}-{kind}-{key}", make)
