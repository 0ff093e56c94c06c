"""The store of a recording: a folder of files, written atomically and with checksums, that belongs to one question.

`manifest.json` holds the identity of what was asked (`identity`): whoever asks something else with the same folder is
refused, and told where the difference lies; whoever asks the same resumes. What an identity cannot see, the inside of
compiled code for one, the network is asked about: it must answer `probe` as it did. The names of all other files hold a
key of that identity. Nothing is pickled.

A file says its own SHA-256: of its content with 64 zeros in the place of these digits, where they first occur. It is
looked at once in every process, before anything of the file is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from olss_fast.errors import StoreError
from olss_fast.support.files import open_regular, read_bounded, write_atomically
from olss_fast.support.identity import Identity, Table, differences, digest, moving
from olss_fast.support.json import strict_object
from olss_fast.support.text import quoted

MANIFEST = "manifest.json"
FORMAT = "olss-fast-recording"
VERSION = 2
STALE = 86400.0  # seconds
LARGEST_MANIFEST = 2**28  # bytes
LARGEST_HEADER = 2**20
BLOCK = 2**22  # bytes of a file that are looked at together
BLANK = b"0" * 64
TOLERANCE = 1e-3  # of a sample's norm: more than another number of threads, or another kernel with TF32, makes of it
ROUNDINGS = 4.0  # or so many roundings of the network's dtype, where that is more: kernels for half precision differ


class Store:
    """A folder of checked files. `key` is in all their names; `kept` says whether the folder is the user's own."""

    def __init__(self, folder: Path, key: str = "", *, kept: bool = True) -> None:
        self.folder, self.key, self.kept = Path(folder), key, kept
        self._sound: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot use {self.folder} as a store: {error}") from error

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{'-' * bool(self.key)}{self.key}.safetensors"

    @property
    def advice(self) -> str:
        """Advice for a full disk."""
        if self.kept:
            return "Then start again with the same store: finished chunks are kept"
        return "Or give store=, a folder on another disk: what is recorded there is kept"

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for one rollout, gone afterwards; those that killed runs left are removed after a day."""
        for left in self.folder.glob("olss-rollout-*"):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
        with temporary_folder("olss-rollout-", self.folder) as folder:
            yield folder

    def has(self, name: str) -> bool:
        """True if there is a file of this name; it is not checked."""
        return self.path(name).exists()

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors atomically, with a checksum. Raises `StoreError`."""
        content = save({key: t.contiguous().cpu() for key, t in tensors.items()}, {"sha256": BLANK.decode()})
        try:
            write_atomically(self.path(name), sealed(content), error=StoreError)
        except StoreError as error:
            raise StoreError(f"{error}. {self.advice}") from error
        self._sound.add(name)

    def check(self, name: str) -> None:
        """Raise `StoreError` if a file is not as it was written."""
        if name in self._sound:
            return
        try:
            _check_file(self.path(name))
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error
        self._sound.add(name)

    def read(self, name: str, key: str, index: Any = slice(None)) -> Tensor:
        """The part `index` of a tensor of a checked file, on the CPU. Raises `StoreError`."""
        self.check(name)
        try:
            with torch.device("cpu"), safetensors.safe_open(self.path(name), framework="pt") as file:
                tensor: Tensor = file.get_slice(key)[index]
                return tensor
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> StoreError:
        return StoreError(f"cannot read {self.path(name)}: {error}. Delete this file and resume")


@contextmanager
def open_store(
    folder: str | Path | None, asked: Callable[[Identity | None], Identity], probe: Callable[[], Tensor]
) -> Iterator[Store]:
    """The store of what is `asked` in `folder`, or one for the time being if there is none.

    `asked(before)` is the identity as it is now, `probe()` the network's answers (samples, ...) to a few questions. It
    is asked in any case: what a network cannot be asked should be known before the work. Raises `StoreError`.
    """
    if folder is None:
        probe()
        with temporary_folder("olss-") as temporary:
            yield Store(temporary, kept=False)
        return
    yield _opened(Path(folder), asked, probe)


def _opened(folder: Path, asked: Callable[[Identity | None], Identity], probe: Callable[[], Tensor]) -> Store:
    Store(folder)
    known = _read_manifest(folder / MANIFEST)
    before = asked(None)
    answers = probe()
    moved = moving(before, asked(before))
    if known is None:
        store = Store(folder, _key(before.digests, moved))
        tolerance = torch.tensor([_tolerance(answers)], dtype=torch.float32, device="cpu")
        store.write("probe", {"answers": answers, "tolerance": tolerance})
        _write_manifest(folder / MANIFEST, before.digests, moved)
        return store
    store = Store(folder, _key(*known))
    _refuse_another(folder, differences(known[0], before.digests, [*known[1], *moved]))
    _check_answers(store, answers)
    return store


