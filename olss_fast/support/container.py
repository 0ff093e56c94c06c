"""The container of plan files, engine files and compiled code: a JSON entry, tensors, and a checksum of everything.

An ordinary safetensors file: 8 bytes little-endian length of the header, the header as UTF-8 JSON padded with spaces
to a multiple of 8, the data. The header's `__metadata__` has one entry, named after the format ("olss_fast.plan"): a
JSON object as a string. Beside the format's own members it has

    sha256    the first member: 64 lower-case hexadecimal digits, the SHA-256 of the file with these digits read as
              zeros; their position is where they first occur in the header. For a file beyond 16 MiB it is the
              SHA-256 of the SHA-256s of its 16 MiB pieces (the last may be shorter), computed on all cores.
    format    the entry's name
    version   a positive integer

The checksum detects any altered bit. It finds accidents and is not a signature: whoever alters a file on purpose can
recompute it. Therefore everything below is checked as well.

Forbidden, each with its own message: a file or header above the format's bounds; a header length that is not a multiple
of 8, or beyond the end of the file; a header or entry that is not a JSON object, repeats a name, nests too deeply, has
too many parts, or holds NaN; another format or version; tensors of another dtype, of the wrong size, that overlap,
leave gaps, or do not end with the file; another checksum. There is no compression and there are no paths: nothing can
expand beyond the file's size or write elsewhere. Nothing is ever unpickled or evaluated.

The same content always gives the same bytes. Readers refuse unknown versions: any change of meaning gets a new number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any, BinaryIO, NoReturn

from olss_fast.errors import OlssError
from olss_fast.support.files import AnyPath, opened, write_atomically
from olss_fast.support.json import strict_object
from olss_fast.support.text import quoted

MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**40
PIECE = 16 * 2**20
BLOCK = 2**20  # bytes per read
MOST_AXES = 16
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Row = tuple[str, str, tuple[int, ...], int, int]  # of a tensor: name, dtype, shape, begin and end in the data
Content = Callable[[int, int], Iterable[memoryview]]  # the bytes from begin to end

_BLANK = "0" * 64
_COPY_AGAIN = "copy the file again, or make it again"


@dataclass(frozen=True)
class Format:
    """One kind of file: the name of its entry, the version read and written, its name in messages, its error class, and
    the limits on its bytes."""

    name: str
    version: int
    title: str
    error: type[OlssError]
    most_header: int = MAX_HEADER_BYTES
    most_bytes: int = MAX_FILE_BYTES


@dataclass(frozen=True)
class Blob:
    """One tensor of a file: safetensors' name of its dtype, shape, and bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of_bytes(cls, data: bytes | memoryview) -> Blob:
        """Raw bytes as a U8 tensor."""
        return cls("U8", (len(data),), memoryview(data))


class Refused(Exception):
    """Why bytes are not a file of this kind; `naming` turns it into the format's error."""


def refuse(reason: str) -> NoReturn:
    """Raise `Refused`, as an expression."""
    raise Refused(reason)


@contextmanager
def naming(source: object, format: Format) -> Iterator[None]:
    """Turns `Refused` and MemoryError into the format's error, naming the file."""
    try:
        yield
    except MemoryError as cause:
        raise format.error(f"{quoted(str(source), 200)} does not fit into this machine's memory") from cause
    except Refused as cause:
        raise format.error(f"{quoted(str(source), 200)} is no usable {format.title}: {cause}") from cause


def encode(format: Format, entry: Mapping[str, object], blobs: Mapping[str, Blob]) -> list[memoryview]:
    """The file's content as consecutive buffers. Raises the format's error for content
    beyond its bounds."""
    members = sorted({**entry, "format": format.name, "version": format.version}.items())
    text = _json({"sha256": _BLANK, **dict(members)})
    header: dict[str, object] = {"__metadata__": {format.name: text}}
    end = 0
    for name, blob in blobs.items():
        begin, end = end, end + blob.data.nbytes
        header[name] = {"dtype": blob.dtype, "shape": list(blob.shape), "data_offsets": [begin, end]}
    text = _json(header)
    text += " " * (-len(text) % 8)
    _check_bounds(format, len(text), 8 + len(text) + end)
    blank = len(text).to_bytes(8, "little") + text.encode()
    data = [blob.data.cast("B") if blob.data.nbytes else memoryview(b"") for blob in blobs.values()]
    found = digest(8 + len(text) + end, _in_buffers([memoryview(blank), *data]))
    return [memoryview(blank.replace(_BLANK.encode(), found.encode(), 1)), *data]


