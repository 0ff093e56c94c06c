"""`olss_fast.tune_pipeline`: tune samplers for a whole diffusers pipeline, whatever it is conditioned on.

    calls = [{"prompt": prompt} for prompt in prompts]
    result = olss_fast.tune_pipeline(pipe, calls, steps=[5, 8])
    pipe.scheduler = olss_fast.PlanScheduler.from_pipe(pipe, result.plans.values())
    image = pipe("a red fox", num_inference_steps=5).images[0]

The pipeline is evaluated through its scheduler slot (`pipeline_network`), so guidance, ControlNets, image conditioning
and video work as in normal use; the tuning itself is that of `tuning`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from tqdm import tqdm

from olss_fast import solvers
from olss_fast.adapters.diffusers.pipeline_calls import Call, argument, check_calls, guidance_scales_of, with_guidance
from olss_fast.adapters.diffusers.pipeline_network import PipelineNetwork, open_pipeline
from olss_fast.capturing.capturing import capture
from olss_fast.errors import InputError
from olss_fast.methods import ANALYTIC
from olss_fast.network import Denoiser
from olss_fast.plan.plan import Plan, checked_plans
from olss_fast.report.report import GuidanceRow, Report
from olss_fast.support.arguments import check_steps, checked_count
from olss_fast.support.progress import bar_options, evaluation_bar
from olss_fast.tuning.clock import Clock
from olss_fast.tuning.compare import compare
from olss_fast.tuning.judge import recorded
from olss_fast.tuning.preparation import steps_to_teach
from olss_fast.tuning.recording import Float64
from olss_fast.tuning.scoring import kept_scores, plan_key, score
from olss_fast.tuning.teacher import Source
from olss_fast.tuning.tuning import Effort, TuneResult, tune

GRID = 100  # timesteps that the pipeline is offered to begin at
SWEEP_SAMPLES = 8  # held-out samples to try other guidance scales on
SWEEP = (2 / 3, 1.0, 4 / 3)  # of the tuned scale
NONLINEAR = ("clip_sample", "thresholding")  # switched off in captured rivals


def tune_pipeline(
    pipe: Any,
    calls: Sequence[Call],
    steps: int | Sequence[int] = (5, 8),
    teacher_steps: int | None = None,
    *,
    teacher_pipe: Any = None,
    teacher_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    guidance_scales: Sequence[float] | None = None,
    effort: Effort | None = None,
    held_out: int | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    whole_times: bool = False,
) -> TuneResult:
    """Search the best sampler of each number of `steps` for `pipe`, a diffusers pipeline with a scheduler.

    `calls` are keyword arguments of `pipe(...)`: prompt, image, generator, guidance_scale, …; a call of several images
    counts as that many samples, evaluated together. Give a few dozen that are typical of later use; the last quarter of
    the samples is held out. With `guidance_scales` the calls take these in turn, and the plans are tuned across them.
    The teacher is measured as in `tune`, or DDIM with `teacher_steps` evaluations; the samples are those of
    `teacher_pipe`, called the same, if there is one: the full pipeline of a quantised one, or `pipe` itself with
    something switched off within `teacher_context()`, adapters for one. With a `strength` below 1
    (image-to-image) it is DDIM (of 100 steps by default) from where the calls begin, and the plans are for that
    strength. Rivals are all analytic solvers, and the pipeline's own scheduler
    and its `compatibles`, captured. `store` is a folder for the recording: a killed run that is started again with the
    same folder resumes. With `whole_times` plans ask at whole timesteps only, as some programs need that run them. The
    pipeline is restored afterwards, also after an error; nothing is decoded.

    The result's report shows the error at guidance scales around the tuned ones (`report.guidance`), but not with a
    `teacher_pipe`.

    Cannot be tuned: pipelines whose guidance changes with the step index (detected at the second step, and by arguments
    such as control_guidance_end), or that change the latents' shape.

    Raises `InputError` (calls that fail, or differ in size, strength or shift), `NetworkError`, `ScheduleError` (the
    scheduler's noise levels are of an unknown kind), `StoreError`.
    """
    calls = check_calls(pipe, calls)
    grid = check_steps(GRID if teacher_steps is None else teacher_steps, "teacher_steps")
    wanted = steps_to_teach(steps, grid)
    if guidance_scales is not None:
        calls = with_guidance(pipe, calls, guidance_scales)
    with ExitStack() as stack:
        network, how = stack.enter_context(_opened(pipe, calls, grid, seed, progress))
        how["schedule"] = network.schedule = replace(network.schedule, whole_times=whole_times)
        full = network
        if teacher_pipe is not None:
            theirs = check_calls(teacher_pipe, calls)
            full, _ = stack.enter_context(_opened(teacher_pipe, theirs, grid, seed, progress, teacher_context))
            how |= _teaching(full, network)
        begun = sum(each.evaluations for each in {network, full})
        result = tune(
            network,
            **how,
            steps=wanted,
            teacher=None if teacher_steps is None and not network.begin else teacher_of(full),
            rivals=captured_rivals(pipe.scheduler, wanted, network),
            effort=effort,
            held_out=held_out,
            store=store,
            seed=seed,
            progress=progress,
        )
        result = _labelled(result, pipe, calls, network)
        places = [place.call for place in network.places[-result.report.held_out :]]
    judges = sorted(set(places))[-SWEEP_SAMPLES:]
    start = time.perf_counter()
    rows, asked = list[GuidanceRow](), 0
    if teacher_pipe is None:
        rows, asked = sweep_guidance(
            pipe, calls, judges, result.report, grid, store=store, seed=seed, progress=progress
        )
    report = replace(
        result.report,
        guidance=tuple(rows),
        evaluations={"calls": begun, **result.report.evaluations, "guidance": asked},
        seconds={**result.report.seconds, "guidance": time.perf_counter() - start},
    )
    return replace(result, report=report)


def compare_pipeline(
    pipe: Any,
    calls: Sequence[Call],
    steps: Sequence[int],
    *,
    plans: Iterable[Plan] = (),
    teacher_steps: int | None = None,
    seed: int = 1000,
    progress: bool = True,
) -> Report:
    """All analytic solvers, the pipeline's own scheduler and its `compatibles`, and `plans`, on the samples of `calls`.

    Arguments and errors as in `tune_pipeline`; `plans` are scored at their own NFE.
    """
    calls, plans = check_calls(pipe, calls), checked_plans(plans, "plans")
    grid = check_steps(GRID if teacher_steps is None else teacher_steps, "teacher_steps")
    wanted = sorted({*steps_to_teach(list(steps), grid), *(plan.nfe for plan in plans)})
    with _opened(pipe, calls, grid, seed, progress) as (network, how):
        return compare(
            network,
            **how,
            steps=wanted,
            plans=plans,
            teacher=None if teacher_steps is None and not network.begin else teacher_of(network),
            rivals=captured_rivals(pipe.scheduler, wanted, network),
            progress=progress,
        )


def teacher_of(network: PipelineNetwork) -> Plan:
    """DDIM on the grid, from where the calls begin."""
    times = network.sessions[0].slot.times.double().numpy()
    return solvers.ddim(network.schedule, timesteps=times[network.begin :])


@contextmanager
def _opened(
    pipe: Any,
    calls: Sequence[Call],
    grid: int,
    seed: int,
    progress: bool,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[PipelineNetwork, dict[str, Any]]]:
    """The pipeline as a network, and its arguments: the conditioning is the index of the sample."""
    checked_count("seed", seed, least=0)
    bar = evaluation_bar("Calls", None, progress)
    with bar, open_pipeline(pipe, calls, teacher_steps=grid, seed=seed, progress=bar.update, within=within) as network:
        bar.close()
        samples = torch.arange(network.start.shape[0], device="cpu")
        yield network, {"noise": network.start, "schedule": network.schedule, "conditioning": {"sample": samples}}


def _teaching(full: PipelineNetwork, network: PipelineNetwork) -> dict[str, Any]:
    """The arguments of `tune` by which the samples of `full` are the aim. InputError unless both begin alike."""
    shapes = tuple(full.start.shape), tuple(network.start.shape)
    alike = full.places == network.places and shapes[0] == shapes[1]
    if not alike or full.begin or network.begin or not torch.allclose(full.start.to(network.start), network.start):
        raise InputError(
            f"teacher_pipe begins otherwise than pipe: latents {shapes[0]} and {shapes[1]}, evaluations {full.begin} "
            f"and {network.begin}. Both must begin with the same noise, at strength 1"
        )
    same = full.schedule.describe() == network.schedule.describe()
    return {"teacher_network": full, "teacher_schedule": None if same else full.schedule}


def captured_rivals(scheduler: Any, steps: Sequence[int], network: PipelineNetwork) -> list[Plan]:
    """Plans of `scheduler` and of its `compatibles` with its settings, at each number of evaluations of `steps`.

    Without those that cannot be captured, draw fresh noise, have another noise schedule, or ask between the timesteps
    where whole ones are wanted; clipping is switched off.
    Empty if the calls begin with noisy images: schedulers then begin at other timesteps.
    """
    if network.begin:
        return []
    schedule = network.schedule.metadata()["schedule"]
    kin = sorted(getattr(scheduler, "compatibles", []), key=lambda kind: str(kind.__name__))  # sets are unordered
    classes = dict.fromkeys([type(scheduler), *kin])
    off = {name: False for name in NONLINEAR if scheduler.config.get(name)}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # settings that a class does not have need no warning here
    try:
        found = [_captured_at(kind, scheduler, off, nfe) for kind in classes for nfe in steps]
    finally:
        logging.set_verbosity(verbosity)
    fitting = [plan for plan in found if plan and not plan.noises and plan.metadata.get("schedule") == schedule]
    return [plan for plan in fitting if not network.schedule.whole_times or not np.any(plan.timesteps % 1.0)]


def _captured_at(kind: Any, scheduler: Any, off: Mapping[str, bool], nfe: int) -> Plan | None:
    """The plan of a scheduler class with `nfe` evaluations: PNDM needs one more than its steps, Heun twice as many."""
    for steps in dict.fromkeys([nfe, nfe - 1, (nfe + 1) // 2]):
        with suppress(Exception):  # settings or steps that this class does not take: one rival less
            plan = capture(kind.from_config(scheduler.config, **off), steps)
            if plan.nfe == nfe:
                return plan
    return None


def _labelled(result: TuneResult, pipe: Any, calls: Sequence[Call], network: PipelineNetwork) -> TuneResult:
    """The result, with the pipeline, guidance scale and start in the plans' metadata."""
    scales = guidance_scales_of(pipe, calls)
    facts = {"pipeline": type(pipe).__name__, **network.full_schedule.metadata()}
    if scales:
        facts["guidance_scale"] = " to ".join(dict.fromkeys(repr(scale) for scale in (scales[0], scales[-1])))
    if network.begin and (strength := argument(pipe, calls[0], "strength")) is not None:
        facts["strength"] = repr(float(strength))
    places: dict[int, dict[str, str]] = {}
    for nfe in {*result.plans, result.report.teacher.nfe} if network.begin else ():
        steps, begin = network.steps_for(nfe)
        places[nfe] = {"num_inference_steps": str(steps), "begin": str(begin)} if begin else {}

    def label(plan: Plan) -> Plan:
        return plan.replace(metadata={**plan.metadata, **facts, **places.get(plan.nfe, {})})

    candidates = tuple(replace(each, plan=label(each.plan)) for each in result.report.candidates)
    settings = {**result.report.settings, "guidance_scale": list(scales), "pipeline": type(pipe).__name__}
    teacher = result.report.teacher if result.report.own_run else label(result.report.teacher)
    report = replace(result.report, candidates=candidates, settings=settings, teacher=teacher)
    return TuneResult({nfe: label(plan) for nfe, plan in result.plans.items()}, report)


def sweep_guidance(
    pipe: Any,
    calls: Sequence[Call],
    judges: Sequence[int],
    report: Report,
    grid: int,
    *,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[GuidanceRow], int]:
    """Errors of the accepted plans and of the best analytic ones at guidance scales around the tuned, on some calls.

    Each scale has its own teacher. Empty if the pipeline is not guided. Also returns the evaluations made.
    """
    tuned = guidance_scales_of(pipe, calls)
    if not tuned or tuned[-1] <= 1.0:
        return [], 0
    scales = sorted({round(tuned[0] * SWEEP[0], 3), *tuned, round(tuned[-1] * SWEEP[-1], 3)})
    plans = [plan for nfe in report.nfes for plan in (report.best(nfe).plan, report.best(nfe, ANALYTIC).plan)]
    rows, asked = [], 0
    for scale in tqdm(scales, desc=f"{'Guidance scales':<26}", **bar_options(progress)):
        chosen = with_guidance(pipe, [calls[i] for i in judges], [scale])
        folder = None if store is None else Path(store) / f"guidance-{scale:g}-{plan_key(report.teacher)}"
        errors, evaluations = _errors(pipe, chosen, plans, report.teacher, grid, folder, seed + len(calls))
        asked += evaluations
        means = [float(each.mean()) for each in errors]
        rows += [
            GuidanceRow(scale, nfe, *pair)
            for nfe, pair in zip(report.nfes, zip(means[::2], means[1::2], strict=True), strict=True)
        ]
    return rows, asked


def _errors(
    pipe: Any, calls: Sequence[Call], plans: Sequence[Plan], teacher: Plan, grid: int, store: Path | None, seed: int
) -> tuple[list[Float64], int]:
    """Per-sample errors of `plans` to `teacher`, on new noise where the calls have no generator; and evaluations."""
    with _opened(pipe, calls, grid, seed, progress=False) as (network, how):
        denoiser = Denoiser(network, how["noise"], conditioning=how["conditioning"])
        clock, size = Clock(denoiser, visible=False), denoiser.samples
        source = Source(denoiser, network.schedule, teacher)
        opened = recorded(source, network.schedule, clock=clock, store=store, batch_size=size)
        with opened as task:
            samples = task.recording.split.held_out
            errors = kept_scores(task.recording.store, plans, "all", lambda: score(plans, task, samples))
        return errors, network.evaluations
