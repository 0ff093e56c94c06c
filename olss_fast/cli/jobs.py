"""What `olss-fast tune`, `compare`, `sample`, `export-onnx` and `build` do: for a model by name, and the
first three for a pipeline with a file of prompts too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from olss_fast.cli.model import (
    DEMO,
    Model,
    arguments,
    draw_noise,
    load_model,
    pick_labels,
    sample_images,
    solver_plan,
    tuned_guidance,
)
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.report.report import Report
from olss_fast.support.arguments import check_prediction
from olss_fast.support.progress import bar_options, can_draw
from olss_fast.tuning import compare, tuning

if TYPE_CHECKING:
    from olss_fast.engine.engine import Engine

PROMPTED_SAMPLES = 64  # of a pipeline; its latents have many values each
SAMPLES = 256
BATCH = 64  # images of a model that are sampled at once


@dataclass(frozen=True)
class Subject:
    """Which model a command is about, and how it is asked: `prompts` makes it a pipeline that takes prompts."""

    model: str
    prompts: Path | None = None
    device: str | None = None
    dtype: str | None = None
    null_class: int | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        if scale is not None and not 0.0 <= scale < math.inf:
            raise InputError(f"--guidance-scale is {scale}: expected a number of at least 0")
        if self.prompts is not None and self.null_class is not None:
            raise InputError("--null-class is for class-conditional models: leave it out with --prompts")
        if self.prompts is not None and self.model == DEMO:
            raise InputError("the demo takes no prompts: leave --prompts out for it")

    def pipeline(self, samples: int, plans: Sequence[Plan] = ()) -> tuple[Any, list[dict[str, Any]]]:
        """The pipeline and its calls. The prompts are read first: they cost nothing to get wrong."""
        from olss_fast.adapters.diffusers.folders import load_any_pipeline, silence
        from olss_fast.adapters.diffusers.pipeline_calls import prompt_calls, read_prompts

        if self.prompts is None:
            raise InputError("a pipeline needs --prompts FILE")
        texts = read_prompts(self.prompts)
        if not (self.progress and can_draw()):
            silence()
        pipe = load_any_pipeline(self.model, device=self.device, dtype=self.dtype)
        scale = self._scale(plans)
        calls = prompt_calls(pipe, texts, samples, guidance_scale=scale, batch_size=self.batch_size, seed=self.seed)
        return pipe, calls

    def _scale(self, plans: Sequence[Plan]) -> float | None:
        return tuned_guidance(plans, self.guidance_scale)

    def load(self) -> Model:
        if self.dtype is not None:
            raise InputError("--dtype belongs to --prompts: other models run in float32")
        return load_model(self.model, device=self.device, null_class=self.null_class)

    def arguments(self, loaded: Model, samples: int, plans: Sequence[Plan] = ()) -> dict[str, Any]:
        """Noise, conditioning and guidance of `samples` samples, for `tune` and `compare`."""
        return {
            "noise": draw_noise(loaded, samples, self.seed),
            "schedule": loaded.schedule,
            "batch_size": self.batch_size,
            "progress": self.progress,
            **arguments(loaded, pick_labels(loaded, samples), self._scale(plans)),
        }


def tune(
    subject: Subject,
    steps: Sequence[int],
    teacher_steps: int,
    *,
    samples: int | None,
    guidance_scales: Sequence[float] | None,
    light: bool,
    store: Path | None,
) -> tuning.TuneResult:
    """`olss_fast.tune`, or `tune_pipeline` where there are prompts."""
    effort = tuning.Effort.light() if light else tuning.Effort()
    if subject.prompts is None:
        if guidance_scales is not None:
            raise InputError("--guidance-range belongs to --prompts: give one --guidance-scale")
        loaded = subject.load()
        return tuning.tune(
            loaded.network,
            steps=steps,
            teacher_steps=teacher_steps,
            effort=effort,
            store=store,
            seed=subject.seed,
            **subject.arguments(loaded, samples or SAMPLES),
        )
    from olss_fast.adapters.diffusers.pipeline_tuning import tune_pipeline

    if guidance_scales is not None and subject.guidance_scale is not None:
        raise InputError("--guidance-scale and --guidance-range: give one of them")
    pipe, calls = subject.pipeline(samples or PROMPTED_SAMPLES)
    return tune_pipeline(
        pipe,
        calls,
        steps,
        teacher_steps,
        guidance_scales=guidance_scales,
        effort=effort,
        store=store,
        seed=subject.seed,
        progress=subject.progress,
    )


def compare_with(
    subject: Subject, steps: Sequence[int], teacher_steps: int, *, samples: int, plans: Sequence[Plan]
) -> Report:
    """`olss_fast.tuning.compare`, or `compare_pipeline` where there are prompts."""
    if subject.prompts is None:
        loaded = subject.load()
        return compare.compare(
            loaded.network,
            steps=steps,
            plans=plans,
            teacher_steps=teacher_steps,
            **subject.arguments(loaded, samples, plans),
        )
    from olss_fast.adapters.diffusers.pipeline_tuning import compare_pipeline

    pipe, calls = subject.pipeline(samples, plans)
    return compare_pipeline(
        pipe, calls, steps, plans=plans, teacher_steps=teacher_steps, seed=subject.seed, progress=subject.progress
    )


def sample(
    subject: Subject, plan: Plan | None, solver: Mapping[str, Any], count: int, classes: Sequence[int]
) -> tuple[NDArray[np.float32], int, list[str]]:
    """(P, C, H, W) images in [-1, 1] by `plan`, or by the analytic solver with these settings; their NFE, and what each
    is of: its class or prompt, else its number."""
    if subject.prompts is None:
        loaded = subject.load()
        chosen = plan or solver_plan(loaded.schedule, solver)
        images = sample_images(
            chosen,
            loaded,
            count,
            classes=classes,
            guidance_scale=subject.guidance_scale,
            batch_size=subject.batch_size or BATCH,
            seed=subject.seed,
            progress=subject.progress,
        )
        names = getattr(loaded, "class_names", ())
        asked = pick_labels(loaded, count, classes) or range(count)
        return images, chosen.nfe, [names[each] if names else f"{each}" for each in asked]
    if classes:
        raise InputError("--classes are for class-conditional models: leave them out with --prompts")
    from olss_fast.adapters.diffusers.pipeline_calls import pipeline_images
    from olss_fast.adapters.diffusers.pipeline_slot import schedule_of
    from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler

    pipe, calls = subject.pipeline(count, [] if plan is None else [plan])
    chosen = plan or solver_plan(schedule_of(pipe.scheduler), solver)
    pipe.scheduler = PlanScheduler.from_pipe(pipe, chosen)
    pipe.set_progress_bar_config(**bar_options(subject.progress))
    prompts = [prompt for call in calls for prompt in call["prompt"]]
    return pipeline_images(pipe, calls, chosen.nfe), chosen.nfe, prompts


def export_onnx(subject: Subject, plan: Plan | None, solver: Mapping[str, Any], path: Path) -> Plan:
    """Writes the model of `plan`, or of the analytic solver with these settings; and returns its plan."""
    from olss_fast.onnx.export import export_onnx as export

    loaded = subject.load()
    chosen = plan or solver_plan(loaded.schedule, solver)
    check_prediction(chosen, loaded.schedule)
    scale = tuned_guidance([chosen], subject.guidance_scale)
    how = arguments(loaded, pick_labels(loaded, 2), scale)
    network: Any = loaded.network
    export(network, chosen, path, shape=(2, *loaded.shape), **how)
    return chosen


def build_engine(
    subject: Subject,
    plans: Sequence[Plan],
    steps: Sequence[int],
    solver: Mapping[str, Any],
    batches: Sequence[int],
    *,
    dtype: str | None,
    cache: bool,
) -> Engine:
    """An engine with these plans, and with one of the analytic solver for each of `steps`.

    batches: how many samples at least, usually and at most.
    """
    from olss_fast.compiling.shapes import Profile
    from olss_fast.engine.building import build

    loaded = subject.load()
    for plan in plans:
        check_prediction(plan, loaded.schedule)
    chosen = [*plans, *(solver_plan(loaded.schedule, {**solver, "steps": nfe}) for nfe in steps)]
    scale = tuned_guidance(chosen, subject.guidance_scale)
    how = arguments(loaded, pick_labels(loaded, batches[1]), scale)
    network: Any = loaded.network
    return build(
        network,
        chosen,
        shapes=Profile(*((batch, *loaded.shape) for batch in batches)),
        dtype=None if dtype is None else getattr(torch, dtype),
        cache=cache,
        progress=subject.progress,
        **how,
    )
