"""`olss_fast.sample`: run a Plan on a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from olss_fast.errors import InputError
from olss_fast.executors.draws import Seed, check_count_of, checked_streams, initial_noise, unit_noise
from olss_fast.executors.reference import Loop, OnStep
from olss_fast.network import (
    Conditioning,
    Denoiser,
    Network,
    Streams,
    checked_networks,
    network_device,
    network_dtype,
    require_finite,
)
from olss_fast.plan.plan import Plan, checked_plan
from olss_fast.sampling.old_forms import takes_old_forms
from olss_fast.sampling.starts import begun
from olss_fast.support.arguments import checked_count
from olss_fast.support.progress import bar_options
from olss_fast.support.text import quoted
from olss_fast.support.tree import batches

Callback = Callable[[int, float, Tensor], object]
"""`callback(i, timestep, x)`: after evaluation i, at `timestep`. x (B, ...) is the next network input, or finally the
samples; a copy, in the noise's dtype and on its device. The return value is ignored."""


@takes_old_forms
def sample(
    network: Network | Sequence[Network],
    plan: Plan,
    noise: Tensor | None = None,
    *,
    seed: Seed | None = None,
    shape: Sequence[int] | None = None,
    generator: Streams | None = None,
    init_image: Tensor | None = None,
    strength: float | None = None,
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    callback: Callback | None = None,
    progress: bool = False,
    batch_size: int | None = None,
    doubled: bool = True,
) -> Tensor:
    """Sample with `plan` from unit Gaussian noise (P, ...), given as `noise` or drawn.

    The network is called as `network(x, timestep, **conditioning)` with x of the noise's shape in the network's own
    floating-point dtype (that of its parameters, else the noise's) and timestep (B,) float32 in the network's unit;
    exactly `plan.nfe` times for each batch of `batch_size` samples (default: all at once). A guided pair
    f = u + g (c - u) is one call on a doubled batch, or two calls with `doubled=False`. Rows are accumulated in
    float64; the result has the noise's dtype and device.

    Args:
        seed, shape: instead of `noise`: drawn on the CPU, the same for every device. Several seeds, one per sample,
            give each sample its own stream, so any of them can be reproduced alone.
        generator: draws the noise (with `shape`), then the fresh noises of a stochastic plan; or a list of one per
            sample. `seed` makes it.
        init_image, strength: start from clean samples (P, ...), noised to where the last int(nfe strength) steps begin.
            For captured and analytic plans, whose later starts can be derived; others start where they were fitted.
        callback: see `Callback`; called once per evaluation and batch. progress: shows a bar.

    Raises `InputError` for unusable noise, guidance or conditioning, `NetworkError` for outputs of the wrong shape or
    with non-finite values (naming evaluation and sample).
    """
    rest, denoiser = asked(
        checked_networks(network),
        checked_plan(plan),
        noise,
        shape,
        checked_streams(generator, seed),
        init_image,
        strength,
        conditioning=conditioning,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        doubled=doubled,
    )
    if rest is None:
        return denoiser.noise
    size = None if batch_size is None else checked_count("batch_size", batch_size)
    return sampled(rest, denoiser, batch_size=size, callback=callback, progress=progress)


def sampled(
    plan: Plan,
    denoiser: Denoiser,
    *,
    batch_size: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """The samples of checked inputs, by the reference executor."""
    check_plan_fits(plan, denoiser)
    slices = batches(range(denoiser.samples), batch_size or denoiser.samples)
    with torch.no_grad(), watching(plan, denoiser.noise, callback, progress, len(slices)) as on_step:
        step_noise = draw_step_noise(plan, denoiser.noise, denoiser.streams)
        return torch.cat([_sample_batch(plan, denoiser, each, step_noise, on_step) for each in slices])


def asked(
    networks: Sequence[Network],
    plan: Plan,
    noise: Tensor | None,
    shape: Sequence[int] | None,
    streams: Streams | None,
    image: Tensor | None,
    strength: float | None,
    *,
    usual: Sequence[int] | None = None,
    **how: Any,
) -> tuple[Plan | None, Denoiser]:
    """The plan from where the call begins (None if the noise already is the sample), and its checked inputs.

    The noise is given or drawn, by default in the image's shape or `usual`. how: arguments of `Denoiser`.
    """
    dtype, device = torch.float32, None
    if noise is None:
        dtype, device = network_dtype(networks[0], dtype), network_device(networks)
    if isinstance(image, Tensor):
        usual, device = tuple(image.shape), image.device
    drawn = initial_noise(noise, shape, streams, usual=usual, dtype=dtype, device=device)
    denoiser = Denoiser(networks, drawn, streams=streams, **how)
    if not (streams is None or isinstance(streams, torch.Generator)):
        check_count_of(streams, denoiser.samples)
    rest, denoiser.noise = begun(plan, drawn, image, strength)
    return rest, denoiser


@contextmanager
def watching(
    plan: Plan, noise: Tensor, callback: Callback | None, progress: bool, batches: int = 1
) -> Iterator[OnStep | None]:
    """The function an executor calls after each evaluation of `batches` runs; None without callback and progress."""
    if callback is None and not progress:
        yield None
        return
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {quoted(callback)}; expected a function callback(i, timestep, x)")
    with tqdm(total=plan.nfe * batches, desc="Sampling", unit="step", **bar_options(progress)) as bar:

        def on_step(i: int, x: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback(i, float(plan.timesteps[i]), x.to(noise, copy=True))

        yield on_step


def check_plan_fits(plan: Plan, denoiser: Denoiser) -> None:
    """Raise `InputError` if the plan needs more networks than given, or has another guidance scale folded in."""
    highest = max(plan.models.tolist())
    if highest >= len(denoiser.networks):
        raise InputError(f"the plan uses network {highest}, but {len(denoiser.networks)} came: pass a list of networks")
    if plan.branches == 2:
        _ = denoiser.without  # raises where there is none
    tuned = plan.metadata.get("guidance_scale")
    if plan.branches == 2 and tuned is not None and float(tuned) != denoiser.guidance_scale:
        raise InputError(
            f"this plan has guidance_scale={tuned} folded into its coefficients, but {denoiser.guidance_scale} was "
            "given: pass the tuned scale, or tune a plan without split guidance"
        )


def draw_step_noise(plan: Plan, noise: Tensor, streams: Streams | None) -> Tensor | None:
    """The fresh unit noises (Z, B, …) of a stochastic plan, float32; None for a deterministic one."""
    if plan.noises == 0:
        return None
    return unit_noise((plan.noises, *noise.shape), streams, noise.device, samples=1)


def _sample_batch(
    plan: Plan, denoiser: Denoiser, samples: slice, step_noise: Tensor | None, on_step: OnStep | None
) -> Tensor:
    noise = denoiser.noise[samples][None]
    loop = Loop(plan, noise, step_noise=None if step_noise is None else step_noise[:, samples])
    evaluate = denoiser.asking(samples)
    while not loop.done:
        loop.ask(evaluate)
        if on_step is not None:
            on_step(loop.evaluation - 1, loop.x if loop.done else loop.x.to(denoiser.dtype))
    if not bool(torch.isfinite(loop.x).all()):  # checking once at the end keeps host syncs out of the loop
        for i in range(plan.nfe):
            require_finite(loop.columns[plan.output_slice(i)], step=i, first_sample=samples.start)
    return loop.x.to(noise.dtype)
