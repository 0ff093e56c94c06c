"""Detecting whether a network or another input is the same as before.

| used by | compares |
|---|---|
| the store of a recording | `identity`: everything, by value |
| the cache of compiled code | `structure`: everything but the values of weights |
| a CUDA graph | `watched`: the memory that holds the weights |

An identity is a table of places and digests; equal tables mean equal inputs.

    {"network.first.weight": "3b1f…", "network.shift": "…", "network.(code).forward": "…", "guidance_scale": "…"}

A place is a path through the objects of the inputs. It follows modules (parameters, every buffer, attributes, forward
hooks, training mode), functions (code, defaults, closures, the names they read), bound methods, partials, classes,
mappings, sequences and other objects with attributes; tensors, arrays and pictures are compared by value. Installed
libraries and opaque objects (written in C) are identified by name: only calling them can tell if they have changed.

A call may change a network: a counter, a cache. `moving` names such places, and `differences` leaves them out.
"""

from __future__ import annotations

import collections
import copyreg
import dis
import enum
import functools
import hashlib
import logging
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, PurePath)
PLAIN += (np.generic, np.dtype, torch.dtype, torch.layout, torch.memory_format)
DEPTH = 4  # of tuples in tuples that are told at once
OPAQUE = (logging.Logger, logging.Handler, torch.device, types.ModuleType, types.GeneratorType)
OPAQUE_PACKAGES = ("torch._", "accelerate.hooks")  # compilers and where weights lie: how it is computed, not what
UNTOLD = {"_name_or_path", "name_or_path", "_diffusers_version", "_commit_hash", "transformers_version"}
UNTOLD |= {"_use_default_values", "deprecation_warnings", "_torchdynamo_wrapper_id"}  # in a chance order, or counted
VERSIONED = {"builtins", "numpy", "olss_fast", "torch"}  # whose versions are known to whoever keeps code
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OF_MODULES = set(vars(nn.Module())) - {"training"}
EMPTY = types.CellType()  # of a name that has no value yet
Children = Iterable[tuple[str, Any]]
Table = dict[str, str]


@dataclass
class Identity:
    """Digests by place."""

    digests: Table = field(default_factory=dict)
    tensors: dict[int, tuple[tuple[int, int], str, Tensor]] = field(default_factory=dict)  # kept, for ids return
    packages: set[str] = field(default_factory=set)  # that are told by name


def identity(question: Mapping[str, Any], before: Identity | None = None) -> Identity:
    """The identity of the objects of `question`, by name. Tensors unchanged since `before` are not read again."""
    return _Walk({} if before is None else before.tensors).through(question)


def structure(question: Mapping[str, Any], weights: Iterable[Tensor]) -> str:
    """A digest of the objects of `question` without the values of `weights`: equal digests mean equal graphs. Packages
    identified by name enter with the times and sizes of their files."""
    found = _Walk({}, {id(each) for each in weights}).through(question)
    files = _files(found.packages - VERSIONED)
    return digest(*(part for place in sorted(found.digests.items()) for part in place), repr(files))


def _files(packages: Set[str]) -> list[tuple[str, int, int]]:
    """The loaded modules of packages, with the times and sizes of their files."""
    files = [(name, getattr(module, "__file__", None) or "") for name, module in sorted(sys.modules.items())]
    mine = [(name, file) for name, file in files if name.partition(".")[0] in packages and os.path.exists(file)]
    return [(name, os.stat(file).st_mtime_ns, os.stat(file).st_size) for name, file in mine]


def moving(before: Identity, after: Identity) -> list[str]:
    """Places that changed in between; if a container gained or lost items, the container."""
    first, second = before.digests, after.digests
    changed = {place for place in first.keys() & second.keys() if first[place] != second[place]}
    places = first.keys() | second.keys()
    every = changed | {_container(place, places) for place in first.keys() ^ second.keys()}
    return sorted(place for place in every if not _within(place, every - {place}))


def _container(place: str, places: Set[str]) -> str:
    """The place of the container of an item "container[item]"; that of anything else is its own."""
    cuts = [place[:i] for i, letter in enumerate(place) if letter == "["] if place.endswith("]") else []
    return next((cut for cut in reversed(cuts) if cut in places), place)


def differences(first: Table, second: Table, left_out: Collection[str]) -> list[str]:
    """Places at which two tables differ, except those in `left_out` and everything below them."""
    places = (place for place in first.keys() | second.keys() if first.get(place) != second.get(place))
    return sorted(place for place in places if not _within(place, left_out))


def _within(place: str, others: Iterable[str]) -> bool:
    return (place + ".").startswith(tuple(other + mark for other in others for mark in ".["))


