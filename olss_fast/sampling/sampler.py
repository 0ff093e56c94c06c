"""`olss_fast.Sampler`: a plan and a network prepared to run many times, as fast as the device allows.

| backend | what happens between two network calls |
|---|---|
| reference | rows · basis in float64: the specification (`olss_fast.sample`) |
| fused | one kernel: guidance, history, next input, next time (`olss_fast.executors.fused`) |
| graph | nothing on the host: network and kernel are one CUDA graph (`olss_fast.executors.graph`) |

"auto" is graph on CUDA and fused elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.executors.draws import Seed, checked_shape, checked_streams
from olss_fast.executors.graph import require_cuda
from olss_fast.executors.loop_cache import LoopCache, Stats, Work
from olss_fast.executors.reference import OnStep
from olss_fast.network import (
    FLOATS,
    Conditioning,
    Denoiser,
    Network,
    Streams,
    asking_with,
    checked_arguments,
    checked_guidance_scale,
    checked_networks,
    network_device,
    network_dtype,
)
from olss_fast.plan.plan import Plan, checked_plan
from olss_fast.sampling.old_forms import takes_old_forms
from olss_fast.sampling.sampling import Callback, asked, check_plan_fits, draw_step_noise, sampled, watching
from olss_fast.support.device import pick_device

BACKENDS = ("auto", "reference", "fused", "graph")


class Sampler:
    """`sampler(noise, **conditioning)` runs `plan` on `network`; buffers and graphs are made once per shape.

    It may be called from several threads, and by its own network: on the CPU each call has its own buffers, on a GPU
    calls take turns. A call uses the sampler's plan and guidance scale at the time it begins.

    Args:
        network: `network(x, timestep, **conditioning)` as for `olss_fast.sample`, or a list of networks.
        plan: any Plan; `sampler.plan = other` swaps it in place.
        shape, dtype, device: of the noise; with a shape, everything is prepared now, otherwise by the first call.
            dtype and device default to those of the network's parameters, else of the noise.
        conditioning, unconditional, guidance_scale: as for `olss_fast.sample`. A call's arguments replace those of the
            same name. `sampler.guidance_scale = other` swaps the scale in place.
        backend: one of BACKENDS. A network that cannot be captured falls back to fused, and `stats()` says why.
        unroll: one graph of the whole loop instead of one replayed per step; another plan length is captured again.

    Raises:
        InputError, NetworkError: as `olss_fast.sample`; an unknown backend, or a graph without a CUDA device.
    """

    @takes_old_forms
    def __init__(
        self,
        network: Network | Sequence[Network],
        plan: Plan,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        conditioning: Conditioning | None = None,
        unconditional: Conditioning | None = None,
        guidance_scale: float = 1.0,
        backend: str = "auto",
        unroll: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise InputError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        if dtype is not None and dtype not in FLOATS:
            raise InputError(f"dtype is {dtype!r}; expected torch.float16, bfloat16, float32 or float64, or None")
        self.plan, self.guidance_scale = plan, guidance_scale
        self.networks = checked_networks(network)
        self.device = pick_device(device) if device is not None else network_device(self.networks)
        if backend == "graph" and self.device is not None:
            require_cuda(self.device)
        self.backend, self.dtype = backend, dtype
        self._conditioning = checked_arguments(conditioning, "conditioning")
        self._unconditional = None if unconditional is None else checked_arguments(unconditional, "unconditional")
        self._loops = LoopCache(self.networks, backend, unroll=unroll)
        self.shape = None if shape is None else checked_shape(shape)
        if self.shape is not None:
            self._warm_up(self.shape)

    def __repr__(self) -> str:
        scale = f", guidance_scale={self.guidance_scale:g}" if self._unconditional is not None else ""
        names = ", ".join(getattr(each, "__name__", type(each).__name__) for each in self.networks)
        return f"Sampler({names}, {self.plan!r}{scale}, backend={self.backend!r}, device={str(self.device or 'any')!r})"

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = checked_plan(plan)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._guidance_scale = checked_guidance_scale(scale)

    def __call__(
        self,
        noise: Tensor | None = None,
        *,
        seed: Seed | None = None,
        shape: Sequence[int] | None = None,
        generator: Streams | None = None,
        init_image: Tensor | None = None,
        strength: float | None = None,
        unconditional: Conditioning | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        **conditioning: Any,
    ) -> Tensor:
        """The samples (B, …) of unit Gaussian noise (B, …), in its dtype and on its device.

        All arguments are those of `olss_fast.sample`; `shape` defaults to the sampler's own, with one sample per seed.
        With `callback` or `progress` a graph of the whole loop (`unroll`) is not used. Pass network arguments that have
        one of these names in the sampler's `conditioning`.

        On the CPU, non-finite outputs raise NetworkError; on a GPU call `require_finite()`, which synchronises.
        """
        plan, denoiser = asked(
            self.networks,
            self.plan,
            noise,
            shape,
            checked_streams(generator, seed),
            init_image,
            strength,
            usual=self.shape if init_image is None else None,
            conditioning={**self._conditioning, **conditioning},
            unconditional=self._unconditional if unconditional is None else unconditional,
            guidance_scale=self.guidance_scale,
            waits=False,
        )
        if plan is None:
            return denoiser.noise
        if self.backend == "reference":
            return sampled(plan, denoiser, callback=callback, progress=progress)
        with watching(plan, denoiser.noise, callback, progress) as on_step:
            return self._run(plan, denoiser, on_step)

    def require_finite(self) -> None:
        """NetworkError naming the first non-finite evaluation of this thread's last run. Synchronises with the device.
        InputError if another thread has used the same buffers since."""
        self._loops.require_finite()

    def reset(self) -> None:
        """Frees all buffers and graphs: for changes of a network that go unnoticed, such as adapter scales."""
        self._loops.reset()

    def stats(self) -> Stats:
        """Counters since the sampler was made; see `Stats`."""
        return Stats("reference", 0, 0, "", 0, None) if self.backend == "reference" else self._loops.stats()

    def _warm_up(self, shape: Sequence[int]) -> None:
        """A run on zeros with its own generator, which leaves torch's global ones alone."""
        dtype = self.dtype or network_dtype(self.networks[0], torch.float32)
        self(torch.zeros(tuple(shape), dtype=dtype, device="cpu"), generator=torch.Generator())

    def _run(self, plan: Plan, denoiser: Denoiser, on_step: OnStep | None) -> Tensor:
        noise, device = denoiser.noise, self.device or denoiser.noise.device
        if self.backend == "graph":
            require_cuda(device)
        check_plan_fits(plan, denoiser)
        doubled = plan.branches == 2 or denoiser.guided
        with denoiser.naming_arguments():
            work = Work(
                plan,
                noise,
                denoiser.arguments(slice(None), device, doubled=doubled),
                lambda held: asking_with(self.networks, held),
                dtype=self.dtype or denoiser.dtype,
                device=device,
                doubled=doubled,
                guidance_scale=denoiser.guidance_scale,
                step_noise=draw_step_noise(plan, noise, denoiser.streams),
                on_step=on_step,
            )
            return self._loops.run(work)
