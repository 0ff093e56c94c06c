"""A pipeline of nothing but a scheduler, in a module of its own: what code of pipelines is answered, only it is."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

STEPS, MU = 4, 0.8


class Asking(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """Asks what its scheduler is or has, as the pipelines of diffusers do that are no mere loop over `step`."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def shifted(self) -> torch.Tensor:
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=MU)
        else:
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.01, STEPS))
        return self.scheduler.timesteps

    def has(self, name: str) -> bool:
        return hasattr(self.scheduler, name)

    def reads(self, name: str) -> Any:
        return getattr(self.scheduler, name)
