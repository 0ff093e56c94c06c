"""Compiled code on disk, keyed by its sources. Entries are written atomically and verified when read.

The folder is `OLSS_FAST_CACHE`, else `olss_fast` in the user's cache folder. Its code is run, so it is used only if
nobody else may write there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olss_fast.errors import EngineFileError, OlssError
from olss_fast.support import container
from olss_fast.support.container import Blob, Format

FORMAT = Format("olss_fast.code", 2, "compiled code", EngineFileError)
KEPT = 256  # entries, the most recently used


def default_folder() -> Path:
    """The folder of the cache, from the environment."""
    if "OLSS_FAST_CACHE" in os.environ:
        return Path(os.environ["OLSS_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olss_fast"


def key_of(facts: Mapping[str, object]) -> str:
    """The key of code compiled from these facts, which must be JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(folder: Path | None, key: str) -> tuple[dict[str, bytes], float] | None:
    """The code and the seconds of its compilation; None if missing or not trusted."""
    entry = _read(folder, key)
    if entry is None:
        return None
    manifest, code = entry
    seconds = manifest.get("seconds_to_compile")
    return (code, float(seconds)) if isinstance(seconds, (int, float)) and code else None


def store(folder: Path | None, key: str, code: Mapping[str, bytes], seconds: float) -> None:
    """Keeps `code`; a failure only makes the next build slower, and gives a warning."""
    _write(folder, key, {"seconds_to_compile": seconds}, code)


def point(folder: Path | None, name: str, key: str, difference: float) -> None:
    """Records that the network called `name` was compiled to the entry `key`, and their largest difference."""
    _write(folder, name, {"same_as": key, "difference": difference}, {})


def follow(folder: Path | None, name: str) -> tuple[dict[str, bytes], float, float] | None:
    """The record of `point`: code and seconds as in `load`, and the difference."""
    entry = _read(folder, name)
    if entry is None:
        return None
    target, difference = entry[0].get("same_as"), entry[0].get("difference")
    if not isinstance(target, str) or not re.fullmatch("[0-9a-f]{64}", target) or not isinstance(difference, float):
        return None
    found = load(folder, target)
    return None if found is None else (*found, difference)


def _read(folder: Path | None, key: str) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    if folder is None or not (path := folder / f"{key}.safetensors").exists() or not _private(folder):
        return None
    try:
        manifest, blobs = container.read(path, FORMAT)
    except OlssError:
        return None  # a damaged entry is compiled again, and then replaced
    with contextlib.suppress(OSError):
        os.utime(path)
    return (manifest, {name: bytes(blob.data) for name, blob in blobs.items()}) if manifest.get("key") == key else None


def _write(folder: Path | None, key: str, facts: Mapping[str, object], code: Mapping[str, bytes]) -> None:
    if folder is None:
        return
    blobs = {name: Blob.of_bytes(content) for name, content in code.items()}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        container.write(folder / f"{key}.safetensors", FORMAT, {"key": key, **facts}, blobs)
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
