"""Plan files: the format, its writer and its reader.

A plan file is an ordinary safetensors file (readable by `safetensors.numpy.load_file`): 8 bytes little-endian length
of the header, the header as JSON, the arrays.

Version 1. S >= 1 evaluations, C columns; all little-endian, in C order:

    timesteps  F64 [S]        rows    F64 [S+1, C]
    alphas     F64 [S+1]      sigmas  F64 [S+1]
    models     I64 [S]

The header's `__metadata__` has the single entry "olss_fast.plan", a JSON object with exactly these members:

    sha256    64 lower-case hexadecimal digits: the SHA-256 of the whole file in which these digits are read as zeros.
              It is the first member, and its digits are the first place in the file where they occur.
    branches  1 or 2
    format    "olss_fast.plan"
    metadata  object of strings
    version   1

So any altered bit is noticed, wherever it is. (The checksum finds accidents. It is no signature: whoever alters a
file on purpose can write a new one, which is why everything below is checked as well.)

Forbidden, each with its own message: a file above 16 MiB or a header above 1 MiB (looked at before reading them); more
than 4,096 evaluations or 16,384 columns; a header that is not UTF-8 JSON, repeats a name, nests too deeply or holds
NaN or Infinity; other, missing or additional tensors, dtypes, dimensions or members; a tensor that reaches beyond the
end of the file, bytes that belong to no tensor; a version other than 1; whatever `Plan` forbids (a value that is not
finite, a causality violation, shapes that do not fit each other). Nothing is ever unpickled or evaluated.

The same plan always gives the same bytes. Readers must refuse a version they do not know: any change of meaning gets
a new number.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import NoReturn

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from olss_fast.errors import PlanError, PlanFileError
from olss_fast.plan.plan import Plan
from olss_fast.support.files import read_bounded, write_atomically
from olss_fast.support.json import strict_object
from olss_fast.support.text import quoted

FORMAT = "olss_fast.plan"
VERSION = 1
MAX_FILE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_STEPS = 4096
MAX_COLUMNS = 16384

_DTYPES = {"timesteps": "F64", "rows": "F64", "alphas": "F64", "sigmas": "F64", "models": "I64"}
_DIMENSIONS = {"timesteps": 1, "rows": 2, "alphas": 1, "sigmas": 1, "models": 1}
_MEMBERS = {"sha256", "branches", "format", "metadata", "version"}
_NO_DIGEST = b"0" * 64
_COPY_AGAIN = "copy or save the file again"


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write `plan` to `path`, atomically. Raises PlanFileError (full disk, missing folder, plan beyond the bounds)."""
    write_atomically(path, plan_to_bytes(plan), error=PlanFileError)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a plan file. Raises PlanFileError naming the file, what was found and what was expected."""
    data = read_bounded(path, MAX_FILE_BYTES, error=PlanFileError)
    return plan_from_bytes(data, source=str(path))


def plan_to_bytes(plan: Plan) -> bytes:
    """The content of a plan file. Raises PlanFileError for a plan beyond the bounds of the format."""
    entry = {"branches": plan.branches, "format": FORMAT, "metadata": dict(plan.metadata), "version": VERSION}
    # sha256 comes first, so that the first 64 zeros of the file are its place, whatever the metadata say.
    text = json.dumps({"sha256": _NO_DIGEST.decode()} | entry, separators=(",", ":"))
    arrays = {name: np.array(getattr(plan, name)) for name in _DTYPES}
    blank = safetensors.numpy.save(arrays, metadata={FORMAT: text})
    _check_bounds(blank, plan.nfe, plan.columns)
    return blank.replace(_NO_DIGEST, hashlib.sha256(blank).hexdigest().encode(), 1)


def plan_from_bytes(data: bytes, *, source: str = "plan data") -> Plan:
    """The plan in the content of a plan file. Raises PlanFileError; messages begin with `source`."""
    try:
        return _decoded(data)
    except (_Refused, PlanError) as cause:
        raise PlanFileError(f"{quoted(source, 200)} is no usable plan file: {cause}") from cause


class _Refused(Exception):
    """The reason why bytes are not a plan; `plan_from_bytes` adds the source and makes it a PlanFileError."""


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


def _decoded(data: bytes) -> Plan:
    """Every check before what relies on it: sizes, header, version, tensor table, checksum, then the arrays."""
    if len(data) > MAX_FILE_BYTES:
        _refuse(f"it has {len(data)} bytes; expected at most {MAX_FILE_BYTES}")
    header_bytes = _header_bytes(data)
    header = _json_object(header_bytes, "the safetensors header")
    entry = _entry(header)
    _check_table(header, len(data) - 8 - len(header_bytes))
    _check_digest(data, entry["sha256"])
    try:
        arrays = safetensors.numpy.load(data)
    except SafetensorError as cause:
        _refuse(f"the safetensors library says {quoted(str(cause))}; {_COPY_AGAIN}")
    return _plan(arrays, entry)


def _plan(arrays: dict[str, NDArray[np.float64]], entry: dict[str, object]) -> Plan:
    branches, metadata = entry["branches"], entry["metadata"]
    if not isinstance(branches, int):
        _refuse(f"branches is {quoted(branches)}; expected 1 or 2")
    if not isinstance(metadata, dict):
        _refuse(f"metadata is {quoted(metadata)}; expected an object of strings")
    return Plan(**arrays, branches=branches, metadata=metadata)


# --- the header ----------------------------------------------------------------------------------------------------


def _header_bytes(data: bytes) -> bytes:
    if len(data) < 8:
        _refuse(f"it has {len(data)} bytes; a safetensors file begins with 8 bytes of header length; {_COPY_AGAIN}")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(
            f"its first 8 bytes announce a header of {length} bytes; expected at most {MAX_HEADER_BYTES}; "
            "is it a safetensors file at all?"
        )
    if 8 + length > len(data):
        _refuse(f"it has {len(data)} bytes, but its header should reach to byte {8 + length}: truncated; {_COPY_AGAIN}")
    return data[8 : 8 + length]


def _json_object(text: str | bytes, what: str) -> dict[str, object]:
    try:
        return strict_object(text)
    except ValueError as cause:
        _refuse(f"{what} {cause}; {_COPY_AGAIN}")


def _entry(header: dict[str, object]) -> dict[str, object]:
    """The plan's own JSON entry, of this format and version, with exactly the members it should have."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != {FORMAT} or not isinstance(metadata[FORMAT], str):
        tensors = sorted(name for name in header if name != "__metadata__")
        _refuse(
            f"its __metadata__ is {quoted(metadata)}; expected the single entry {FORMAT!r}. It holds the tensors "
            f"{quoted(tensors)}: perhaps a model and not a plan?"
        )
    entry = _json_object(metadata[FORMAT], f"the entry {FORMAT!r}")
    if entry.get("format") != FORMAT:
        _refuse(f"its format is {quoted(entry.get('format'))}; expected {FORMAT!r}")
    _check_version(entry.get("version"))
    if set(entry) != _MEMBERS:
        _refuse(f"the entry {FORMAT!r} has the members {quoted(sorted(entry), 200)}; expected {sorted(_MEMBERS)}")
    return entry


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        _refuse(f"its version is {quoted(version)}; expected a positive integer")
    if version > VERSION:
        _refuse(
            f"it was written in version {quoted(version)} of the format, by a newer olss_fast; this release reads "
            f"version {VERSION}; upgrade olss_fast, or save the plan again with this release"
        )


