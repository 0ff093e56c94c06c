"""Schedulers with the least interface, by hand: what capture must take, and what it must find out."""

from __future__ import annotations

from typing import Any

import torch


class Plain:
    """The least interface of a scheduler: Euler from 1 to 0, with nothing said about levels."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        return (sample - timestep * model_output / len(self.timesteps),)


class Described(Plain):
    """Plain with a config and add_noise, and a fault on request."""

    config = {"prediction_type": "epsilon"}  # noqa: RUF012
    fault = staticmethod(lambda sample: sample)

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        return (self.fault(super().step(model_output, timestep, sample)[0]),)

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        return original_samples + timesteps.double() * noise


class PlainFlow:
    """Euler for flow matching, from its own sigmas; no config, no add_noise."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64)
        self.timesteps = 1000.0 * self.sigmas[:-1]

    def place(self, timestep: Any) -> int:
        return int((self.timesteps == timestep).nonzero()[0])

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        i = self.place(timestep)
        return (sample + (self.sigmas[i + 1] - self.sigmas[i]) * model_output,)


class PlainExploding(PlainFlow):
    """Euler, variance exploding, its input scaled to unit variance."""

    init_noise_sigma = 14.0

    def set_timesteps(self, num_inference_steps: int) -> None:
        sigmas = torch.linspace(14.0, 0.1, num_inference_steps, dtype=torch.float64)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self.timesteps = torch.arange(num_inference_steps).flip(0)

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        return sample / (self.sigmas[self.place(timestep)] ** 2 + 1.0) ** 0.5


class PlainDdim:
    """DDIM over alphas_cumprod."""

    def __init__(self) -> None:
        self.alphas_cumprod = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.stride = 1000 // num_inference_steps
        self.timesteps = torch.arange(self.stride - 1, 1000, self.stride).flip(0)

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        following = int(timestep) - self.stride
        signal = self.alphas_cumprod[timestep]
        target = self.alphas_cumprod[following] if following >= 0 else torch.ones(())
        image = (sample - (1.0 - signal) ** 0.5 * model_output) / signal**0.5
        return (target**0.5 * image + (1.0 - target) ** 0.5 * model_output,)


class PlainVelocity(PlainDdim):
    """The same for a network that predicts v."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        signal = self.alphas_cumprod[timestep]
        return super().step(signal**0.5 * model_output + (1.0 - signal) ** 0.5 * sample, timestep, sample)


class Wrapped:
    """Another scheduler without its config."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("config", "inner", "set_begin_index"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return self.inner.step(model_output, timestep, sample)
