"""Plan files: a Plan in a container (`support.container`). Any safetensors library reads the arrays.

Version 1. S >= 1 evaluations, C columns; all little-endian, in C order, and in this order:

    models     I64 [S]
    alphas     F64 [S+1]      rows       F64 [S+1, C]
    sigmas     F64 [S+1]      timesteps  F64 [S]

The entry "olss_fast.plan" has exactly the members common to all files, and

    branches  1 or 2
    metadata  object of strings

Also forbidden, besides what the container forbids, each with its own message: a file above 16 MiB or a header above
1 MiB (checked before reading); more than 4,096 evaluations or 16,384 columns; other, missing or additional tensors,
dtypes, dimensions or members; whatever `Plan` forbids (non-finite values, causality violations, inconsistent shapes).
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np

from olss_fast.errors import PlanError, PlanFileError
from olss_fast.plan.plan import Plan
from olss_fast.support import container
from olss_fast.support.container import Blob, Format, refuse
from olss_fast.support.files import write_atomically
from olss_fast.support.text import quoted

FORMAT = Format("olss_fast.plan", 1, "plan file", PlanFileError, most_header=2**20, most_bytes=16 * 2**20)
MAX_STEPS = 4096
MAX_COLUMNS = 16384

# In the order of the file: dtype and number of dimensions.
_REALS = ("F64", 1)
_TENSORS = {"models": ("I64", 1), "alphas": _REALS, "rows": ("F64", 2), "sigmas": _REALS, "timesteps": _REALS}
_NUMPY = {"I64": "<i8", "F64": "<f8"}
_MEMBERS = {"sha256", "branches", "format", "metadata", "version"}


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write `plan` to `path`, atomically. Raises PlanFileError (full disk, missing folder, plan beyond the bounds)."""
    write_atomically(path, plan_to_bytes(plan), error=PlanFileError)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a plan file. Raises PlanFileError naming the file, what was found and what was expected."""
    with container.naming(path, FORMAT):
        return _plan(*container.read(path, FORMAT))


def plan_to_bytes(plan: Plan) -> bytes:
    """The content of a plan file. Raises PlanFileError for a plan beyond the bounds of the format."""
    for number, most, what in ((plan.nfe, MAX_STEPS, "evaluations"), (plan.columns, MAX_COLUMNS, "columns")):
        if number > most:
            raise PlanFileError(f"it would have {number} {what}; a plan file holds at most {most}; make it smaller")
    blobs = {name: _blob(getattr(plan, name), dtype) for name, (dtype, _) in _TENSORS.items()}
    entry = {"branches": plan.branches, "metadata": dict(plan.metadata)}
    return b"".join(container.encode(FORMAT, entry, blobs))


def plan_from_bytes(data: bytes, *, source: str = "plan data") -> Plan:
    """The plan in the content of a plan file. Raises PlanFileError; messages begin with `source`."""
    with container.naming(source, FORMAT):
        return _plan(*container.read_from(io.BytesIO(data), FORMAT))


def _blob(values: Any, dtype: str) -> Blob:
    array = np.asarray(values, _NUMPY[dtype])
    return Blob(dtype, array.shape, memoryview(array.tobytes()))


def _plan(entry: dict[str, Any], blobs: dict[str, Blob]) -> Plan:
    if set(entry) != _MEMBERS:
        refuse(f"its entry has the members {quoted(sorted(entry), 200)}; expected {sorted(_MEMBERS)}")
    if type(entry["branches"]) is not int:
        refuse(f"branches is {quoted(entry['branches'])}; expected 1 or 2")
    if not isinstance(entry["metadata"], dict):
        refuse(f"metadata is {quoted(entry['metadata'])}; expected an object of strings")
    if set(blobs) != set(_TENSORS):
        refuse(f"it holds the tensors {quoted(sorted(blobs), 200)}; expected {sorted(_TENSORS)}")
    arrays = {name: _array(name, blobs[name]) for name in _TENSORS}
    try:
        return Plan(**arrays, branches=entry["branches"], metadata=entry["metadata"])
    except PlanError as cause:
        refuse(str(cause))


def _array(name: str, blob: Blob) -> Any:
    dtype, dimensions = _TENSORS[name]
    if blob.dtype != dtype or len(blob.shape) != dimensions:
        refuse(
            f"tensor {name!r} has dtype {blob.dtype!r} and shape {list(blob.shape)}; expected {dtype} in {dimensions} "
            "dimension(s)"
        )
    if name == "rows" and (blob.shape[0] > MAX_STEPS + 1 or blob.shape[1] > MAX_COLUMNS):
        refuse(f"rows has shape {list(blob.shape)}; expected at most {(MAX_STEPS + 1, MAX_COLUMNS)}")
    return np.frombuffer(blob.data, _NUMPY[dtype]).reshape(blob.shape)
