"""Nested arguments (dicts, lists, tuples and dataclasses) as torch pytrees: flattening and restoring.

Leaves are tensors, arrays, and objects that hold none. Dataclasses, and mappings that torch does not know, are opened
if they hold tensors; such mappings come back as dicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Path = tuple[Any, ...]  # of torch's keys, each of which is spelled "['a']", "[1]" or ".a"


LEAVES = frozenset({Tensor, np.ndarray, type(None), bool, int, float, str})  # exact types that hold nothing else


class Flat(NamedTuple):
    """The leaves, and the form: `form.unflatten(leaves)` restores the tree."""

    leaves: list[Any]
    form: pytree.TreeSpec


def flat(tree: Any) -> Flat:
    """The tree as leaves and form."""
    if type(tree) is dict and LEAVES.issuperset(map(type, tree.values())):  # the usual arguments, without a walk
        return Flat([*tree.values()], _form_with(*tree))
    leaves, form = pytree.tree_flatten(tree)
    if any(map(_holds_more, leaves)):
        leaves, form = pytree.tree_flatten(form.unflatten([_opened(leaf) for leaf in leaves]))
    return Flat(leaves, form)


def with_paths(tree: Any, whole: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """The leaves, each with its path. Objects for which `whole` is true count as leaves."""
    return pytree.tree_flatten_with_path(pytree.tree_map(_opened, tree), whole)[0]


@lru_cache
def _form_with(*keys: Any) -> pytree.TreeSpec:
    """The form of a dict of leaves."""
    return pytree.tree_flatten(dict.fromkeys(keys))[1]


def paired(one: Flat, other: Flat) -> Flat:
    """[one tree, the other]."""
    return Flat([*one.leaves, *other.leaves], pytree.TreeSpec(list, None, [one.form, other.form]))


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with `function` applied to each leaf."""
    if type(tree) in LEAVES:
        return function(tree)
    leaves, form = flat(tree)
    return form.unflatten(map(function, leaves))


def spelled(path: Path) -> str:
    """The path in Python syntax, "['a'][1].b", to follow a name."""
    return pytree.keystr(path)


def dotted(path: Path) -> str:
    """The path with dots: a.1.b."""
    return ".".join(str(getattr(key, dataclasses.fields(key)[0].name)) for key in path)


def in_list(path: Path) -> bool:
    """True if the leaf is in a list or unnamed tuple."""
    return bool(path) and isinstance(path[-1], pytree.SequenceKey)


def as_tensor(leaf: Any) -> Any:
    """The leaf, or a tensor if it is a numeric NumPy array."""
    return torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc" else leaf


def is_array(leaf: Any) -> bool:
    """True for tensors and NumPy arrays."""
    return isinstance(leaf, (Tensor, np.ndarray))


def _parts(value: Any) -> dict[Any, Any] | None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {pytree.GetAttrKey(field.name): getattr(value, field.name) for field in dataclasses.fields(value)}
    return {pytree.MappingKey(key): each for key, each in value.items()} if isinstance(value, Mapping) else None


def _holds_more(leaf: Any) -> bool:
    parts = None if is_array(leaf) else _parts(leaf)
    return parts is not None and any(map(is_array, flat([*parts.values()])[0]))


class _Opened:
    """A pytree node for an object that torch would treat as a leaf, with its parts."""

    def __init__(self, value: Any) -> None:
        self.kind, self.parts = type(value), _parts(value) or {}


def _opened(leaf: Any) -> Any:
    return _Opened(leaf) if _holds_more(leaf) else leaf


def _closed(values: Any, context: tuple[Any, tuple[Any, ...]]) -> Any:
    kind, keys = context
    if not dataclasses.is_dataclass(kind):
        return {key.key: value for key, value in zip(keys, values, strict=True)}
    made: Any = object.__new__(cast(type, kind))
    for key, value in zip(keys, values, strict=True):
        object.__setattr__(made, key.name, value)
    return made


def _with_keys(node: _Opened) -> tuple[list[tuple[Any, Any]], Any]:
    found = [(key, pytree.tree_map(_opened, each)) for key, each in node.parts.items()]
    return found, (node.kind, tuple(node.parts))


def _without_keys(node: _Opened) -> tuple[list[Any], Any]:
    found, context = _with_keys(node)
    return [each for _, each in found], context


pytree.register_pytree_node(_Opened, _without_keys, _closed, flatten_with_keys_fn=_with_keys)


def batches(samples: range, size: int) -> list[slice]:
    """`samples` cut into slices of at most `size`."""
    return [slice(start, min(start + size, samples.stop)) for start in range(samples.start, samples.stop, size)]
