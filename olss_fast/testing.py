"""Networks whose exact answer is known, and rounded ones, for tests and benchmarks of samplers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from olss_fast.errors import InputError
from olss_fast.schedule.noise_schedule import NoiseSchedule

NULL_CLASS = -1
Module = TypeVar("Module", bound=nn.Module)


def rounded(network: Module, bits: int) -> Module:
    """A copy whose weights of linear and convolution layers are whole multiples of a step: of w_max / (2^(bits-1) - 1)
    for each output channel, w_max its largest magnitude. Biases and other layers are as they were."""
    if not 2 <= bits <= 16:
        raise InputError(f"bits is {bits!r}; expected 2 to 16")
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, _ConvNd)):
            channel = int(isinstance(layer, _ConvNd) and layer.transposed)
            others = [axis for axis in range(layer.weight.ndim) if axis != channel]
            step = layer.weight.detach().abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1)
            layer.weight.data = torch.where(step > 0.0, (layer.weight.detach() / step).round() * step, 0.0)
    return network


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
