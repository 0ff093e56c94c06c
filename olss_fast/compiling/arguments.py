"""A network's arguments as a flat list of tensors, as compiled code takes them.

Nested mappings and sequences are flattened to dotted names ("added_cond_kwargs.text_embeds"). Values that are not
tensors are baked into the code.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from olss_fast.errors import InputError
from olss_fast.network import call_network
from olss_fast.support.tree import LEAVES, as_tensor, dotted, flat, is_array, mapped, with_paths


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [x]} -> {"a.b": 1, "c.0": x}; numpy arrays as tensors. Lists without tensors stay whole.

    arguments: with strings as names, as `checked_arguments` leaves them.
    """
    if LEAVES.issuperset(map(type, arguments.values())):  # the usual arguments, without a walk
        return {name: as_tensor(value) for name, value in arguments.items()}
    found: dict[str, Any] = {}
    for path, leaf in with_paths(dict(arguments), whole=_stays_whole):
        if dotted(path) in found:
            raise InputError(f"{dotted(path)} was given twice, nested and by its flat name; give it once")
        found[dotted(path)] = as_tensor(leaf)
    return found


def fixed_value(value: Any) -> str:
    """The text of a baked-in value in a manifest."""
    return repr(value)[:200]


def is_fixed_as(text: str, value: Any) -> bool:
    """True if `text` is the whole of `value`, a plain one: of a longer or another value it does not tell enough."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return repr(value) == text


def _stays_whole(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not any(map(is_array, flat(value)[0]))
    return isinstance(value, Mapping) and not value


class FlatNetwork(nn.Module):
    """`network` as forward(x, time, *tensors), with the tensors in the order of `flatten(example)`. The example holds
    no NumPy arrays.

    lends_x: pass x itself; a network that writes to its input must get a copy.
    """

    lends_x = True

    def __init__(self, network: nn.Module, example: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self._example = example

    @property
    def form(self) -> str:
        """The nesting of the arguments."""
        return str(flat(self._example)[1])

    @property
    def fixed(self) -> list[Any]:
        """The arguments that are not tensors, whole: a manifest has only the beginning of each."""
        return [leaf for leaf in flat(self._example).leaves if not isinstance(leaf, Tensor)]

    def forward(self, x: Tensor, time: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        arguments = mapped(lambda leaf: next(left) if isinstance(leaf, Tensor) else leaf, self._example)
        return call_network(self.network, x if self.lends_x else x.clone(), time, arguments)
