"""`olss_fast.sample`: run a Plan on a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olss_fast._old_forms import takes_old_forms
from olss_fast.errors import InputError
from olss_fast.executors import reference
from olss_fast.network import Conditioning, Denoiser, Network, check_noise, module_of, require_finite
from olss_fast.plan import Plan


@takes_old_forms
def sample(
    network: Network | Sequence[Network],
    plan: Plan,
    noise: Tensor,
    *,
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    doubled: bool = True,
) -> Tensor:
    """Sample with `plan` from unit Gaussian `noise` (P, ...).

    The network is called as `network(x, timestep, **conditioning)` with x of the noise's shape in the network's own
    floating-point dtype (that of its parameters, else the noise's) and timestep (B,) float32 in the network's unit;
    exactly `plan.nfe` times for each batch of `batch_size` samples (default: all at once). A guided pair
    f = u + g (c - u) is one call on a doubled batch, or two calls with `doubled=False`. Rows are accumulated in
    float64; the result has the noise's dtype and device. `generator` draws the fresh noises of a stochastic plan.

    Raises `InputError` for unusable noise, guidance or conditioning, `NetworkError` for outputs of a wrong shape or
    that are not finite (naming evaluation and sample).
    """
    check_noise(noise)
    denoiser = Denoiser(
        network,
        samples=noise.shape[0],
        conditioning=conditioning,
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        doubled=doubled,
    )
    check_plan_fits(plan, denoiser)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    with torch.no_grad():
        step_noise = draw_step_noise(plan, noise, generator)
        parts = [
            _sample_batch(plan, denoiser, noise, samples, step_noise)
            for samples in batches(range(noise.shape[0]), batch_size or noise.shape[0])
        ]
    return torch.cat(parts)


def check_plan_fits(plan: Plan, denoiser: Denoiser) -> None:
    """Raise `InputError` if the plan needs more networks than there are, or has another guidance folded in."""
    denoiser.require_networks(int(plan.models.max()))
    tuned = plan.metadata.get("guidance_scale")
    if plan.branches == 2 and tuned is not None and float(tuned) != denoiser.guidance_scale:
        raise InputError(
            f"this plan has guidance_scale={tuned} folded into its coefficients, but {denoiser.guidance_scale} was "
            "asked for: pass the tuned scale, or tune a plan without split guidance"
        )


def batches(samples: range, size: int) -> list[slice]:
    """`samples` cut into slices of at most `size`."""
    return [slice(start, min(start + size, samples.stop)) for start in range(samples.start, samples.stop, size)]


def network_dtype(network: Network, default: torch.dtype) -> torch.dtype:
    """The floating-point dtype of the network's parameters, or `default` if it has none to show."""
    module = module_of(network)
    parameters = () if module is None else module.parameters()
    return next((each.dtype for each in parameters if each.is_floating_point()), default)


def draw_step_noise(plan: Plan, noise: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """The fresh unit noises (Z, B, …) of a stochastic plan, float32; None for a deterministic one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator is a {type(generator).__name__}; expected a torch.Generator, such as "
            "torch.Generator().manual_seed(0)"
        )
    if plan.noises == 0:
        return None
    device = generator.device if generator is not None else noise.device
    shape = (plan.noises, *noise.shape)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(noise.device)


def _sample_batch(plan: Plan, denoiser: Denoiser, noise: Tensor, samples: slice, step_noise: Tensor | None) -> Tensor:
    outputs: list[Tensor] = []
    result = reference.run(
        plan,
        lambda x, timestep, **how: denoiser(x, timestep, samples, **how),
        noise[samples],
        dtype=network_dtype(denoiser.networks[0], noise.dtype),
        step_noise=None if step_noise is None else step_noise[:, samples],
        on_output=lambda i, output: outputs.append(output),
    )
    if not bool(torch.isfinite(result).all()):  # one look at the end keeps host syncs out of the loop
        for i, output in enumerate(outputs):
            require_finite(output, step=i, first_sample=samples.start)
    return result.to(noise.dtype)
