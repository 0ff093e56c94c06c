"""What a network is apart from its weights' values, as a key: equal keys, equal graphs.

Tracing a network tells its graph, and takes seconds. This takes milliseconds, and errs on the other side: it covers all
attributes of all modules, and every Python file that is loaded, by time and size. What it cannot see (a function that
was replaced while the program runs) is found afterwards, when the compiled network is compared with the network.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import time
from typing import Any

from torch import Tensor, nn


def structure_key(network: nn.Module) -> str | None:
    """A digest, or None for a network that holds what has no name (lambdas, open files), or whose code has changed."""
    buffer = io.BytesIO()
    try:
        sources = repr(_sources())
        _Structure(buffer, network).dump(network)
    except Exception:  # whatever an object of theirs raises when it is to be pickled
        return None
    return hashlib.sha256(buffer.getvalue() + sources.encode()).hexdigest()


class _Structure(pickle.Pickler):
    """Writes a network, its parameters and buffers as what they are, other tensors with their values. Never read."""

    def __init__(self, file: Any, network: nn.Module) -> None:
        super().__init__(file, protocol=4)
        self._weights = {id(each) for each in [*network.parameters(), *network.buffers()]}
        self._seen: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        number = self._seen.setdefault(id(obj), len(self._seen))  # one weight in two places is not two weights
        values = None if id(obj) in self._weights else obj.detach().cpu().tolist()
        return number, str(obj.dtype), tuple(obj.shape), obj.stride(), str(obj.device), values


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
