"""Real architectures with random weights, what they are conditioned on, and which diffusers schedulers rival there.

The configs are those of the published models' config.json, but for Flux, which has 4 + 8 of its 19 + 38 blocks: a step
is what is timed, not a network. Every network is called as `network(x, time, **conditioning)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from figures import DIT, FLUX, PEERS, SD15, SDXL
from torch import Tensor, nn

UNET_SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
UNET_SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TRANSFORMER_FLUX = {
    "in_channels": 64,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
TRANSFORMER_DIT = {"width": 1152, "depth": 28, "heads": 16, "side": 64}
TINY_UNET = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
TINY_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}
DRY = {  # what a dry run has instead
    SD15: TINY_UNET,
    SDXL: TINY_UNET,
    FLUX: TINY_FLUX,
    DIT: {"width": 16, "depth": 2, "heads": 2, "side": 4},
}


class UNet(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(**config)

    def forward(
        self, x: Tensor, time: Tensor, prompt: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        output: Tensor = self.unet(x, time, prompt, added_cond_kwargs=added, return_dict=False)[0]
        return output


class Flux(nn.Module):
    """x: (B, tokens, channels), the latents in patches; time in [0, 1000]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.transformer = FluxTransformer2DModel(**config)

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor, pooled: Tensor, places: Tensor) -> Tensor:
        """`places`: (B, prompt tokens + image tokens, 3), the same for every sample."""
        words = prompt.shape[1]
        output: Tensor = self.transformer(
            x,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=time / 1000.0,
            txt_ids=places[0, :words],
            img_ids=places[0, words:],
            return_dict=False,
        )[0]
        return output


class DiT(nn.Module):
    """A diffusion transformer (Peebles and Xie 2023) with adaLN-zero blocks, on patches of 2 × 2; no package needed."""

    def __init__(self, config: Mapping[str, int]) -> None:
        super().__init__()
        width, self.side = config["width"], config["side"] // 2
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.place = nn.Parameter(0.02 * torch.randn(1, self.side**2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList(DiTBlock(width, config["heads"]) for _ in range(config["depth"]))
        self.out = nn.Linear(width, 16)

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        angles = time[:, None].float() * torch.exp(-9.2 / 128 * torch.arange(128, device=x.device))
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)) + self.label(y)
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens, condition)
        pixels = self.out(tokens).transpose(1, 2).reshape(len(x), 16, self.side, self.side)
        return nn.functional.pixel_shuffle(pixels, 2).contiguous()


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, 2)
        query, key, value = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(self.norms[0](tokens) * (1 + scale) + shift).chunk(3, 2)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + gate * self.mix(attended)
        return tokens + gate_2 * self.mlp(self.norms[1](tokens) * (1 + scale_2) + shift_2)


@dataclass(frozen=True)
class Architecture:
    """shape and `conditioning` (name -> shape) are of one sample; names in `labels` are whole numbers."""

    make: Callable[[Mapping[str, Any]], nn.Module]
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    dry_shape: tuple[int, ...]
    conditioning: Mapping[str, tuple[int, ...]]
    guided: bool = True
    flow: bool = False
    channels_last: bool = False
    peers: tuple[str, ...] = PEERS
    labels: tuple[str, ...] = ()

    def network(self, name: str, device: torch.device, dtype: torch.dtype, *, dry: bool) -> nn.Module:
        torch.manual_seed(0)
        with device:
            module = self.make({**self.config, **(DRY[name] if dry else {})})
        module = module.to(dtype).eval().requires_grad_(False)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def inputs(
        self, batch: int, device: torch.device, dtype: torch.dtype, *, dry: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Noise (B, ...) and one conditioning for B samples."""
        batch = min(batch, 2) if dry else batch
        noise = torch.randn((batch, *(self.dry_shape if dry else self.shape)), device=device, dtype=dtype)
        given = {
            name: torch.randint(0, 1000, (batch,), device=device)
            if name in self.labels
            else torch.randn((batch, *self._cut(name, shape, dry)), device=device, dtype=dtype)
            for name, shape in self.conditioning.items()
        }
        return noise.to(memory_format=torch.channels_last) if self.channels_last else noise, given

    def _cut(self, name: str, shape: tuple[int, ...], dry: bool) -> tuple[int, ...]:
        if not dry or name not in ("prompt", "places"):
            return shape
        return (4, 8) if name == "prompt" else (4 + self.dry_shape[0], 3)


LATENTS = {"shape": (4, 64, 64), "dry_shape": (4, 4, 4)}
ARCHITECTURES = {
    SD15: Architecture(UNet, UNET_SD15, **LATENTS, conditioning={"prompt": (77, 768)}, channels_last=True),
    SDXL: Architecture(
        UNet,
        UNET_SDXL,
        shape=(4, 128, 128),
        dry_shape=(4, 4, 4),
        conditioning={"prompt": (77, 2048), "pooled": (1280,), "sizes": (6,)},
        channels_last=True,
    ),
    FLUX: Architecture(
        Flux,
        TRANSFORMER_FLUX,
        shape=(4096, 64),
        dry_shape=(16, 64),
        conditioning={"prompt": (512, 4096), "pooled": (768,), "places": (512 + 4096, 3)},
        guided=False,
        flow=True,
        peers=("flow Euler",),
    ),
    DIT: Architecture(DiT, TRANSFORMER_DIT, **LATENTS, conditioning={"y": ()}, labels=("y",)),
}
