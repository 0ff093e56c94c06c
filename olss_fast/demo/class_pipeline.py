"""A class-conditional diffusers pipeline for the embedded model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from olss_fast.demo import CLASSES, GUIDANCE_SCALE
from olss_fast.errors import InputError

_Base: Any = DiffusionPipeline


class ClassPipeline(_Base):  # type: ignore[misc]
    """`pipe(class_labels, num_inference_steps=…)`: images of these classes, by a UNet2DModel with classifier-free
    guidance. Classes are the labels below `null_class`, which means any. Works with every diffusers scheduler."""

    def __init__(self, unet: Any, scheduler: Any, null_class: int = CLASSES) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class=null_class)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 20,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image per label. `generator`: one, or a list of one per image; `latents`: unit noise, in its place;
        `output_type`: "pil", "np" (B, H, W, C) in [0, 1], or "latent", the tensor (B, C, H, W) in [-1, 1].

        Raises InputError for labels that are not classes.
        """
        labels = self._labels(class_labels)
        shape = (len(labels), self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        x = latents * self.scheduler.init_noise_sigma
        both = torch.cat([torch.full_like(labels, self.config.null_class), labels])
        takes = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, timestep)
            output = self.unet(torch.cat([scaled, scaled]), timestep, class_labels=both, return_dict=False)[0]
            without, given = output.chunk(2)
            guided = without + guidance_scale * (given - without)
            x = self.scheduler.step(guided, timestep, x, **extra, return_dict=False)[0]
        images = x if output_type == "latent" else self._pictures(x, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _labels(self, class_labels: int | Sequence[int]) -> torch.Tensor:
        labels = torch.as_tensor(class_labels, device=self.device).reshape(-1)
        known = self.config.null_class
        if labels.is_floating_point() or not len(labels) or labels.min() < 0 or labels.max() >= known:
            raise InputError(f"class_labels is {class_labels!r}; expected whole numbers from 0 to {known - 1}")
        return labels

    def _pictures(self, x: torch.Tensor, output_type: str) -> Any:
        pixels = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels
