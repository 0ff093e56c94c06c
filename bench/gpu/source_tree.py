"""Makes the source tree importable as it stands, and wheels that lie beside it, without installing anything.

The root of the tree must not be on sys.path, where its folder `kernels` would hide the package of that name which
diffusers and transformers look for. `olss_fast._C` need not be built: it plans paths, and nothing here does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"olss_fast": ROOT / "olss_fast", "olss_fast.kernels": ROOT / "kernels"}


class SourceTree(importlib.abc.MetaPathFinder):
    """Finds the two packages in this tree, before any that is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = FOLDERS.get(fullname)
        if folder is None:
            return None
        where = [str(folder)]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=where
        )


def use() -> None:
    """Must come before the first import of `olss_fast`. The checks of the kernels are those of the tests."""
    sys.meta_path.insert(0, SourceTree())
    sys.path.append(str(ROOT / "tests" / "helpers"))


def unpack_wheels(folder: Path) -> Path:
    """Every wheel in `folder`, unpacked and importable where the machine has no such package itself."""
    target = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    sys.path.append(str(target))
    return target
