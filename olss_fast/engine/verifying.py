"""The checks of an engine file before any of its code is run.

The C++ runtime (csrc/runtime/engine/engine_file.cpp) has the same rules; both are tested by the cases of
tests/helpers/engine_files/engine_mutants.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from olss_fast.engine import inputs, manifest
from olss_fast.engine.compiled import LIBRARY, hash_code
from olss_fast.engine.manifest import FORMAT, Manifest
from olss_fast.engine.weights import LAYOUT, check_compiled_for, check_layout, from_blob, hash_weights
from olss_fast.errors import InputError, PlanFileError
from olss_fast.plan.file import plan_from_bytes
from olss_fast.plan.plan import Plan
from olss_fast.support import container
from olss_fast.support.container import Blob, refuse
from olss_fast.support.files import AnyPath
from olss_fast.support.text import quoted

FOLDERS = ("code", "plans", "unconditional", "weights")


class Contents(NamedTuple):
    """What a file holds, all checked. Tensors are on the CPU."""

    manifest: Manifest
    plans: dict[str, Plan]
    code: dict[str, bytes]
    weights: dict[str, Tensor]
    unconditional: dict[str, Tensor]


def verified(path: AnyPath, sha256: str | None = None) -> Contents:
    """The content of a file that passes all checks, for any machine. No code is run. Raises as `load_engine`."""
    with container.naming(path, FORMAT):
        facts, blobs = container.read(path, FORMAT, sha256=None if sha256 is None else _digits(sha256))
        found = manifest.parse(facts)
        code, plans, unconditional, weights = _by_folder(blobs)
        _check_code(code)
        files = {name: bytes(blob.data) for name, blob in code.items()}
        _check_hash(found, "weights", hash_weights(weights))
        _check_hash(found, "code", hash_code(files))
        _check_compiled_for(found, files, weights)
        strides = found.facts["strides"]
        return Contents(
            found,
            _plans(found, plans),
            files,
            {name: from_blob(name, blob, strides.get(name)) for name, blob in weights.items()},
            _unconditional(found, {name: from_blob(name, blob) for name, blob in unconditional.items()}),
        )


def _digits(sha256: object) -> str:
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f"sha256 is {quoted(sha256, 80)}; expected 64 hexadecimal digits, as sha256sum prints them")
    return sha256.lower()


def plan_facts(name: str, plan: Plan, data: bytes | memoryview) -> dict[str, Any]:
    """The manifest's entry for a plan, whose file has the content `data`."""
    digest = hashlib.sha256(data).hexdigest()
    return {"name": name, "nfe": plan.nfe, "branches": plan.branches, "noises": plan.noises, "sha256": digest}


def _by_folder(blobs: Mapping[str, Blob]) -> list[dict[str, Blob]]:
    """The tensors of each of the FOLDERS, by name. Raises `Refused` for a tensor outside these."""
    parts: dict[str, dict[str, Blob]] = {folder: {} for folder in FOLDERS}
    for full, blob in blobs.items():
        folder, _, name = full.partition("/")
        if folder not in parts or not name:
            refuse(f"it holds the tensor {quoted(full)}; expected one of {', '.join(f'{each}/…' for each in parts)}")
        parts[folder][name] = blob
    return [*parts.values()]


def _check_hash(found: Manifest, what: str, value: str) -> None:
    claimed = found.facts["hashes"][what]
    if value != claimed:
        refuse(f"the hash of its {what} is {value[:12]}… and it says {quoted(claimed, 16)}: altered; build it again")


def _plans(found: Manifest, blobs: dict[str, Blob]) -> dict[str, Plan]:
    if set(blobs) != set(found.plan_names):
        refuse(f"it holds the plans {quoted(sorted(blobs), 200)} and names {quoted(found.plan_names, 200)}")
    if not all(map(_is_bytes, blobs.values())):
        refuse("its plans are not bytes; build it again")
    try:
        plans = {name: plan_from_bytes(bytes(blobs[name].data), source=f"plan {name}") for name in found.plan_names}
    except PlanFileError as cause:
        refuse(str(cause))
    for claimed, (name, plan) in zip(found.facts["plans"], plans.items(), strict=True):
        facts = plan_facts(name, plan, blobs[name].data)
        if facts != claimed:
            refuse(f"its manifest says of a plan {quoted(claimed, 200)}; the plan is {quoted(facts, 200)}")
        if int(plan.models.max()) > 0 or (plan.branches == 2 and not found.doubled):
            refuse(f"plan {quoted(name)} needs more than one network, or guidance, which this engine does not have")
    return plans


def _check_code(blobs: Mapping[str, Blob]) -> None:
    foreign = [name for name, blob in blobs.items() if not manifest.CODE_FILE.fullmatch(name) or not _is_bytes(blob)]
    if not {LIBRARY, LAYOUT} <= set(blobs) or foreign:
        refuse(
            f"its code is {quoted(sorted(blobs), 200)}; expected {LIBRARY}, {LAYOUT} and plain names beside them, "
            "all of them bytes: build it again"
        )


def _is_bytes(blob: Blob) -> bool:
    return blob.dtype == "U8" and len(blob.shape) == 1


def _check_compiled_for(found: Manifest, code: Mapping[str, bytes], weights: Mapping[str, Blob]) -> None:
    """Checks that device, inputs and weights, with dtypes, shapes and memory order, match the code."""
    strides = found.facts["strides"]
    if not set(strides) <= set(weights):
        refuse(f"it has strides of {quoted(sorted(strides), 200)}; expected names of its weights")
    layout = {
        name: {"dtype": blob.dtype, "shape": list(blob.shape), "strides": strides.get(name)}
        for name, blob in weights.items()
    }
    check_compiled_for(check_layout(code[LAYOUT], layout), manifest.compiled_for(found.facts))


def _unconditional(found: Manifest, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The default unconditional arguments. Raises `Refused` unless they match the manifest's inputs."""
    if not found.doubled and given:
        refuse(f"it has unconditional arguments {quoted(sorted(given))} but no guidance")
    by_name = {each.name: each for each in found.inputs}
    for name, value in given.items():
        if name not in by_name:
            refuse(f"its unconditional argument {quoted(name)} is none of its inputs {quoted(sorted(by_name))}")
        try:
            inputs.tensors_of([by_name[name]], {name: value}, 1, value.device, "unconditional")
        except InputError as cause:
            refuse(str(cause))
    return given
