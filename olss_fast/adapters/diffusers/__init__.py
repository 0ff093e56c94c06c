"""Bridge to diffusers: plans in the scheduler slot of pipelines, pipelines as networks, models of local folders."""

from olss_fast.adapters.diffusers.folders import DiffusersModel, UNetNetwork, load_pipeline

__all__ = ["DiffusersModel", "UNetNetwork", "load_pipeline"]