def write(path: AnyPath, format: Format, entry: Mapping[str, object], blobs: Mapping[str, Blob]) -> None:
    """Atomically; see `write_atomically`. Raises the format's error."""
    write_atomically(path, encode(format, entry, blobs), error=format.error)


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _check_bounds(format: Format, header: int, whole: int) -> None:
    sizes = ((header, format.most_header, "bytes of header and metadata"), (whole, format.most_bytes, "bytes"))
    for size, most, what in sizes:
        if size > most:
            raise format.error(f"it would have {size} {what}; a {format.title} holds at most {most}; make it smaller")


def read(path: AnyPath, format: Format, *, sha256: str | None = None) -> tuple[dict[str, Any], dict[str, Blob]]:
    """Entry and tensors of a file, which is verified in full before any tensor is loaded.

    sha256: the expected SHA-256 of the file, in lower case, or its checksum.

    Raises the format's error.
    """
    with naming(path, format), opened(path, error=format.error) as file:
        return read_from(file, format, sha256=sha256)


def read_from(file: BinaryIO, format: Format, *, sha256: str | None = None) -> tuple[dict[str, Any], dict[str, Blob]]:
    """The same of an open file. Raises `Refused`."""
    head, entry, rows = _head(file, format)
    size, claimed = _size(file), entry["sha256"]
    blank = head.replace(claimed.encode(), _BLANK.encode(), 1)
    if (found := digest(size, _in_file(blank, file))) != claimed:
        refuse(
            f"its content has the SHA-256 {found[:12]}… and it says {claimed[:12]}…: damaged or altered; {_COPY_AGAIN}"
        )
    if sha256 not in (None, claimed) and (found := _sha256(_in_file(head, file)(0, size)).hex()) != sha256:
        refuse(f"its sha256 is {found}; expected {sha256}: it is another file than you mean")
    file.seek(len(head))
    return entry, {name: Blob(dtype, shape, _next(file, end - begin)) for name, dtype, shape, begin, end in rows}


def read_header(path: AnyPath, format: Format) -> tuple[dict[str, Any], dict[str, int]]:
    """The entry, and the number of bytes of each tensor. Of the data only the size is checked. Raises the format's
    error."""
    with naming(path, format), opened(path, error=format.error) as file:
        _, entry, rows = _head(file, format)
        return entry, {name: end - begin for name, _, _, begin, end in rows}


def file_sha256(path: AnyPath, format: Format) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it. Raises the format's error."""
    with naming(path, format), opened(path, error=format.error) as file:
        return _sha256(_in_file(b"", file)(0, _size(file))).hex()


def _head(file: BinaryIO, format: Format) -> tuple[bytes, dict[str, Any], list[Row]]:
    """The bytes before the data, the entry and the table, each checked before it is used."""
    size = _size(file)
    file.seek(0)
    first = file.read(8)
    length = _header_length(first, size, format)
    text = bytes(_next(file, length))
    header = _json_object(text, "the safetensors header")
    return first + text, _entry(header, format), list(_table(header, size - 8 - length))


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _next(file: BinaryIO, count: int) -> memoryview:
    data = file.read(count)
    if len(data) < count:
        refuse("it shrank while it was read; try again")
    return memoryview(data)


def digest(size: int, content: Content) -> str:
    """The checksum of `content`, whose own digits are already zeros."""
    begins = range(0, size, PIECE)
    if len(begins) == 1:
        return _sha256(content(0, size)).hex()
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and not needed for small files

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashlib releases the interpreter lock
        sums = pool.map(lambda begin: _sha256(content(begin, min(begin + PIECE, size))), begins)
        return hashlib.sha256(b"".join(sums)).hexdigest()


def _sha256(blocks: Iterable[memoryview]) -> bytes:
    total = hashlib.sha256()
    for each in blocks:
        total.update(each)
    return total.digest()


def _in_buffers(buffers: Sequence[memoryview]) -> Content:
    def content(begin: int, end: int) -> Iterator[memoryview]:
        for buffer in buffers:
            yield buffer[max(begin, 0) : max(end, 0)]
            begin, end = begin - len(buffer), end - len(buffer)

    return content


