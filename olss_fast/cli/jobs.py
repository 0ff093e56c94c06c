"""The work behind the commands of `olss-fast`, for a network in a folder or a pipeline with a file of prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import olss_fast
from olss_fast.cli.model import DEMO, Model, arguments, draw_noise, load_model, pick_labels, solver_plan, tuned_guidance
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.report.report import Report
from olss_fast.sampling.sampling import sample
from olss_fast.schedule.fits import check_prediction
from olss_fast.support.progress import bar_options, can_draw
from olss_fast.tuning.compare import compare

if TYPE_CHECKING:
    from olss_fast.engine.engine import Engine

BATCH = 64  # images sampled at once
Images = tuple[NDArray[np.float32], int, list[str]]
"""(P, C, H, W) in [-1, 1], their NFE, and a label for each: its class or prompt, else its number."""


@dataclass(frozen=True)
class Subject:
    """The model of a command, with its settings."""

    model: str
    device: str | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        if scale is not None and not 0.0 <= scale < math.inf:
            raise InputError(f"--guidance-scale is {scale}: expected a number of at least 0")

    def scale(self, plans: Sequence[Plan]) -> float | None:
        """The guidance scale given, else that of the plans."""
        return tuned_guidance(plans, self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class NetworkSubject(Subject):
    """A network in a folder, or the embedded model."""

    null_class: int | None = None

    @cached_property
    def loaded(self) -> Model:
        """The model, loaded once."""
        return load_model(self.model, device=self.device, null_class=self.null_class)

    def conditioning(self, samples: int, plans: Sequence[Plan] = (), classes: Sequence[int] = ()) -> dict[str, Any]:
        """Conditioning and guidance for `samples` samples."""
        return arguments(self.loaded, pick_labels(self.loaded, samples, classes), self.scale(plans))

    def question(self, samples: int, plans: Sequence[Plan] = ()) -> dict[str, Any]:
        """Arguments common to `tune` and `compare`."""
        return {
            "noise": draw_noise(self.loaded, samples, self.seed),
            "schedule": self.loaded.schedule,
            "batch_size": self.batch_size,
            "progress": self.progress,
            **self.conditioning(samples, plans),
        }

    def plan(self, plan: Plan | None, solver: Mapping[str, Any]) -> Plan:
        """The plan itself, or that of the analytic solver with these settings."""
        chosen = plan or solver_plan(self.loaded.schedule, solver)
        check_prediction(chosen, self.loaded.schedule)
        return chosen

    def tune(
        self, samples: int | None, guidance_scales: Sequence[float] | None, teacher_model: str | None = None, **how: Any
    ) -> olss_fast.TuneResult:
        """`olss_fast.tune`; how: its arguments."""
        if guidance_scales is not None:
            raise InputError("--guidance-range belongs to --prompts: give one --guidance-scale")
        if teacher_model is not None:
            full = load_model(teacher_model, device=self.device, null_class=self.null_class)
            _check_same(self.loaded, full)
            how |= {"teacher_network": full.network, "teacher_schedule": full.schedule}
        return olss_fast.tune(self.loaded.network, seed=self.seed, **how, **self.question(samples or 256))

    def compare(self, samples: int, plans: Sequence[Plan], **how: Any) -> Report:
        """`olss_fast.tuning.compare.compare`; how: its arguments."""
        return compare(self.loaded.network, plans=plans, **how, **self.question(samples, plans))

    def sample(self, plan: Plan | None, solver: Mapping[str, Any], count: int, classes: Sequence[int]) -> Images:
        chosen = self.plan(plan, solver)
        how = self.conditioning(count, [chosen], classes)
        noise, generator = draw_noise(self.loaded, count, self.seed), torch.Generator().manual_seed(self.seed + 1)
        how |= {"generator": generator, "batch_size": self.batch_size or BATCH, "progress": self.progress}
        images = sample(self.loaded.network, chosen, noise, **how)
        names = getattr(self.loaded, "class_names", ())
        asked = pick_labels(self.loaded, count, classes) or range(count)
        return images.float().cpu().numpy(), chosen.nfe, [names[each] if names else f"{each}" for each in asked]

    def export_onnx(self, plan: Plan | None, solver: Mapping[str, Any], path: Path) -> Plan:
        """Exports the model with a plan to `path`, and returns the plan."""
        from olss_fast.onnx.export import export_onnx

        network: Any = self.loaded.network
        chosen = self.plan(plan, solver)
        export_onnx(network, chosen, path, shape=(2, *self.loaded.shape), **self.conditioning(2, [chosen]))
        return chosen

    def build_engine(self, plans: Sequence[Plan], batches: Sequence[int], *, dtype: str | None, cache: bool) -> Engine:
        """batches: how many samples at least, usually and at most."""
        from olss_fast.compiling.shapes import Profile
        from olss_fast.engine.building import build

        network: Any = self.loaded.network
        return build(
            network,
            plans,
            shapes=Profile(*((batch, *self.loaded.shape) for batch in batches)),
            dtype=None if dtype is None else getattr(torch, dtype),
            cache=cache,
            progress=self.progress,
            **self.conditioning(batches[1], plans),
        )


@dataclass(frozen=True, kw_only=True)
class PipelineSubject(Subject):
    """A pipeline of diffusers, and a file of prompts."""

    prompts: Path
    dtype: str | None = None

    def opened(self, samples: int, plans: Sequence[Plan] = ()) -> tuple[Any, list[dict[str, Any]]]:
        """The pipeline and its calls. The prompts are read first: they cost nothing to get wrong."""
        from olss_fast.adapters.diffusers.folders import load_any_pipeline, silence
        from olss_fast.adapters.diffusers.pipeline_calls import prompt_calls, read_prompts

        texts = read_prompts(self.prompts)
        if not (self.progress and can_draw()):
            silence()
        pipe = load_any_pipeline(self.model, device=self.device, dtype=self.dtype)
        how: dict[str, Any] = {"guidance_scale": self.scale(plans), "batch_size": self.batch_size, "seed": self.seed}
        return pipe, prompt_calls(pipe, texts, samples, **how)

    def tune(
        self, samples: int | None, guidance_scales: Sequence[float] | None, teacher_model: str | None = None, **how: Any
    ) -> olss_fast.TuneResult:
        """`olss_fast.tune_pipeline`; how: its arguments."""
        from olss_fast.adapters.diffusers.folders import load_any_pipeline
        from olss_fast.adapters.diffusers.pipeline_tuning import tune_pipeline

        if guidance_scales is not None and self.guidance_scale is not None:
            raise InputError("--guidance-scale and --guidance-range: give one of them")
        opened = self.opened(samples or 64)  # latents have many values each
        if teacher_model is not None:
            how["teacher_pipe"] = load_any_pipeline(teacher_model, device=self.device, dtype=self.dtype)
        return tune_pipeline(*opened, guidance_scales=guidance_scales, seed=self.seed, progress=self.progress, **how)

    def compare(self, samples: int, plans: Sequence[Plan], **how: Any) -> Report:
        """`compare_pipeline`; how: its arguments."""
        from olss_fast.adapters.diffusers.pipeline_tuning import compare_pipeline

        opened = self.opened(samples, plans)
        return compare_pipeline(*opened, plans=plans, seed=self.seed, progress=self.progress, **how)

    def sample(self, plan: Plan | None, solver: Mapping[str, Any], count: int, classes: Sequence[int]) -> Images:
        from olss_fast.adapters.diffusers.pipeline_calls import pipeline_images
        from olss_fast.adapters.diffusers.pipeline_slot import schedule_of
        from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler

        if classes:
            raise InputError("--classes are for class-conditional models: leave them out with --prompts")
        pipe, calls = self.opened(count, [] if plan is None else [plan])
        chosen = plan or solver_plan(schedule_of(pipe.scheduler), solver)
        pipe.scheduler = PlanScheduler.from_pipe(pipe, chosen)
        pipe.set_progress_bar_config(**bar_options(self.progress))
        prompts = [prompt for call in calls for prompt in call["prompt"]]
        return pipeline_images(pipe, calls, chosen.nfe), chosen.nfe, prompts


def _check_same(model: Model, full: Model) -> None:
    """InputError unless both make samples of one shape and take the same classes."""
    if (model.shape, model.classes) != (full.shape, full.classes):
        raise InputError(
            f"--teacher-model makes samples of shape {full.shape} in {full.classes} classes, --model of {model.shape} "
            f"in {model.classes}: both must make the same"
        )


def subject(
    model: str, prompts: Path | None, dtype: str | None, null_class: int | None, *how: Any
) -> NetworkSubject | PipelineSubject:
    """The `Subject` of `--model`: with `--prompts` a pipeline. how: the other fields of `Subject`, in turn."""
    common = Subject(model, *how)
    if prompts is None:
        if dtype is not None:
            raise InputError("--dtype belongs to --prompts: other models run in float32")
        return NetworkSubject(**vars(common), null_class=null_class)
    if null_class is not None:
        raise InputError("--null-class is for class-conditional models: leave it out with --prompts")
    if model == DEMO:
        raise InputError("the demo takes no prompts: leave --prompts out for it")
    return PipelineSubject(**vars(common), prompts=prompts, dtype=dtype)
