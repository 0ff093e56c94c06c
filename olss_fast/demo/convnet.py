"""The small convolutional classifier that judges the demo model's images, and its features."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn


class Classifier(nn.Module):
    """Images (B, 1, 32, 32) in [-1, 1] -> logits (B, 20) and the 64 features (B, 64) they are computed from.

    The features are taken before the activation, where they are closest to the Gaussian that a Fréchet distance
    assumes. Images are clamped to [-1, 1] first, as when written to a file.
    """

    num_features = 64

    def __init__(self, classes: int = 20, widths: tuple[int, ...] = (24, 48, 96, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise((1, *widths))):
            layers += [nn.Conv2d(before, after, 3, stride=1 if i == 0 else 2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = nn.Linear(widths[-1], self.num_features)
        self.head = nn.Linear(self.num_features, classes)

    __call__: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.body(images.to(self.head.weight.dtype).clamp(-1.0, 1.0)))
        return self.head(nn.functional.silu(features)), features
