"""The store of a recording: a folder of containers (`support.container`), that belongs to one question.

The manifest holds the identity of what was asked (`identity`): whoever asks something else with the same folder is
refused, and told where the difference lies; whoever asks the same resumes. What an identity cannot see, the inside of
compiled code for one, the network is asked about: it must answer the manifest's probe as it did. The names of all other
files hold a key of that identity. Nothing is pickled; each file's checksum is looked at once in every process, before
anything of the file is used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import torch
from torch import Tensor

from olss_fast.errors import PlanFileError, StoreError
from olss_fast.plan.plan import Plan
from olss_fast.support import container
from olss_fast.support.container import Blob, Format
from olss_fast.support.identity import differences, digest, identity, moving
from olss_fast.support.text import quoted

MANIFEST = "manifest"
OLD_MANIFEST = "manifest.json"  # before version 3
FORMAT = Format("olss_fast.recording", 3, "part of a recording", StoreError, most_header=2**28)
DTYPES = {torch.float32: "F32", torch.float64: "F64"}
STALE = 86400.0  # seconds
TOLERANCE = 1e-3  # of a sample's norm: more than another number of threads, or another kernel with TF32, makes of it
ROUNDINGS = 4.0  # or so many roundings of the network's dtype, where that is more: kernels for half precision differ
ANOTHER = "Give another folder, or delete this one"


class Store:
    """A folder of checked files. `key` is in all their names; `kept` says whether the folder is the user's own."""

    def __init__(self, folder: Path, key: str = "", *, kept: bool = True) -> None:
        self.folder, self.key, self.kept = Path(folder), key, kept
        self._entries: dict[str, dict[str, Any]] = {}  # of sound files
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot use {self.folder} as a store: {error}") from error

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{'-' * bool(self.key)}{self.key}.safetensors"

    def of(self, part: str) -> Store:
        """What belongs to a part of the question, in the same folder."""
        return Store(self.folder, f"{self.key}{part}", kept=self.kept)

    @property
    def empty(self) -> bool:
        """True if there is no file but the manifest."""
        return not any(self.folder.glob(f"*-{self.key}*.safetensors"))

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

    def write(self, name: str, tensors: Mapping[str, Tensor], **entry: Any) -> None:
        """Write tensors, float32 or float64, and members of the entry atomically. Raises `StoreError`."""
        blobs = {
            key: Blob(DTYPES[each.dtype], tuple(each.shape), each.contiguous().cpu().numpy().data)
            for key, each in tensors.items()
        }
        try:
            container.write(self.path(name), FORMAT, entry, blobs)
        except StoreError as error:
            raise StoreError(f"{error}. {self.advice}") from error
        self._entries[name] = entry

    def entry(self, name: str) -> dict[str, Any]:
        """The entry of a file. Raises `StoreError` if the file is not as it was written."""
        if name not in self._entries:
            try:
                self._entries[name], _ = container.read(self.path(name), FORMAT)
            except StoreError as error:
                advice = ANOTHER if name == MANIFEST else "Delete this file and resume"
                raise StoreError(f"{error}. {advice}") from error
        return self._entries[name]

    def plan(self, name: str, make: Callable[[], Plan]) -> Plan:
        """The plan that an earlier run kept under this name, or what `make` returns, kept from now on. A damaged one is
        made again: that is cheaper than asking what to do."""
        file = self.path(name)
        if file.exists():
            with suppress(PlanFileError):
                return Plan.load(file)
        plan = make()
        try:
            plan.save(file)
        except PlanFileError as error:
            raise StoreError(f"{error}. {self.advice}") from error
        return plan

    def read(self, name: str, key: str, index: Any = slice(None)) -> Tensor:
        """The part `index` of a tensor of a checked file, on the CPU. Raises `StoreError`."""
        self.entry(name)
        try:
            with torch.device("cpu"), safetensors.safe_open(self.path(name), framework="pt") as file:
                tensor: Tensor = file.get_slice(key)[index]
                return tensor
        except (OSError, safetensors.SafetensorError) as error:
            raise StoreError(f"cannot read {self.path(name)}: {error}. Delete this file and resume") from error


@contextmanager
def open_store(folder: str | Path | None, question: Mapping[str, Any], probe: Callable[[], Tensor]) -> Iterator[Store]:
    """The store of a `question` in `folder`, or one for the time being if there is none.

    `probe()` are the network's answers (samples, questions, ...) to a few questions. It is asked in any case: what a
    network cannot be asked should be known before the work. Raises `StoreError`.
    """
    if folder is None:
        probe()
        with temporary_folder("olss-") as temporary:
            yield Store(temporary, kept=False)
        return
    yield _opened(Store(Path(folder)), question, probe)


def _opened(outer: Store, question: Mapping[str, Any], probe: Callable[[], Tensor]) -> Store:
    """The store of the question in the folder of `outer`, where the manifest lies."""
    if (outer.folder / OLD_MANIFEST).exists():
        raise StoreError(f"{outer.folder} holds a recording of an older olss_fast, with a {OLD_MANIFEST}. {ANOTHER}")
    kept = outer.entry(MANIFEST) if outer.has(MANIFEST) else None
    before = identity(question)
    answers = probe()
    moved = moving(before, identity(question, before))
    if kept is None:
        tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(answers.dtype).eps)
        kept = {"asked": before.digests, "moving": moved, "tolerance": tolerance}
        outer.write(MANIFEST, {"answers": answers.float()}, **kept)
    _refuse_another(outer.folder, differences(kept["asked"], before.digests, [*kept["moving"], *moved]))
    _check_answers(outer, answers.float().cpu(), kept["tolerance"])
    return Store(outer.folder, digest(json.dumps([FORMAT.version, sorted(kept["asked"].items()), kept["moving"]]))[:12])


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


def _refuse_another(folder: Path, places: list[str]) -> None:
    if places:
        shown = ", ".join(quoted(place, 80) for place in places[:3])
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        raise StoreError(f"{folder} holds another recording: what was asked differs in {shown}{more}. {ANOTHER}")


def _check_answers(store: Store, answers: Tensor, tolerance: float) -> None:
    """Each sample's answer to each question must be what it was; what is not finite counts as 0 in both."""
    before, now = (each.nan_to_num(0.0, 0.0, 0.0) for each in (store.read(MANIFEST, "answers"), answers))
    if before.shape != now.shape or (_norms(now - before) > tolerance * _norms(before)).any():
        raise StoreError(
            f"{store.folder} holds another recording: the network, or what it is conditioned on, answers otherwise "
            f"than it did. {ANOTHER}"
        )


def _norms(answers: Tensor) -> Tensor:
    return answers.flatten(2).square().sum(2).sqrt()