def _in_file(head: bytes, file: BinaryIO) -> Content:
    """The file's content with its beginning replaced by `head`. Thread-safe."""
    lock = Lock()

    def content(begin: int, end: int) -> Iterator[memoryview]:
        yield memoryview(head)[begin:end]
        for at in range(max(begin, len(head)), end, BLOCK):
            with lock:
                file.seek(at)
                block = _next(file, min(BLOCK, end - at))
            yield block

    return content


# --- the header ----------------------------------------------------------------------------------------------------


def _header_length(first: bytes, size: int, format: Format) -> int:
    if size > format.most_bytes:
        refuse(f"it has {size} bytes; expected at most {format.most_bytes}")
    if len(first) < 8:
        refuse(f"it has {size} bytes; a safetensors file begins with 8 bytes of header length; {_COPY_AGAIN}")
    length = int.from_bytes(first, "little")
    if length > format.most_header or length % 8:
        refuse(
            f"its first 8 bytes, {first!r}, announce a header of {length} bytes; expected a multiple of 8 up to "
            f"{format.most_header}; is it a safetensors file at all?"
        )
    if 8 + length > size:
        refuse(f"it has {size} bytes, but its header should reach to byte {8 + length}: truncated; {_COPY_AGAIN}")
    return length


def _json_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        return strict_object(text)
    except ValueError as cause:
        refuse(f"{what} {cause}; {_COPY_AGAIN}")


def _entry(header: dict[str, Any], format: Format) -> dict[str, Any]:
    """The entry, of this format and version; the caller checks its other members."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != {format.name} or not isinstance(metadata[format.name], str):
        refuse(
            f"its __metadata__ is {quoted(metadata)}; expected the single entry {format.name!r}. It holds the tensors "
            f"{quoted(sorted(set(header) - {'__metadata__'}))}: perhaps a model, and no {format.title}?"
        )
    entry = _json_object(metadata[format.name], f"the entry {format.name!r}")
    if entry.get("format") != format.name:
        refuse(f"its format is {quoted(entry.get('format'))}; expected {format.name!r}")
    _check_version(entry.get("version"), format)
    if next(iter(entry)) != "sha256":
        refuse(f"its first member is {quoted(next(iter(entry)))}; expected sha256")
    claimed = entry["sha256"]
    if not isinstance(claimed, str) or not re.fullmatch("[0-9a-f]{64}", claimed):
        refuse(f"its sha256 is {quoted(claimed)}; expected 64 lower-case hexadecimal digits")
    return entry


def _check_version(version: object, format: Format) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        refuse(f"its version is {quoted(version)}; expected a positive integer")
    if version != format.version:
        other, use = ("a newer", "upgrade olss_fast to") if version > format.version else ("an older", "use")
        refuse(
            f"it was written in version {quoted(version)} of the format, by {other} olss_fast; this release reads "
            f"version {format.version}: make the file again with this release, or {use} the release that made it"
        )


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
    """dtype, shape, begin and end of a tensor, consistent with each other."""
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        refuse(f"tensor {quoted(name)} is described by {quoted(described)}; expected dtype, shape and data_offsets")
    if re.search("[\\x00-\\x1f\\x7f-\\x9f]", name):
        refuse(f"a tensor is named {quoted(name)}; expected a name that can be printed")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(f"tensor {quoted(name)} has dtype {quoted(dtype)}; expected one of {', '.join(ITEM_BYTES)}")
    if not naturals(shape) or len(shape) > MOST_AXES or not naturals(offsets) or len(offsets) != 2:
        refuse(
            f"tensor {quoted(name)} has shape {quoted(shape)} and data_offsets {quoted(offsets)}; expected sizes "
            "and [begin, end]"
        )
    if prod(filter(None, shape)) > MAX_FILE_BYTES:  # an empty tensor's strides must be numbers too
        refuse(f"tensor {quoted(name)} has shape {quoted(shape)}; expected one that a file could hold")
    size = prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        refuse(f"tensor {quoted(name)} of {dtype} {quoted(shape)} has {size} bytes; its data_offsets are {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def naturals(value: object) -> bool:
    """A list of integers from 0 to the largest file. (In Python, JSON's `true` would pass for 1.)"""
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= MAX_FILE_BYTES for number in value)
