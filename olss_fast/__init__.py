"""Fewer network evaluations for diffusion sampling, at the quality of a long run.

    schedule = olss_fast.NoiseSchedule.from_betas(betas, prediction_type="epsilon")
    result = olss_fast.tune(network, noise=noise, schedule=schedule, steps=[5, 8])
    images = olss_fast.sample(network, result.plans[5], noise)

Everything is imported on first use (PEP 562): importing the package loads neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` exports a name to type checkers
    from olss_fast import demo as demo
    from olss_fast import errors as errors
    from olss_fast import metrics as metrics
    from olss_fast import solvers as solvers
    from olss_fast.adapters.diffusers.acceleration import accelerate as accelerate
    from olss_fast.adapters.diffusers.pipeline_tuning import tune_pipeline as tune_pipeline
    from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler as PlanScheduler
    from olss_fast.capturing.capturing import capture as capture
    from olss_fast.compiling.shapes import Profile as Profile
    from olss_fast.engine.building import build as build
    from olss_fast.engine.engine import Engine as Engine
    from olss_fast.engine.engine import load_engine as load_engine
    from olss_fast.errors import OlssError as OlssError
    from olss_fast.onnx.export import export_onnx as export_onnx
    from olss_fast.plan.plan import Plan as Plan
    from olss_fast.report.report import Candidate as Candidate
    from olss_fast.report.report import Report as Report
    from olss_fast.sampling.checking import Check as Check
    from olss_fast.sampling.checking import check as check
    from olss_fast.sampling.sampler import Sampler as Sampler
    from olss_fast.sampling.sampling import sample as sample
    from olss_fast.schedule.noise_schedule import NoiseSchedule as NoiseSchedule
    from olss_fast.tuning.study import Effort as Effort
    from olss_fast.tuning.tuning import TuneResult as TuneResult
    from olss_fast.tuning.tuning import tune as tune

__version__ = "0.1.0"

_SUBMODULES = {"demo", "errors", "metrics", "solvers"}
_HOME = {
    "Candidate": "report.report",
    "Check": "sampling.checking",
    "Effort": "tuning.study",
    "Engine": "engine.engine",
    "NoiseSchedule": "schedule.noise_schedule",
    "OlssError": "errors",
    "Plan": "plan.plan",
    "PlanScheduler": "adapters.diffusers.plan_scheduler",
    "Profile": "compiling.shapes",
    "Report": "report.report",
    "Sampler": "sampling.sampler",
    "TuneResult": "tuning.tuning",
    "SchedulerMixin": "adapters.diffusers.plan_scheduler",  # diffusers looks here for what it loads from here
    "accelerate": "adapters.diffusers.acceleration",
    "build": "engine.building",
    "capture": "capturing.capturing",
    "check": "sampling.checking",
    "export_onnx": "onnx.export",
    "load_engine": "engine.engine",
    "sample": "sampling.sampling",
    "tune": "tuning.tuning",
    "tune_pipeline": "adapters.diffusers.pipeline_tuning",
}

__all__ = sorted({"__version__", *_SUBMODULES, *_HOME} - {"SchedulerMixin"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