class _Walk:
    """Visits every object once; a second place of the same object refers to the first."""

    def __init__(self, known: Mapping[int, tuple[tuple[int, int], str, Tensor]], weights: Collection[int] = ()) -> None:
        self.found, self.known, self.weights = Identity(), known, dict.fromkeys(weights, "")
        self.places: dict[int, str] = {}
        self.kept: list[Any] = []  # otherwise another object could reuse the id of a temporary

    def through(self, question: Mapping[str, Any]) -> Identity:
        waiting: list[tuple[str, Any]] = [*question.items()][::-1]
        while waiting:
            place, value = waiting.pop()
            waiting += [(place + name, each) for name, each in reversed([*self.visit(place, value)])]
        return self.found

    def visit(self, place: str, value: Any) -> Children:
        """Records the digest of `value` itself, and returns its parts."""
        digests = self.found.digests
        if isinstance(value, Tensor):
            digests[place] = self.tensor(place, value)
        elif (spelled := spell(value)) is not None:
            digests[place] = digest(type(value).__qualname__, spelled)
        elif (seen := self.places.setdefault(id(value), place)) != place:
            digests[place] = digest("as", seen)
        else:
            self.kept.append(value)
            try:
                told, children = consists_of(value)
            except Exception:  # foreign objects may raise anything when inspected
                told, children = "", ()
            digests[place] = digest(_name(type(value)), told)
            kind = value if isinstance(value, (type, types.FunctionType)) else type(value)
            if _installed(kind.__module__):
                self.found.packages.add(str(kind.__module__).partition(".")[0])
            return children
        return ()

    def tensor(self, place: str, value: Tensor) -> str:
        if id(value) in self.weights:  # one weight in two places is not two weights
            first = self.weights[id(value)] = self.weights[id(value)] or place
            return digest(first, repr((value.dtype, value.shape, value.stride(), value.device)))
        try:
            state = (value._version, value.data_ptr())
        except RuntimeError:  # inference tensors have no version, and some have no memory of their own
            return digest(*tensor_content(value))
        before = self.known.get(id(value))
        told = before[1] if before is not None and before[0] == state else digest(*tensor_content(value))
        self.found.tensors[id(value)] = state, told, value
        return told


def digest(*parts: str | bytes) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of the parts and their lengths."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:32]


def tensor_content(value: Tensor) -> tuple[str | bytes, ...]:
    """Shape, dtype and bytes of a tensor; without the bytes if they cannot be read."""
    header = f"{tuple(value.shape)} {value.dtype}"
    try:
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        return header, flat.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError):  # weights that lie elsewhere, or have another layout
        return (header,)


def spell(value: Any) -> str | bytes | None:
    """Plain values, containers of them, and arrays, as text or bytes; None for other objects."""
    if type(value) is dict and all(isinstance(each, PLAIN) for pair in value.items() for each in pair):
        return repr(sorted((repr(key), repr(each)) for key, each in value.items() if key not in UNTOLD))
    plain = _plain(value, DEPTH)
    return _array(value) if plain is None else plain


def _plain(value: Any, depth: int) -> str | None:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, re.Pattern):
        return repr((value.pattern, value.flags))
    if not depth or not isinstance(value, (tuple, list, Set)):
        return None
    parts = [_plain(each, depth - 1) for each in value]
    spelled = [part for part in parts if part is not None]
    if isinstance(value, Set):  # unordered; items that are not plain are identified by their number
        return repr((len(parts), sorted(spelled)))
    return repr((type(value).__qualname__, parts)) if len(spelled) == len(parts) else None


def _array(value: Any) -> bytes | None:
    """NumPy's arrays, and pictures, which only have the interface."""
    if not (hasattr(type(value), "__array__") or hasattr(type(value), "__array_interface__")):
        return None
    try:
        array = np.asarray(value)
    except Exception:  # whatever somebody's array says
        return None
    return None if array.dtype.hasobject else f"{array.shape} {array.dtype}".encode() + array.tobytes()


# --- what an object consists of ---------------------------------------------------------------------------------------


def consists_of(value: Any) -> tuple[str | bytes, Children]:
    """The object's own description, and its parts by name: ".attribute" or "[item]"."""
    if hasattr(type(value), "what_is_asked"):  # it knows best
        return "", _attributes(value.what_is_asked())
    for kind, parts in _KINDS:
        if isinstance(value, kind):
            return parts(value)
    if callable(getattr(value, "set_timesteps", None)) and isinstance(getattr(value, "config", None), Mapping):
        return "", [*_code(type(value)), (".config", dict(value.config))]  # a scheduler; the rest is of its last run
    if type(value).__module__.startswith(OPAQUE_PACKAGES):
        return "", ()
    return "", [*_code(type(value)), *_attributes(_members(value))]


def _attributes(members: Mapping[str, Any]) -> Children:
    return [(f".{name}", each) for name, each in members.items() if name not in UNTOLD]


def _members(value: Any) -> dict[str, Any]:
    slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return {name: getattr(value, name) for name in sorted(slots) if hasattr(value, name)} | getattr(
        value, "__dict__", {}
    )


def _module(value: nn.Module) -> tuple[str, Children]:
    tensors = {**dict(value.named_parameters(recurse=False)), **dict(value.named_buffers(recurse=False))}
    own = {name: each for name, each in vars(value).items() if name not in OF_MODULES}
    hooks = {name: [*vars(value).get(name, {}).values()] for name in HOOKS}  # their keys count through the process
    return "", [*_code(type(value)), *_attributes({**tensors, **dict(value.named_children()), **own, **hooks})]


