"""Unit noise from one stream for all samples, or one per sample: then any sample of a batch can be reproduced alone.

A stream is a torch.Generator. It gives the initial noise first, then all fresh noises of a stochastic plan. With
several streams each sample gets the noise of a batch of its own, reproducible from one generator with the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.network import Streams
from olss_fast.support.text import quoted

Seed = int | Sequence[int]

SEEDS = range(2**64)


def checked_streams(generator: Any, seed: Any = None) -> Streams | None:
    """`generator`, or CPU generators seeded with `seed`: one, or a list of one per sample. InputError for others."""
    if seed is None:
        several = isinstance(generator, (list, tuple))
        for each in generator if several else [] if generator is None else [generator]:
            if not isinstance(each, torch.Generator):
                raise InputError(
                    f"generator is a {type(each).__name__}; expected a torch.Generator, such as "
                    "torch.Generator().manual_seed(0), or a list of one for each sample"
                )
        return list(generator) if several else generator
    if generator is not None:
        raise InputError("seed and generator were both given; expected one of them")
    if isinstance(seed, (list, tuple, range)):
        return [_seeded(each) for each in seed]
    return _seeded(seed)


def _seeded(seed: Any) -> torch.Generator:
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not whole or int(seed) not in SEEDS:
        raise InputError(f"seed is {quoted(seed)}; expected a whole number from 0 on, or a list of one for each sample")
    return torch.Generator().manual_seed(int(seed))


def checked_shape(shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple (samples, …); InputError unless it has two or more positive sizes."""
    sizes = tuple(shape) if isinstance(shape, (list, tuple)) else ()
    if len(sizes) < 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"shape is {shape!r}; expected the noise's, (samples, ...): two whole numbers or more")
    return sizes


def unit_noise(
    shape: Sequence[int],
    streams: Streams | None,
    device: torch.device,
    *,
    samples: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Gaussian noise of `shape`, with the samples along axis `samples`. InputError unless there is one stream for
    all, or one per sample."""
    if streams is None or isinstance(streams, torch.Generator):
        place = device if streams is None else streams.device
        return torch.randn(tuple(shape), generator=streams, device=place, dtype=dtype).to(device)
    check_count_of(streams, shape[samples])
    rest = [*shape[:samples], *shape[samples + 1 :]]
    return torch.stack([unit_noise(rest, each, device, dtype=dtype) for each in streams], dim=samples)


def check_count_of(streams: Sequence[torch.Generator], samples: int) -> None:
    """InputError unless there is one stream per sample."""
    if len(streams) != samples:
        raise InputError(f"{len(streams)} seeds or generators came for {samples} samples; expected one for each")


def initial_noise(
    noise: Tensor | None,
    shape: Sequence[int] | None,
    streams: Streams | None,
    *,
    usual: Sequence[int] | None = None,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Tensor:
    """`noise`, or noise drawn in `shape`; given neither, in the shape `usual` with one sample per stream. InputError if
    both are given, or neither and no `usual`."""
    if noise is None and shape is None and usual is not None:
        shape = (len(streams) if isinstance(streams, Sequence) else usual[0], *usual[1:])
    if noise is not None and shape is None:
        return noise
    if noise is not None or shape is None:
        seeded = "" if streams is None else " with the seed or generator"
        came = f"neither noise nor shape came{seeded}" if noise is None else "both noise and shape came"
        raise InputError(f"{came}; expected noise, a tensor (samples, ...), or seed= with shape=(samples, ...)")
    return unit_noise(checked_shape(shape), streams, device or torch.device("cpu")).to(dtype)
