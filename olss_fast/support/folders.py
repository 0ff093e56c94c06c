"""Output folders, checked before the work starts."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from olss_fast.errors import InputError

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}  # endings that no folder is meant to have
PathLike = str | Path


def make_folder(folder: PathLike) -> Path:
    """The folder, created if missing. `InputError` if that fails, or if no file can be written in it."""
    folder, doing = Path(folder), "made"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        doing = "written"
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp") as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be {doing}: {error.strerror or error}; name another") from error
    return folder


def try_folder(folder: PathLike) -> Path:
    """The folder, if files can be written there; errors as in `make_folder`. Whatever the check creates is removed
    again, so a run without a result leaves no empty folder."""
    folder = Path(folder)
    if folder.suffix.lower() in PICTURES and not folder.is_dir():
        raise InputError(f"{folder} is the name of a picture; expected a folder for the files")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        return make_folder(folder)
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()
