"""What takes long to build is built once a run of the tests, by whichever of its processes needs it first."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "OLSS_TEST_BUILDS"
_own = None if VARIABLE in os.environ else tempfile.TemporaryDirectory(prefix="olss-builds-")  # outside of the tests
FOLDER = Path(_own.name if _own else os.environ[VARIABLE])


def once(name: str, build: Callable[[Path], object]) -> Path:
    """FOLDER/name, which `build(path)` makes. Others wait until it is whole."""
    path, made = FOLDER / name, FOLDER / f"{name}.made"
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            build(path)
            made.touch()
    return path
