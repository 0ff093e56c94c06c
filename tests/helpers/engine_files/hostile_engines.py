"""Engine files to be damaged, and what must become of them: an EngineFileError or a MachineError before code is mapped.

Most files here are a real engine whose library was replaced by a short text, so that many can be tried. `signed` gives
an altered file a right digest, as somebody would who means harm: without it, the digest would refuse nearly all, and
the checks behind it would go untested.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_bytes import BLANK, EngineBytes
from engines import engine_file
from torch import Tensor

import olss_fast
from olss_fast.engine import engine as engine_module
from olss_fast.engine.describe import inspected
from olss_fast.errors import EngineFileError, MachineError

LIBRARY = b"\x7fELF: no program at all, and nothing that may be run"
REFUSED = (EngineFileError, MachineError)


class Mapped(BaseException):
    """Code would have been mapped into this process. No `except` of the package's own stops it."""


@contextmanager
def nothing_mapped(folder: Path) -> Iterator[Path]:
    """The path of a file, in a folder that is all the place for files that there is, and in which nothing else may be
    written. Whoever would map code gets as far as `Mapped`."""

    def mapped(code: Mapping[str, bytes], weights: Mapping[str, Tensor], device: torch.device) -> None:
        raise Mapped(dict(code), dict(weights))

    whole()  # is built by the code that is replaced here
    path = folder / "hostile.olss"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "LoadedCode", mapped)
        patch.setattr(torch._C._aoti, "AOTIModelPackageLoader", mapped)
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.chdir(folder)
        yield path
    assert os.listdir(folder) == [path.name]


@functools.cache
def whole() -> EngineBytes:
    """A real engine, taken apart."""
    data = engine_file("guided").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["olss_fast.engine"]) | {"sha256": BLANK}
    tensors = {}
    for name, row in header.items():
        begin, end = (8 + length + offset for offset in row["data_offsets"])
        tensors[name] = (row["dtype"], row["shape"], data[begin:end])
    return EngineBytes(manifest, tensors)


def light() -> EngineBytes:
    """The same with another library, to be altered."""
    parts = copy.deepcopy(_light())
    assert isinstance(parts.manifest, dict)
    return parts


@functools.cache
def _light() -> EngineBytes:
    parts = EngineBytes(copy.deepcopy(whole().manifest), dict(whole().tensors))
    parts.tensors["code/network.so"] = ("U8", [len(LIBRARY)], LIBRARY)
    return parts.hashed()


def outcome(path: Path, data: bytes) -> str:
    """What became of a file: "refused", or "sound" if only its code was left to be mapped; nothing else may be."""
    path.write_bytes(data)
    try:
        assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f]*", inspected(path))  # nothing that would drive a terminal
    except EngineFileError as error:
        assert_names_it(error)
    try:
        olss_fast.load_engine(path)
    except REFUSED as error:
        assert_names_it(error)
        return "refused"
    except Mapped as reached:
        code, weights = reached.args
        held = light().tensors if len(data) < 10**5 else whole().tensors
        assert code == {name: held[f"code/{name}"][2] for name in ("network.so", "weights.json")}
        assert {f"weights/{name}" for name in weights} == {name for name in held if name.startswith("weights/")}
        assert all(each.contiguous().numpy().tobytes() == held[f"weights/{name}"][2] for name, each in weights.items())
        return "sound"
    raise AssertionError("an engine was loaded")


def assert_names_it(error: Exception) -> None:
    assert len(str(error)) < 2000
    assert str(error).isprintable()
    assert "hostile.olss" in str(error) or isinstance(error, MachineError)


def refuses(hostile: Path, data: bytes, message: str, error: type[Exception] = EngineFileError) -> None:
    assert outcome(hostile, data) == "refused"
    with pytest.raises(error, match=message):
        olss_fast.load_engine(hostile)


def flipped(data: bytes, random_: random.Random, begin: int, end: int) -> bytes:
    place = random_.randrange(begin, end)
    return data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]
