"""A network's arguments as a flat list of tensors: what compiled code takes.

Nested mappings and sequences are flattened to names with dots ("added_cond_kwargs.text_embeds"). What is no tensor is
baked into the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olss_fast.errors import InputError
from olss_fast.network import call_network


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [x]} -> {"a.b": 1, "c.0": x}; numpy arrays as tensors."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found = flatten(value, name + ".")
        elif isinstance(value, (list, tuple)) and any(isinstance(each, (Tensor, np.ndarray)) for each in value):
            found = flatten({str(i): each for i, each in enumerate(value)}, name + ".")
        else:
            found = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value}
        if twice := sorted(set(flat) & set(found)):
            raise InputError(f"{', '.join(twice)} was given twice, nested and by its flat name; give it once")
        flat.update(found)
    return flat


def require_names(arguments: object, what: str) -> Mapping[str, Any]:
    """InputError unless `arguments` is a mapping of names, each of which is a Python name."""
    given = {} if arguments is None else arguments
    if not isinstance(given, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in given):
        raise InputError(
            f"{what} is {type(given).__name__}; expected a mapping of the network's argument names to values"
        )
    return given


class FlatNetwork(nn.Module):
    """`network` as forward(x, time, *tensors): the tensors in the order in which `flatten(example)` has them.

    lends_x: whether the network is handed x itself; where it writes to it, it must be handed a copy.
    """

    lends_x = True

    def __init__(self, network: nn.Module, example: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self._example = example

    def forward(self, x: Tensor, time: Tensor, *tensors: Tensor) -> Tensor:
        left = list(reversed(tensors))
        return call_network(self.network, x if self.lends_x else x.clone(), time, _filled(self._example, left))


def _filled(value: Any, left: list[Tensor]) -> Any:
    """`value` with its tensors replaced by the last ones of `left`, in turn."""
    if isinstance(value, (Tensor, np.ndarray)):
        return left.pop()
    if isinstance(value, Mapping):
        return {key: _filled(each, left) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_filled(each, left) for each in value])
    return value