@contextmanager
def temporary_folder(prefix: str, within: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards. Raises `StoreError` where none can be made."""
    try:
        made = TemporaryDirectory(prefix=prefix, dir=within)
    except OSError as error:
        where = within or tempfile.tempdir or "the folder for temporary files"
        raise StoreError(
            f"cannot make a folder in {where}: {error}; free some space, or give store=, a folder on another disk"
        ) from error
    with made as name:
        yield Path(name)


def sealed(content: bytes) -> list[memoryview]:
    """`content` with its SHA-256 in the place of its first 64 zeros."""
    place, whole = content.index(BLANK), memoryview(content)
    digits = hashlib.sha256(content).hexdigest().encode()
    return [whole[:place], memoryview(digits), whole[place + len(BLANK) :]]


# --- the manifest -----------------------------------------------------------------------------------------------------


def _write_manifest(path: Path, asked: Table, moved: list[str]) -> None:
    content = {"sha256": BLANK.decode(), "format": FORMAT, "version": VERSION, "moving": moved, "asked": asked}
    write_atomically(path, sealed(json.dumps(content, indent=0).encode()), error=StoreError)


def _read_manifest(path: Path) -> tuple[Table, list[str]] | None:
    """The recorded identity and the places that moved; None if there is no manifest."""
    if not path.exists():
        return None
    data = read_bounded(path, LARGEST_MANIFEST, error=StoreError)
    try:
        found = strict_object(data)
        told = found.get("format"), found.get("version")
        if told != (FORMAT, VERSION):
            raise ValueError(f"is of format and version {quoted(told)}; expected {(FORMAT, VERSION)}")
        _check_digest([data], found.get("sha256"))
    except ValueError as error:
        raise StoreError(
            f"cannot use {path.parent} as a store: its manifest {error}. Give another folder, or delete this one"
        ) from error
    return found["asked"], found["moving"]


def _key(asked: Table, moved: list[str]) -> str:
    return digest(json.dumps([sorted(asked.items()), moved]))[:12]


def _refuse_another(folder: Path, places: list[str]) -> None:
    if places:
        shown = ", ".join(quoted(place, 80) for place in places[:3])
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        raise StoreError(
            f"{folder} holds another recording: what was asked differs in {shown}{more}. Give another folder, or "
            "delete this one"
        )


def _tolerance(answers: Tensor) -> float:
    return max(TOLERANCE, ROUNDINGS * torch.finfo(answers.dtype).eps)


def _check_answers(store: Store, answers: Tensor) -> None:
    """Each sample's answer to each question must be what it was; what is not finite counts as 0 in both."""
    before, now = (each.float().nan_to_num(0.0, 0.0, 0.0) for each in (store.read("probe", "answers"), answers.cpu()))
    limit = float(store.read("probe", "tolerance"))
    far = before.shape != now.shape or (_norms(now - before) > limit * _norms(before)).any()
    if far:
        raise StoreError(
            f"{store.folder} holds another recording: the network, or what it is conditioned on, answers otherwise "
            "than it did. Give another folder, or delete this one"
        )


def _norms(answers: Tensor) -> Tensor:
    return answers.flatten(2).square().sum(2).sqrt()


# --- checksums --------------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    """ValueError or OSError unless a safetensors file has the SHA-256 that it says."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"its header would have {size} bytes")
        header = file.read(size)
        metadata = strict_object(header).get("__metadata__")
        told = metadata.get("sha256") if isinstance(metadata, dict) else None
        _check_digest([size.to_bytes(8, "little") + header, *iter(lambda: file.read(BLOCK), b"")], told)


def _check_digest(blocks: Any, told: object) -> None:
    """ValueError unless the first of `blocks` holds the digits `told`, and all of them are what these say."""
    if not isinstance(told, str) or len(told) != len(BLANK):
        raise ValueError("has no checksum")
    found = hashlib.sha256()
    for i, block in enumerate(blocks):
        found.update(block if i else block.replace(told.encode(), BLANK, 1))
    if found.hexdigest() != told:
        raise ValueError("is not what was written: its checksum differs")
