"""The embedded UNet as a plain callable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel


class DemoNetwork(torch.nn.Module):
    """x (B, 1, 32, 32), timestep (B,), class_labels (B,) -> predicted noise (B, 1, 32, 32), a bare tensor."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        output: tuple[torch.Tensor, ...] = self.unet(x, timestep, class_labels=class_labels, return_dict=False)
        return output[0]


def read_network(folder: Path, dtype: torch.dtype | None) -> DemoNetwork:
    """The UNet of a local diffusers folder, for inference; its half-precision file is widened to `dtype`."""
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    from_pretrained: Callable[..., Any] = UNet2DModel.from_pretrained
    unet = from_pretrained(folder, **options)
    return DemoNetwork(unet).to(dtype or torch.float32).eval().requires_grad_(False)
