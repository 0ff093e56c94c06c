"""The bytes of an engine file, and of an entry of the cache.

An ordinary safetensors file: 8 bytes little-endian length of the header, the header as UTF-8 JSON padded with spaces
to a multiple of 8, the data. The header's `__metadata__` has one entry, named after the format ("olss_fast.engine"):
the manifest, a JSON object as a string. Its first member is

    sha256    64 lower-case hexadecimal digits, SHA-256(SHA-256(piece 0) SHA-256(piece 1) …), the pieces being 4 MiB of
              the file each, the last one what is left, in which these digits are read as zeros. Their place is the
              first in the header where they occur.

so that any altered bit is noticed, wherever it is, at the speed of all cores. It finds accidents and is no signature:
a file that somebody meant to alter has a right sum too. Therefore everything below is checked as well, and an engine
may be loaded with the SHA-256 that the whole file ought to have, as `sha256sum` prints it.

Forbidden, each with its own message: a header above 16 MiB, of a length that is no multiple of 8, or beyond the end of
the file; a header or manifest that is no JSON object, repeats a name, nests too deeply, has too many parts, or holds
NaN; another format or version; tensors of another dtype, of a size that is not theirs, that overlap, leave gaps, or end
elsewhere than the file; another checksum. There is no compression and there are no paths: nothing can unfold to more
than the file's size, or to a place outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, BinaryIO, NoReturn

from olss_fast.errors import EngineFileError
from olss_fast.support.files import AnyPath, write_atomically
from olss_fast.support.json import strict_object
from olss_fast.support.text import quoted

VERSION = 2  # 2: what code was compiled for stands beside it
MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**40
PIECE = 4 * 2**20
MOST_AXES = 16
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Row = tuple[str, str, tuple[int, ...], int, int]  # of a tensor: name, dtype, shape, begin and end in the data

_BLANK = "0" * 64
_COPY_AGAIN = "copy the file again, or build it again"


@dataclass(frozen=True)
class Blob:
    """One tensor as it lies in a file: safetensors' name of its dtype, shape, and bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of_bytes(cls, data: bytes | memoryview) -> Blob:
        return cls("U8", (len(data),), memoryview(data))


class Refused(Exception):
    """The reason why bytes are no file of this kind; whoever knows the file's name makes an EngineFileError of it."""


def refuse(reason: str) -> NoReturn:
    raise Refused(reason)


