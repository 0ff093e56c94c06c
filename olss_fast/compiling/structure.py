"""What a network is apart from its weights' values, as a key: equal keys, equal graphs.

Tracing a network tells its graph, and takes seconds. This takes milliseconds, and errs on the other side: it covers all
attributes of all modules, the code of their classes with what it reads by name, and every Python file that is loaded,
by time and size. What it does not see is found afterwards, when the compiled network is compared with the network.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import pickle
import sys
import time
import types
from typing import Any

from torch import Tensor, nn

VERSIONED = {"torch", "numpy", "builtins", "typing", "collections", "abc", "functools", "enum"}
ENTRIES = ("__call__", "__init__", "forward")
PLAIN = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset)


def structure_key(network: nn.Module) -> str | None:
    """A digest, or None for a network that holds what has no name (lambdas, open files), or whose code has changed."""
    buffer = io.BytesIO()
    try:
        sources = repr(_sources())
        structure = _Structure(buffer, network)
        structure.dump(network)
    except Exception:  # whatever an object of theirs raises when it is to be pickled
        return None
    return hashlib.sha256(buffer.getvalue() + repr(structure.code).encode() + sources.encode()).hexdigest()


class _Structure(pickle.Pickler):
    """Writes a network, its parameters and buffers as what they are, other tensors with their values. Never read."""

    def __init__(self, file: Any, network: nn.Module) -> None:
        super().__init__(file, protocol=4)
        self._weights = {id(each) for each in [*network.parameters(), *network.buffers()]}
        self._seen: dict[int, int] = {}
        self.code: list[object] = []
        self._read: set[int] = set()
        self._kept: list[Any] = []

    def reducer_override(self, obj: Any) -> Any:
        """Classes and functions are written by their names: what these names stand for is noted beside."""
        self._note(obj)
        return NotImplemented

    def _note(self, value: Any) -> None:
        """The code of a function, or of a class as far as a call of it reaches, and what is plain of all that this
        reads by name. Torch's is told by its version."""
        function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
        if id(function) in self._read or str(getattr(function, "__module__", "")).partition(".")[0] in VERSIONED:
            return
        self._read.add(id(function))
        self._kept.append(function)  # else another object could get its id
        if isinstance(function, type):
            self._note_class(function)
        elif isinstance(function, types.FunctionType):
            scope = inspect.getclosurevars(function)
            found = {**scope.globals, **scope.nonlocals, "(defaults)": function.__defaults__}
            for name, each in sorted(found.items()):
                self._note_named(function.__qualname__, name, each)
            self._note_code(function.__code__)

    def _note_class(self, owner: type) -> None:
        """Its members that are named by `forward`, or by what that names, and so on."""
        waiting, met = set(ENTRIES), set()
        while waiting:
            name = min(waiting)
            waiting.remove(name)
            met.add(name)
            member = inspect.getattr_static(owner, name, None)
            self._note_named(owner.__qualname__, name, member)
            function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            if isinstance(function, types.FunctionType):
                waiting |= _names(function.__code__) - met

    def _note_named(self, owner: str, name: str, value: Any) -> None:
        if isinstance(value, PLAIN):
            self.code.append((owner, name, _spelled(value)))
        else:
            self._note(value)

    def _note_code(self, code: types.CodeType) -> None:
        self.code.append((code.co_name, code.co_code, code.co_names))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._note_code(constant)
            else:
                self.code.append(_spelled(constant))

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        number = self._seen.setdefault(id(obj), len(self._seen))  # one weight in two places is not two weights
        values = None if id(obj) in self._weights else obj.detach().cpu().tolist()
        return number, str(obj.dtype), tuple(obj.shape), obj.stride(), str(obj.device), values


def _names(code: types.CodeType) -> set[str]:
    """All that a function and those inside it read by name."""
    return set(code.co_names).union(*(_names(each) for each in code.co_consts if isinstance(each, types.CodeType)))


def _spelled(value: object) -> str:
    """The same in every process: sets have an order of their own in each, and what is not plain has an address."""
    if isinstance(value, (tuple, frozenset)):
        spelled = [_spelled(each) for each in value]
        return f"{type(value).__name__} {sorted(spelled) if isinstance(value, frozenset) else spelled}"
    return repr(value) if isinstance(value, PLAIN) else type(value).__qualname__


def _sources() -> list[tuple[str, int, int]]:
    """Every Python file that is loaded, with time and size. Raises _Changed if one may be other than what is loaded."""
    found, started = [], _started()
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and path.endswith(".py") and os.path.exists(path):
            status = os.stat(path)
            if status.st_mtime > started:
                raise _Changed(path)
            found.append((name, status.st_mtime_ns, status.st_size))
    return found


class _Changed(Exception):
    """A file was written after this process began."""


def _started() -> float:
    """When this process began, in seconds since 1970, at the earliest; where the system does not tell, long ago."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="utf-8") as file:
            up = float(file.read().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK") - 1.0
    except (OSError, ValueError, IndexError):
        return 0.0
