"""Fewer network evaluations for diffusion sampling, at the quality of a long run.

    schedule = olss_fast.NoiseSchedule.from_betas(betas, prediction_type="epsilon")
    result = olss_fast.tune(network, noise=noise, schedule=schedule, steps=[5, 8])
    images = olss_fast.sample(network, result.plans[5], noise)

Everything is imported on first use (PEP 562): importing the package loads neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olss_fast import demo, errors, metrics, solvers
    from olss_fast.adapters.diffusers.acceleration import accelerate
    from olss_fast.adapters.diffusers.pipeline_tuning import tune_pipeline
    from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler
    from olss_fast.capturing.capturing import capture
    from olss_fast.compiling.shapes import Profile
    from olss_fast.engine.building import build
    from olss_fast.engine.engine import Engine, load_engine
    from olss_fast.errors import OlssError
    from olss_fast.onnx.export import export_onnx
    from olss_fast.plan.plan import Plan
    from olss_fast.report.report import Candidate, Report
    from olss_fast.sampling.sampler import Sampler
    from olss_fast.sampling.sampling import sample
    from olss_fast.schedule.noise_schedule import NoiseSchedule
    from olss_fast.tuning.study import Effort
    from olss_fast.tuning.tuning import TuneResult, tune

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "Effort",
    "Engine",
    "NoiseSchedule",
    "OlssError",
    "Plan",
    "PlanScheduler",
    "Profile",
    "Report",
    "Sampler",
    "TuneResult",
    "__version__",
    "accelerate",
    "build",
    "capture",
    "demo",
    "errors",
    "export_onnx",
    "load_engine",
    "metrics",
    "sample",
    "solvers",
    "tune",
    "tune_pipeline",
]

_SUBMODULES = {"demo", "errors", "metrics", "solvers"}
_HOME = {
    "Candidate": "report.report",
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
    "export_onnx": "onnx.export",
    "load_engine": "engine.engine",
    "sample": "sampling.sampling",
    "tune": "tuning.tuning",
    "tune_pipeline": "adapters.diffusers.pipeline_tuning",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
