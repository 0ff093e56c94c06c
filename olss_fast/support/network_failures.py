"""Errors that a network raises because of an argument, reworded to name the argument."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import NetworkError
from olss_fast.support.text import quoted
from olss_fast.support.tree import spelled, with_paths


@contextmanager
def naming_arguments(networks: Iterable[Any], samples: int, *given: Mapping[str, Any] | None) -> Iterator[None]:
    """Turns an error of the network into a NetworkError if an argument explains it; other errors pass unchanged.

    networks: modules or other callables. given: conditional and unconditional arguments of all `samples`.
    """
    try:
        yield
    except (IndexError, RuntimeError) as cause:
        if type(cause) not in (IndexError, RuntimeError):  # torch's own; others come from the network's code
            raise
        tensors = {
            (path, id(leaf)): (f"{path[0].key}{spelled(path[1:])}", leaf)
            for arguments in given
            for path, leaf in with_paths(arguments or {})
            if isinstance(leaf, Tensor) and leaf.ndim > 0
        }
        reason = _reason(cause, [*networks], samples, [*tensors.values()])
        if not reason:
            raise
        raise NetworkError(f"the network failed, {quoted(str(cause), 160)}: {reason}") from cause


def _reason(cause: Exception, networks: Sequence[Any], samples: int, tensors: list[tuple[str, Tensor]]) -> str:
    if isinstance(cause, IndexError):
        return "; ".join(_beyond(networks, *each) for each in tensors if not each[1].is_floating_point())
    odd = [f"{name} has {len(value)} rows" for name, value in tensors if len(value) not in (1, samples)]
    return f"{', '.join(odd)}; expected {samples}, one for each sample, of what belongs to the samples" if odd else ""


def _beyond(networks: Sequence[Any], name: str, value: Tensor) -> str:
    """ "y holds 0 to 25, and the network's classes has the entries 0 to 20"."""
    largest = int(value.max())
    tables = [
        f"{path} has the entries 0 to {module.num_embeddings - 1}"
        for network in networks
        if isinstance(network, torch.nn.Module)
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings <= largest
    ]
    found = f", and the network's {', '.join(tables)}" if tables else "; does the network have so many classes?"
    return f"{name} holds numbers from {int(value.min())} to {largest}{found}"