def _mapping(value: Mapping[Any, Any]) -> tuple[str, Children]:
    items = [(f"[{_key(key)}]", each) for key, each in value.items() if key not in UNTOLD]
    return "", sorted(items, key=lambda item: item[0])


def _key(key: Any) -> str:
    spelled = spell(key)
    return repr(key) if isinstance(key, PLAIN) else _name(type(key)) if spelled is None else digest(spelled)


def _sequence(value: Iterable[Any]) -> tuple[str, Children]:
    return "", [(f"[{i}]", each) for i, each in enumerate(value)]


def _function(value: types.FunctionType) -> tuple[str | bytes, Children]:
    names, cells = value.__code__.co_freevars, value.__closure__ or ()
    closure = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True) if cell != EMPTY}
    if _installed(value.__module__):
        return f"{value.__module__}.{value.__qualname__}", _attributes(closure)
    given = {"(defaults)": (value.__defaults__, value.__kwdefaults__)}
    read = dict(_read(value.__globals__, value.__code__))
    return _spelled_code(value.__code__), _attributes({**closure, **given, **read, **vars(value)})


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _spelled_code(code: types.CodeType) -> str:
    return repr(
        [(each.co_code, each.co_names, [spell(c) for c in each.co_consts], each.co_argcount) for each in _codes(code)]
    )


def _read(scope: Mapping[str, Any], code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """The objects that a function reads by name, also through modules that are not installed packages."""
    wanted = [instruction for each in _codes(code) for instruction in dis.get_instructions(each)]
    for name in sorted({each.argval for each in wanted if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")} & scope.keys()):
        yield from _named(name, scope[name], {name for each in _codes(code) for name in each.co_names})


def _named(name: str, value: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, types.ModuleType):
        yield name, value
    elif not _installed(value.__name__):
        for member in sorted(names & vars(value).keys() - {name}):
            yield from _named(f"{name}.{member}", vars(value)[member], names - {member})


def _class(value: type) -> tuple[str, Children]:
    """The members of a class outside installed packages: functions and plain values."""
    if _installed(value.__module__):
        return _name(value), ()
    members = {name: each for name, each in vars(value).items() if callable(each) or not name.startswith("__")}
    return _name(value), [*_attributes(members), *((f".({_name(base)})", base) for base in value.__bases__)]


def _code(kind: type) -> Children:
    return [] if _installed(kind.__module__) else [(".(code)", kind)]


def _builtin(value: types.BuiltinFunctionType) -> tuple[str, Children]:
    owner = value.__self__
    return value.__qualname__, [] if isinstance(owner, types.ModuleType) else [(".self", owner)]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _installed(module: str | None) -> bool:
    """True if a module belongs to Python or to an installed package: identified by name."""
    package = str(module).partition(".")[0]
    if package in ("olss_fast", "builtins") or package in sys.builtin_module_names:
        return True
    if package == "__main__":
        return False
    known = (getattr(sys.modules.get(name), "__file__", None) for name in (str(module), package))
    path = PurePath(next(filter(None, known), ""))
    if {"site-packages", "dist-packages"} & {*path.parts}:
        return True
    return any(path.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


_KINDS: tuple[tuple[Any, Callable[[Any], tuple[str | bytes, Children]]], ...] = (
    (OPAQUE, lambda value: ("", ())),
    (nn.Module, _module),
    (torch.Generator, lambda value: ("", [(".state", value.get_state())])),
    (Mapping, _mapping),
    ((list, tuple, collections.deque), _sequence),
    (np.ndarray, lambda value: _sequence(value.tolist())),
    (types.FunctionType, _function),
    (types.MethodType, lambda value: ("", [(".self", value.__self__), (".function", value.__func__)])),
    (types.BuiltinFunctionType, _builtin),
    (
        functools.partial,
        lambda value: ("", _attributes({"func": value.func, "args": value.args, "keywords": value.keywords})),
    ),
    ((staticmethod, classmethod), lambda value: ("", [(".function", value.__func__)])),
    (property, lambda value: ("", [(".get", value.fget)])),
    (type, _class),
)


# --- the memory in which weights lie ----------------------------------------------------------------------------------

Watched = tuple[Mapping[str, Any], str, str, object]
"""The holder of a parameter, buffer or module, its key there, its name, and a value that changes if it is replaced."""


def watched(networks: Sequence[nn.Module | None]) -> list[Watched]:
    """Each parameter, buffer and module of the networks, as a graph captures it."""
    found: list[Watched] = []
    for i, root in enumerate(networks):
        prefix = f"{i}." if len(networks) > 1 else ""
        for path, module in () if root is None else root.named_modules():
            where = prefix + path + "." * bool(path)
            for owner in (module._parameters, module._buffers, module._modules):
                found += [(owner, key, where + key, _place(each)) for key, each in owner.items()]
    return found


def first_moved(before: Iterable[Watched]) -> str:
    """The name of the first parameter, buffer or module that has moved or was replaced; "" if none."""
    return next((name for owner, key, name, place in before if _place(owner.get(key)) != place), "")


def _place(value: Tensor | nn.Module | None) -> object:
    return value.data_ptr() if isinstance(value, Tensor) else value
