"""Networks whose exact answer is known, for tests and benchmarks of samplers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olss_fast.schedule.noise_schedule import NoiseSchedule

NULL_CLASS = -1


@dataclass(frozen=True)
class ExactMixture:
    """The exact raw output for data from an equal mixture of Gaussians N(m_k, s^2), divided among `classes`.

    With p_k(x) proportional to exp(-|x - alpha m_k|^2 / 2 v), v = alpha^2 s^2 + sigma^2, the denoised image is
    E[x0 | x] = sum_k p_k (m_k + (alpha s^2 / v) (x - alpha m_k)). Component k belongs to class k modulo `classes`
    (one class each by default). `y` (B,) selects a class; `NULL_CLASS` selects all components, for guidance.

    Shapes: `means` (K, ...), x (B, ...), timestep (B,), all equal within a batch.
    """

    schedule: NoiseSchedule
    means: Tensor
    scale: float
    classes: int | None = None

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        time = timestep.double().cpu().numpy()
        schedule, shape = self.schedule, (-1, *[1] * (x.ndim - 1))
        known = schedule.input_scale(time), *schedule.levels(time)[:2], *schedule.prediction_maps(time)[:2]
        scale, alpha, sigma, a, b = (torch.as_tensor(np.asarray(each), device=x.device).view(shape) for each in known)
        state = x.double() / scale
        return ((self._denoised(state, alpha, sigma, y) - a * state) / b).to(x.dtype)

    def _denoised(self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        variance = alpha**2 * self.scale**2 + sigma**2
        means = self.means.to(x)
        away = x[:, None] - alpha[:, None] * means[None]  # (B, K, ...)
        logits = -away.square().flatten(2).sum(2) / (2.0 * variance.flatten(1))
        if y is not None:
            classes = torch.arange(len(means), device=x.device) % (self.classes or len(means))
            meant = (y[:, None] == classes[None]) | (y[:, None] == NULL_CLASS)
            logits = logits.masked_fill(~meant, -torch.inf)
        share = logits.softmax(1).view(*logits.shape, *[1] * (x.ndim - 1))
        each = means[None] + (alpha * self.scale**2 / variance)[:, None] * away
        return (share * each).sum(1)
