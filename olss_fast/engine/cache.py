"""Compiled code on disk, keyed by its sources. Entries are written atomically and verified when read.

The folder is `OLSS_FAST_CACHE`, else `olss_fast` in the user's cache folder. Its code is run, so it is used only if
nobody else may write there.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

from olss_fast.engine.manifest import NUMBER, STRING, check
from olss_fast.errors import EngineFileError, OlssError
from olss_fast.support import container
from olss_fast.support.container import Blob, Format

FORMAT = Format("olss_fast.code", 3, "compiled code", EngineFileError)
MEMBERS = {"key": STRING, "seconds_to_compile": NUMBER, "difference": NUMBER}
KEPT = 256  # entries, the most recently used


class Entry(NamedTuple):
    """Compiled code, the seconds that it took, and how much its outputs differed from the network's, relative to the
    largest."""

    code: dict[str, bytes]
    seconds: float
    difference: float


def default_folder() -> Path:
    """The folder of the cache, from the environment."""
    if "OLSS_FAST_CACHE" in os.environ:
        return Path(os.environ["OLSS_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olss_fast"


def load(folder: Path, key: str) -> Entry | None:
    """What was stored; None if missing or not trusted."""
    path = folder / f"{key}.safetensors"
    if not path.exists() or not _private(folder):
        return None
    try:
        with container.naming(path, FORMAT):
            facts, blobs = container.read(path, FORMAT)
            check({name: facts.get(name) for name in MEMBERS}, MEMBERS, "the entry")
    except OlssError:
        return None  # a damaged entry is compiled again, and then replaced
    if facts["key"] != key:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    code = {name: bytes(blob.data) for name, blob in blobs.items()}
    return Entry(code, facts["seconds_to_compile"], facts["difference"])


def store(folder: Path, key: str, entry: Entry) -> None:
    """Keeps `entry`; a failure only makes the next build slower, and gives a warning."""
    blobs = {name: Blob.of_bytes(content) for name, content in entry.code.items()}
    facts = {"key": key, "seconds_to_compile": entry.seconds, "difference": entry.difference}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        container.write(folder / f"{key}.safetensors", FORMAT, facts, blobs)
        _forget_oldest(folder)
    except (OSError, EngineFileError) as cause:
        warnings.warn(f"compiled code could not be kept for the next build: {cause}", UserWarning, stacklevel=2)


def _forget_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in entries[KEPT:]:
        path.unlink(missing_ok=True)


def _private(folder: Path) -> bool:
    if os.name == "nt":
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