# --- the tensors ---------------------------------------------------------------------------------------------------


def _check_table(header: dict[str, object], data_bytes: int) -> None:
    table = {name: value for name, value in header.items() if name != "__metadata__"}
    if set(table) != set(_DTYPES):
        _refuse(f"it holds the tensors {quoted(sorted(table), 200)}; expected {sorted(_DTYPES)}")
    ends = [_check_tensor(name, table[name]) for name in _DTYPES]
    if max(ends) != data_bytes:
        fault = f"truncated; {_COPY_AGAIN}" if max(ends) > data_bytes else "something was appended"
        _refuse(f"its tensors need {max(ends)} bytes after the header and it has {data_bytes}: {fault}")


def _check_tensor(name: str, described: object) -> int:
    """Where the tensor ends, after its dtype and dimensions were found to be as the format says."""
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"tensor {name!r} is described by {quoted(described)}; expected dtype, shape and data_offsets")
    shape, offsets = _naturals(described["shape"]), _naturals(described["data_offsets"])
    if described["dtype"] != _DTYPES[name] or shape is None or len(shape) != _DIMENSIONS[name]:
        _refuse(
            f"tensor {name!r} has dtype {quoted(described['dtype'])} and shape {quoted(described['shape'])}; "
            f"expected {_DTYPES[name]} in {_DIMENSIONS[name]} dimension(s)"
        )
    if name == "rows" and (shape[0] > MAX_STEPS + 1 or shape[1] > MAX_COLUMNS):
        _refuse(f"rows has shape {quoted(shape)}; expected at most {(MAX_STEPS + 1, MAX_COLUMNS)}")
    if offsets is None or len(offsets) != 2:
        _refuse(f"tensor {name!r} has data_offsets {quoted(described['data_offsets'])}; expected [begin, end]")
    return offsets[1]


def _naturals(value: object) -> list[int] | None:
    """A list of integers >= 0, or None. (In Python, JSON's `true` would pass for 1.)"""
    if not isinstance(value, list):
        return None
    fits = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in value)
    return value if fits else None


def _check_digest(data: bytes, claimed: object) -> None:
    if not isinstance(claimed, str) or len(claimed) != 64 or not claimed.isascii():
        _refuse(f"its sha256 is {quoted(claimed)}; expected 64 hexadecimal digits")
    found = hashlib.sha256(data.replace(claimed.encode(), _NO_DIGEST, 1)).hexdigest()
    if found != claimed:
        _refuse(
            f"its content has the SHA-256 {found[:12]}… and it says {quoted(claimed[:12])}…: damaged or altered; "
            f"{_COPY_AGAIN}"
        )


def _check_bounds(data: bytes, steps: int, columns: int) -> None:
    """What the reader would refuse, the writer does not write."""
    measured = (
        ("evaluations", steps, MAX_STEPS),
        ("columns", columns, MAX_COLUMNS),
        ("bytes of header and metadata", int.from_bytes(data[:8], "little"), MAX_HEADER_BYTES),
        ("bytes", len(data), MAX_FILE_BYTES),
    )
    for unit, number, limit in measured:
        if number > limit:
            raise PlanFileError(f"the plan has {number} {unit}; a plan file holds at most {limit}; make it smaller")
