"""Every pipeline class of diffusers, tiny: with a plan captured from its scheduler right, or refused by name.

Right: what comes out is what the pipeline's own scheduler makes of the same noise, up to rounding in float32: 1e-5 of
the largest number that the scheduler met (Euler's latents begin at 700 in video models). The reference is handed copies
of its samples: some pipelines write into what a scheduler of several steps keeps, and so does not get what it computes.

`every_pipeline.json` was made with one version of diffusers; what a later one has more is skipped.
"""

from __future__ import annotations

import copy
import functools
import inspect
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import every_pipeline as every
import numpy as np
import pytest
import torch

import olss_fast
from olss_fast import PlanScheduler
from olss_fast.errors import InputError, ScheduleError

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
NONLINEAR = ("clip_sample", "thresholding", "clip_denoised")
REFUSED = every.TABLE["refused"]
SLOW = every.TABLE["slow"]
CLASSES = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in sorted(every.TABLE["pipelines"])
]


def linear(scheduler: Any) -> Any:
    """Without what no plan can do, as `capture` advises."""
    off: dict[str, Any] = {name: False for name in NONLINEAR if scheduler.config.get(name)}
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        off["variance_type"] = "fixed_small"
    return type(scheduler).from_config(scheduler.config, **off) if off else scheduler


@dataclass
class Notes:
    """How a pipeline set its scheduler's timesteps, and the largest number that the steps met."""

    arguments: dict[str, Any] = field(default_factory=dict)
    largest: float = 1.0

    def plan(self, scheduler: Any) -> olss_fast.Plan:
        """Captured with what the pipeline asked for."""
        arguments = {name: value for name, value in self.arguments.items() if value is not None and name != "device"}
        return olss_fast.capture(scheduler, arguments.pop("num_inference_steps", None), **arguments)


@contextmanager
def noted(kind: type) -> Iterator[Notes]:
    """Notes what is asked of schedulers of this class, also of copies that a pipeline makes."""
    notes, step, set_timesteps = Notes({"num_inference_steps": 2}), kind.step, kind.set_timesteps

    @functools.wraps(step)
    def noting_step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **how: Any) -> Any:
        notes.largest = max(notes.largest, float(sample.abs().max()))
        return step(self, model_output, timestep, sample.clone(), *args, **how)

    @functools.wraps(set_timesteps)
    def noting_set_timesteps(self: Any, *args: Any, **how: Any) -> Any:
        notes.arguments = inspect.signature(set_timesteps).bind(self, *args, **how).arguments
        notes.arguments.pop("self")
        return set_timesteps(self, *args, **how)

    kind.step, kind.set_timesteps = noting_step, noting_set_timesteps
    try:
        yield notes
    finally:
        kind.step, kind.set_timesteps = step, set_timesteps


def run(pipe: Any, scheduler: Any, call: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)  # some draw without their generator
    np.random.seed(0)  # noqa: NPY002
    pipe.scheduler = scheduler
    return every.numbers(pipe(**{name: every.argument(value) for name, value in call.items()}))


@pytest.mark.parametrize("name", CLASSES)
def test_right_or_refused(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    pipe, call = every.build(name)
    own = linear(pipe.scheduler)
    with noted(type(own)) as notes:
        expected = run(pipe, copy.deepcopy(own), call)
    plan = notes.plan(own)
    if name in REFUSED:
        with pytest.raises((InputError, ScheduleError), match=REFUSED[name]):
            run(pipe, PlanScheduler.from_pipe(pipe, plan), call)
        return
    found = run(pipe, PlanScheduler.from_pipe(pipe, plan), call)
    assert expected.std() > 0.0  # of something that depends on its input
    assert (found - expected).abs().max() <= TOLERANCE * max(notes.largest, float(expected.abs().max()))


def test_every_class_is_built_or_said_why_not() -> None:
    known = {*every.TABLE["pipelines"], *every.TABLE["unbuilt"]}
    missing = [name for name in every.names() if name not in known]
    if diffusers.__version__ != every.MADE_FOR:
        pytest.skip(f"the table was made with diffusers {every.MADE_FOR}; {len(missing)} classes are not in it")
    assert missing == []
    assert not {*every.TABLE["pipelines"]} & {*every.TABLE["unbuilt"]}


def test_the_page_says_what_the_table_says() -> None:
    root = Path(__file__).resolve().parents[2]
    table = runpy.run_path(str(root / "tools" / "pipeline_table.py"))
    assert (root / "docs" / "pipelines.md").read_text() == table["page"]()