def encode(kind: str, manifest: Mapping[str, object], blobs: Mapping[str, Blob]) -> list[memoryview]:
    """The file's content as buffers, one after the other. `manifest` is without sha256, format and version."""
    entry = {"sha256": _BLANK, "format": kind, "version": VERSION, **manifest}
    header: dict[str, object] = {"__metadata__": {kind: json.dumps(entry, allow_nan=False)}}
    end = 0
    for name, blob in blobs.items():
        begin, end = end, end + len(blob.data)
        header[name] = {"dtype": blob.dtype, "shape": list(blob.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise EngineFileError(f"the header would have {len(text)} bytes; a file's has at most {MAX_HEADER_BYTES}")
    blank = len(text).to_bytes(8, "little") + text
    data = [blob.data.cast("B") if blob.data.nbytes else memoryview(b"") for blob in blobs.values()]
    found = digest([memoryview(blank), *data])
    return [memoryview(blank.replace(_BLANK.encode(), found.encode(), 1)), *data]


def write(path: AnyPath, buffers: Sequence[memoryview]) -> None:
    """Atomically; see `write_atomically`. Raises EngineFileError."""
    write_atomically(path, buffers, error=EngineFileError)


def read(path: AnyPath, kind: str, *, sha256: str | None = None) -> tuple[dict[str, Any], dict[str, Blob]]:
    """Manifest and tensors of a file, wholly verified, before which none of its tensors is in memory.

    sha256: the SHA-256 that the file ought to have, in lower case; its checksum will do as well.

    Raises EngineFileError.
    """
    with _opened(path) as file:
        head, manifest, rows = _head(file, kind)
        blank = head.replace(manifest["sha256"].encode(), _BLANK.encode(), 1)
        _check_digest(digest(_stream(blank, file)), manifest["sha256"])
        if sha256 not in (None, manifest["sha256"]):
            _check_sha256(_sha256(_stream(head, file)).hex(), sha256)
        file.seek(len(head))
        return manifest, {name: Blob(dtype, shape, _next(file, end - begin)) for name, dtype, shape, begin, end in rows}


def read_header(path: AnyPath, kind: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The manifest, and how many bytes each tensor has. What is behind the header is neither read nor verified, but for
    its size. Raises EngineFileError."""
    with _opened(path) as file:
        _, manifest, rows = _head(file, kind)
        return manifest, {name: end - begin for name, _, _, begin, end in rows}


def file_sha256(path: AnyPath) -> str:
    """What `sha256sum` prints of a file. Raises EngineFileError."""
    with _opened(path) as file:
        return _sha256(_stream(b"", file)).hex()


@contextmanager
def _opened(path: AnyPath) -> Iterator[BinaryIO]:
    """A regular file; whatever is wrong with it is an EngineFileError with its name."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
            refuse("it is no regular file but a folder, device or pipe; give the path of a file")
        with open(path, "rb") as file:
            yield file
    except MemoryError as cause:
        raise EngineFileError(f"{quoted(str(path), 200)} does not fit into this machine's memory") from cause
    except (OSError, ValueError, TypeError, Refused) as cause:
        raise EngineFileError(f"{quoted(str(path), 200)} is no usable engine file: {cause}") from cause


def _head(file: BinaryIO, kind: str) -> tuple[bytes, dict[str, Any], list[Row]]:
    """All up to the data, the manifest and the table, each checked before what relies on it."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = _header_length(first, size)
    text = bytes(_next(file, length))
    header = _header(text)
    return first + text, _manifest(header, kind), list(_table(header, size - 8 - length))


def _stream(head: bytes, file: BinaryIO) -> Iterator[memoryview]:
    """`head`, and then what is behind it in the file, a piece at a time."""
    yield memoryview(head)
    left = os.fstat(file.fileno()).st_size - len(head)
    file.seek(len(head))
    while left > 0:
        piece = _next(file, min(left, PIECE))
        yield piece
        left -= len(piece)


def _next(file: BinaryIO, count: int) -> memoryview:
    data = file.read(count)
    if len(data) < count:
        refuse("it shrank while it was read; try again")
    return memoryview(data)


def digest(buffers: Iterable[memoryview]) -> str:
    """The checksum of the format over the content in `buffers`, in which its own digits are zeros already. No more
    pieces are held than are worked at."""
    pieces = _pieces(buffers)
    few = list(islice(pieces, 4))
    if len(few) < 4:
        return hashlib.sha256(b"".join(map(_sha256, few))).hexdigest()
    from concurrent.futures import ThreadPoolExecutor  # slow to import for who looks at a header alone

    total = hashlib.sha256()
    with ThreadPoolExecutor(workers := os.cpu_count() or 1) as pool:  # hashlib lets go of the interpreter's lock
        while few:
            for each in pool.map(_sha256, few):
                total.update(each)
            few = list(islice(pieces, workers))
    return total.hexdigest()


def _sha256(buffers: Iterable[memoryview]) -> bytes:
    total = hashlib.sha256()
    for each in buffers:
        total.update(each)
    return total.digest()


def _pieces(buffers: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The content in pieces of PIECE bytes, each a list of views."""
    piece: list[memoryview] = []
    room = PIECE
    for buffer in buffers:
        rest = buffer
        while len(rest):
            piece.append(rest[:room])
            room -= len(piece[-1])
            rest = rest[len(piece[-1]) :]
            if room == 0:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece


def _check_digest(found: str, claimed: str) -> None:
    if found != claimed:
        refuse(
            f"its content has the digest {found[:12]}… and it says {claimed[:12]}…: damaged or altered; {_COPY_AGAIN}"
        )


def _check_sha256(found: str, expected: str | None) -> None:
    if found != expected:
        refuse(f"its sha256 is {found}; expected {expected}: it is another file than you mean")


# --- the header ----------------------------------------------------------------------------------------------------


def _header_length(first: bytes, size: int) -> int:
    if len(first) < 8:
        refuse(f"it has {size} bytes; a safetensors file begins with 8 bytes of header length; {_COPY_AGAIN}")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES or length % 8:
        refuse(
            f"its first 8 bytes announce a header of {length} bytes; expected a multiple of 8 up to "
            f"{MAX_HEADER_BYTES}; is it an engine file at all?"
        )
    if 8 + length > size:
        refuse(f"it has {size} bytes, but its header should reach to byte {8 + length}: truncated; {_COPY_AGAIN}")
    return length


def _header(text: bytes) -> dict[str, Any]:
    return _json_object(text, "the safetensors header")


def _json_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        return strict_object(text)
    except ValueError as cause:
        refuse(f"{what} {cause}; {_COPY_AGAIN}")


def _manifest(header: dict[str, Any], kind: str) -> dict[str, Any]:
    """The manifest, of this format and version; what else is in it is looked at by who knows its meaning."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != {kind} or not isinstance(metadata[kind], str):
        refuse(
            f"its __metadata__ is {quoted(metadata)}; expected the single entry {kind!r}: perhaps a plan or a model "
            "and not an engine?"
        )
    manifest = _json_object(metadata[kind], f"the entry {kind!r}")
    if next(iter(manifest), None) != "sha256":
        refuse(f"its first member is {quoted(next(iter(manifest), None))}; expected sha256")
    if manifest.get("format") != kind:
        refuse(f"its format is {quoted(manifest.get('format'))}; expected {kind!r}")
    version = manifest.get("version")
    if isinstance(version, bool) or version != VERSION:
        refuse(
            f"it was written in version {quoted(version)} of the format; this release of olss_fast reads version "
            f"{VERSION}: build the engine again with this release, or use the release that built it"
        )
    claimed = manifest.get("sha256")
    if not isinstance(claimed, str) or len(claimed) != 64 or not set(claimed) <= set("0123456789abcdef"):
        refuse(f"its sha256 is {quoted(claimed)}; expected 64 hexadecimal digits")
    return manifest


# --- the tensors ---------------------------------------------------------------------------------------------------


def _table(header: dict[str, Any], size: int) -> Iterator[Row]:
    """Name, dtype, shape, begin and end of each tensor. Together they fill the `size` bytes of data."""
    last = 0
    for name, described in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _row(name, described)
        if begin != last:
            refuse(
                f"tensor {quoted(name)} begins at byte {begin} of the data; expected {last}, where the last one ends"
            )
        if end > size:
            refuse(f"tensor {quoted(name)} ends at byte {end} of {size} bytes of data: truncated; {_COPY_AGAIN}")
        yield name, dtype, shape, begin, end
        last = end
    if last != size:
        refuse(f"its tensors end at byte {last} of {size} bytes of data: something was appended")


def _row(name: str, described: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end, which fit each other."""
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        refuse(f"tensor {quoted(name)} is described by {quoted(described)}; expected dtype, shape and data_offsets")
    if re.search("[\\x00-\\x1f\\x7f-\\x9f]", name):
        refuse(f"a tensor is named {quoted(name)}; expected a name that can be printed")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(f"tensor {quoted(name)} has dtype {quoted(dtype)}; expected one of {', '.join(ITEM_BYTES)}")
    if not naturals(shape) or len(shape) > MOST_AXES or not naturals(offsets) or len(offsets) != 2:
        refuse(f"tensor {quoted(name)} has shape {quoted(shape)} and data_offsets {quoted(offsets)}; expected sizes")
    if prod(filter(None, shape)) > MAX_FILE_BYTES:  # an empty tensor's strides must be numbers too
        refuse(f"tensor {quoted(name)} has shape {quoted(shape)}; expected one that a file could hold")
    size = prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        refuse(f"tensor {quoted(name)} of {dtype} {quoted(shape)} has {size} bytes; its data_offsets are {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def naturals(value: object) -> bool:
    """A list of integers from 0 to the largest file. (In Python, JSON's `true` would pass for 1.)"""
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= MAX_FILE_BYTES for number in value)
