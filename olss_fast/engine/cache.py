"""Compiled code on disk, by what it was compiled from. Entries are written atomically and verified when they are read.

In the folder `OLSS_FAST_CACHE`, else `olss_fast` in the user's folder for caches. Code from it is run, so it is used
only if nobody else may write there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path

from olss_fast.engine import container
from olss_fast.engine.container import Blob
from olss_fast.errors import EngineFileError, OlssError

KIND = "olss_fast.code"
KEPT = 64  # entries, those that were used last


def default_folder() -> Path:
    if "OLSS_FAST_CACHE" in os.environ:
        return Path(os.environ["OLSS_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olss_fast"


def key_of(facts: Mapping[str, object]) -> str:
    """The name of what was compiled from these facts, all of which are JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(folder: Path, key: str) -> tuple[dict[str, bytes], float] | None:
    """The code and the seconds that it took to compile; None where there is none, or none that can be trusted."""
    path = folder / f"{key}.safetensors"
    if not path.exists() or not _private(folder):
        return None
    try:
        manifest, blobs = container.read(path, KIND)
        if manifest.get("key") != key:
            return None
        code = {name: bytes(blob.data) for name, blob in blobs.items()}
        seconds = float(manifest["seconds_to_compile"])
    except (OlssError, KeyError, TypeError, ValueError):
        return None  # a damaged entry is compiled again, and then replaced
    with contextlib.suppress(OSError):
        os.utime(path)
    return code, seconds


def store(folder: Path, key: str, code: Mapping[str, bytes], seconds: float) -> None:
    """Keeps `code`; where that fails, only the next build is slower, and a warning says so."""
    blobs = {name: Blob.of_bytes(content) for name, content in code.items()}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        container.write(
            folder / f"{key}.safetensors", container.encode(KIND, {"key": key, "seconds_to_compile": seconds}, blobs)
        )
        _forget_oldest(folder)
    except (OSError, EngineFileError) as cause:
        warnings.warn(f"compiled code could not be kept for the next build: {cause}", RuntimeWarning, stacklevel=2)


def _forget_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in entries[KEPT:]:
        path.unlink(missing_ok=True)


def _private(folder: Path) -> bool:
    if os.name == "nt":
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
