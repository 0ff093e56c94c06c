"""Engine files with one fault each, most of them under right checksums: name -> (what C++ says of it, the file).

No reader takes any of them. tests/hostile has the C++ reader say why, and compares both.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import safetensors.numpy
from engine_bytes import BLANK, LAYOUT, MANIFEST, PLAN, PLAN_BYTES, EngineBytes, compiled_for, framed, signed

SOUND = EngineBytes().file()
HEADER = int.from_bytes(SOUND[:8], "little")


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def altered(**changes: Any) -> bytes:
    """The manifest with other members; a value of None drops the member."""
    manifest = {**EngineBytes().manifest, **changes}  # type: ignore[dict-item]
    return EngineBytes({name: each for name, each in manifest.items() if each is not None}).file()


def within(member: str, **changes: Any) -> bytes:
    return altered(**{member: {**MANIFEST[member], **changes}})


def table_with(name: str, **changes: Any) -> bytes:
    table = EngineBytes().table()
    table[name].update(changes)
    return EngineBytes().file(table)


def renamed(old: str, new: str) -> bytes:
    engine = EngineBytes()
    engine.tensors = {new if name == old else name: each for name, each in engine.tensors.items()}
    return engine.hashed().file()


def in_bytes(old: bytes, new: bytes) -> bytes:
    """The header with a part of its text replaced: for JSON that json.dumps does not write."""
    header = EngineBytes().header()
    assert old in header
    return signed(framed(header.replace(old, new, 1), EngineBytes().data))


def in_text(old: str, new: str) -> bytes:
    return in_bytes(old.encode(), new.encode())


def in_manifest(old: str, new: str) -> bytes:
    text = json.dumps(MANIFEST)
    assert old in text
    return EngineBytes(text.replace(old, new, 1)).file()


def without(name: str) -> bytes:
    engine = EngineBytes()
    del engine.tensors[name]
    return engine.hashed().file()


def with_tensor(name: str, dtype: str, shape: list[int], content: bytes, **changes: Any) -> bytes:
    """One tensor more, or another one; all hashes are right. changes: of the manifest."""
    engine = EngineBytes({**MANIFEST, **changes}).bound()
    engine.tensors[name] = (dtype, shape, content)
    return engine.hashed().file()


def with_layout(weights: Any, **changes: Any) -> bytes:
    """Code that was compiled for these weights, or bytes in place of all that it says."""
    text = weights if isinstance(weights, bytes) else compiled_for(MANIFEST, weights)
    return with_tensor("code/weights.json", "U8", [len(text)], text, **changes)


def compiled_for_other(**facts: Any) -> bytes:
    """Code that was compiled for something else than the manifest says; a fact that is None is left out."""
    told = json.loads(LAYOUT) | facts
    return with_layout(json.dumps({name: each for name, each in told.items() if each is not None}).encode())


def with_content(name: str, content: bytes) -> bytes:
    """Other content, and the hash that it had."""
    engine = EngineBytes()
    dtype, shape, _ = engine.tensors[name]
    engine.tensors[name] = (dtype, shape, content)
    return engine.file()


def last_row() -> tuple[str, int, int]:
    name, row = list(EngineBytes().table().items())[-1]
    return name, *row["data_offsets"]


LAST, BEGIN, END = last_row()
LABELS = "unconditional/labels"
WEIGHT = {"dtype": "F32", "shape": [1, 1, 3, 3], "strides": [9, 1, 3, 1]}
SPREAD_STRIDES = {"conv.weight": [0, 0, 0, 2**40]}
SPREAD = {**WEIGHT, "strides": SPREAD_STRIDES["conv.weight"]}
TRUTH_OF_7 = with_tensor(LABELS, "BOOL", [1], b"\x07", inputs=[{"name": "labels", "dtype": "bool", "shape": ["batch"]}])
REVERSED = dict(reversed(EngineBytes().table().items()))
LABEL = MANIFEST["inputs"][0]
LATE_BATCH = {"name": "a", "dtype": "bool", "shape": [1, "batch"]}
PLAN_ARRAYS = safetensors.numpy.load(PLAN_BYTES)

ENGINE_FAULTS: dict[str, tuple[str, bytes]] = {
    "longer header than file": ("truncated", (len(SOUND) // 8 * 8).to_bytes(8, "little") + SOUND[8:]),
    "header of 2^64 - 8 bytes": ("announce a header", (2**64 - 8).to_bytes(8, "little") + SOUND[8:]),
    "header above 16 MiB": ("announce a header", (2**24 + 8).to_bytes(8, "little") + SOUND[8:]),
    "header that is no multiple of 8": ("announce a header", (HEADER + 1).to_bytes(8, "little") + SOUND[8:]),
    "appended": ("something was appended", SOUND + b"\0"),
    "appended and signed": ("something was appended", signed(EngineBytes().blank() + bytes(8))),
    "header is a list": ("__metadata__", signed(framed(b"[]", EngineBytes().data))),
    "header is empty": ("not valid JSON", signed(framed(b"", EngineBytes().data))),
    "text behind the header": ("expected end", signed(framed(EngineBytes().header() + b"x", EngineBytes().data))),
    "not UTF-8": ("ill-formed UTF-8", in_bytes(b"conv", b"co\xffv")),
    "overlong UTF-8": ("ill-formed UTF-8", in_bytes(b"conv", b"c\xc0\xafv")),
    "NaN": ("not valid JSON", in_manifest("1.5e-06", "NaN")),
    "Infinity": ("not valid JSON", in_manifest("1.5e-06", "Infinity")),
    "1e999": ("number overflow", in_manifest("1.5e-06", "1e999")),
    "2^63": ("out of range", in_manifest('"seconds_to_compile": 1', f'"seconds_to_compile": {2**63}')),
    "01": ("unexpected number", in_manifest('"version": 2', '"version": 02')),
    "a zero behind the header": ("a zero", signed(framed(EngineBytes().header() + b"\0", EngineBytes().data))),
    "a zero in a string": ("a zero", in_bytes(b"conv", b"co\0v")),
    "a byte order mark": ("a byte order", signed(framed(b"\xef\xbb\xbf" + EngineBytes().header(), EngineBytes().data))),
    "a comment": ("not valid JSON", in_manifest('"version"', '/* */"version"')),
    "a comma too many": ("not valid JSON", in_manifest("1.5e-06}", "1.5e-06,}")),
    "2^64": ("out of range", in_manifest('"seconds_to_compile": 1', f'"seconds_to_compile": {2**64}')),
    "below -2^63": ("out of range", in_manifest('"seconds_to_compile": 1', f'"seconds_to_compile": {-(2**63) - 1}')),
    "half a surrogate pair": ("surrogate", in_manifest("Some processor", "\\ud800 processor")),
    "a repeated tensor": ("occurs twice", in_text('"plans/three"', '"code/network.so"')),
    "a repeated member": ("occurs twice", in_manifest('"fixed"', '"notice"')),
    "deep JSON": ("nested more than", in_manifest('{"return_dict": "False"}', "[" * 100_000)),
    "deep header": ("nested more than", in_text('{"dtype"', '{"a":' * 100_000 + '{"dtype"')),
    "too many parts": ("more than 262144 parts", in_manifest('{"return_dict": "False"}', str([0] * 2**18))),
    "two metadata entries": ("single entry", in_text('{"olss_fast.engine"', '{"a": "b", "olss_fast.engine"')),
    "version 3": ("newer olss_fast", altered(version=3)),
    "version 1": ("older olss_fast", altered(version=1)),
    "version 0": ("positive integer", altered(version=0)),
    "version true": ("positive integer", altered(version=True)),
    "no version": ("positive integer", altered(version=None)),
    "another format": ("its format is", altered(format="olss_fast.plan")),
    "sha256 is not first": ("expected sha256", EngineBytes(json.dumps(dict(reversed(MANIFEST.items())))).file()),
    "sha256 in upper case": ("lower-case", altered(sha256="A" * 64)),
    "a wrong sha256": ("damaged or altered", EngineBytes().blank().replace(BLANK.encode(), b"1" * 64, 1)),
    "sha256 in escapes": ("in escapes", EngineBytes(json.dumps(MANIFEST).replace(BLANK, "\\u0030" * 64, 1)).blank()),
    "a missing member": ("the manifest has no member 'unused'; expected exactly the members", altered(unused=None)),
    "an additional member": ("the manifest has the unknown member 'more'; expected exactly the", altered(more=1)),
    "no plan": ("names no plan", altered(plans=[])),
    "a plan twice": ("two plans", altered(plans=MANIFEST["plans"] * 2)),
    "an input twice": ("two inputs", altered(inputs=MANIFEST["inputs"] * 2)),
    "another device": ("machine.device", within("machine", device="tpu")),
    "an integer dtype": ("dtype", altered(dtype="int64")),
    "min above max": ("min <= opt <= max", within("profile", min=[5, 1, 8, 8])),
    "one axis": ("2 to 16 axes", altered(profile={name: [1] for name in MANIFEST["profile"]})),
    "multiple of 0": ("multiple", within("profile", multiple=[0, 1, 8, 8])),
    "a size beyond all bounds": ("max", within("profile", max=[2**62, 1, 8, 8])),
    "batch as a later axis": ("inputs[0].shape[1]", altered(inputs=[LATE_BATCH])),
    "overlapping tensors": ("begins at byte", table_with(LAST, data_offsets=[BEGIN - 4, END - 4])),
    "a gap": ("begins at byte", table_with(LAST, data_offsets=[BEGIN + 4, END + 4])),
    "beyond the end": ("do not fit its shape", table_with(LAST, data_offsets=[BEGIN, END + 4])),
    "end before begin": ("do not fit its shape", table_with(LAST, data_offsets=[END, BEGIN])),
    "too small a shape": ("do not fit its shape", table_with(LAST, shape=[1, 1, 3, 2])),
    "a shape that overflows to its size": ("do not fit its shape", table_with(LAST, shape=[2**32, 2**32, 3, 3])),
    "a shape that hides behind 0": ("do not fit its shape", table_with(LAST, shape=[2**39, 2**39, 0])),
    "a size that no file has": ("is described by", table_with(LAST, shape=[2**41, 0])),
    "a negative shape": ("is described by", table_with(LAST, shape=[-1, -1, 3, 3])),
    "a fractional shape": ("is described by", table_with(LAST, shape=[1.0, 1, 3, 3])),
    "true as a size": ("is described by", table_with(LAST, shape=[True, 1, 3, 3])),
    "a hundred axes": ("is described by", table_with(LAST, shape=[1] * 100)),
    "one offset": ("is described by", table_with(LAST, data_offsets=[BEGIN])),
    "an unknown dtype": ("which is unknown", table_with(LAST, dtype="F128")),
    "more in the table": ("is described by", table_with(LAST, more=1)),
    "another order than the table's": ("begins at byte", EngineBytes().file(REVERSED)),
    "an unknown folder": ("expected weights/", renamed(LAST, "more/x")),
    "no folder": ("expected weights/", renamed(LAST, "x")),
    "an empty name": ("expected weights/", renamed(LAST, "weights/")),
    "code above the folder": ("plain file name", renamed(LAST, "code/../x")),
    "code in a folder": ("plain file name", renamed(LAST, "code/a/b")),
    "hidden code": ("plain file name", renamed(LAST, "code/.so")),
    "a long name": ("plain file name", renamed(LAST, "code/" + "a" * 300)),
    "code of floats": ("plain file name", renamed(LAST, "code/x")),
    "another weight": ("hash of its weights", with_content(LAST, bytes(36))),
    "other code": ("hash of its code", with_content("code/network.so", bytes(40))),
    "no hash at all": ("hash of its code", altered(hashes={**MANIFEST["hashes"], "code": ""})),
    "a weight of one element": ("compiled for 'F32' of shape (1, 1, 3, 3)", with_tensor(LAST, "F32", [1], bytes(4))),
    "a weight of none": ("of shape (0, 1, 3, 3)", with_tensor(LAST, "F32", [0, 1, 3, 3], b"")),
    "a weight of as many": ("is 'F32' of shape (9, 1, 1, 1)", with_tensor(LAST, "F32", [9, 1, 1, 1], bytes(36))),
    "a weight of float16": ("is 'F16'", with_tensor(LAST, "F16", [1, 1, 3, 3], bytes(18))),
    "a weight in C order": ("with strides (9, 1, 3, 1)", altered(strides={})),
    "strides of nothing": ("was compiled for none", with_layout({"x": WEIGHT}, strides={"x": [9, 1, 3, 1]})),
    "a weight more": ("was compiled for none", with_tensor("weights/x", "F32", [1], bytes(4))),
    "a weight less": ("is none and its code was compiled for 'F32'", without(LAST)),
    "no layout": ("holds no code/weights.json", without("code/weights.json")),
    "a layout that is no JSON": ("weights.json is not valid JSON", with_layout(b"{")),
    "a layout that is a list": ("expected an object", with_layout(b"[]")),
    "weights that are a list": ("expected an object", with_layout([])),
    "a layout of numbers": ("expected dtype, shape and strides", with_layout({"conv.weight": 1})),
    "a layout of true sizes": ("dtype, shape and strides", with_layout({"conv.weight": {**WEIGHT, "shape": [True]}})),
    "a layout without strides": ("expected dtype", with_layout({"conv.weight": {"dtype": "F32", "shape": [9]}})),
    "code for a GPU": ("compiled for 'cuda'", compiled_for_other(device="cuda")),
    "code of another dtype": ("its dtype is 'float32' and its code", compiled_for_other(dtype="float16")),
    "another dtype than the code's": ("its dtype is 'float64' and its code", altered(dtype="float64")),
    "a device less": ("compiled for none", compiled_for_other(device=None)),
    "a wider profile than the code's": ("its profile is", within("profile", max=[8, 1, 8, 8])),
    "a finer profile than the code's": ("its profile is", within("profile", multiple=[1, 1, 4, 8])),
    "a pair, and code for one": ("its doubled is true and its code", compiled_for_other(doubled=False)),
    "1 for true": ("its doubled is true and its code", compiled_for_other(doubled=1)),
    "one, and code for a pair": ("its doubled is false and its code", altered(doubled=False)),
    "an input of another dtype": ("its inputs is", altered(inputs=[{**LABEL, "dtype": "int32"}])),
    "an input of another shape": ("its inputs is", altered(inputs=[{**LABEL, "shape": ["batch", 7]}])),
    "an input of no sample": ("its inputs is", altered(inputs=[{**LABEL, "shape": [1]}])),
    "an input more": ("its inputs is", altered(inputs=[LABEL, {**LABEL, "name": "more"}])),
    "an input less": ("its inputs is", altered(inputs=[])),
    "an input under another name": ("its inputs is", altered(inputs=[{**LABEL, "name": "other"}])),
    "code that was compiled for more": ("expected device, doubled", compiled_for_other(more=1)),
    "code that was compiled for null": ("expected device, doubled", with_layout(b'{"more":null,' + LAYOUT[1:])),
    "strides that overlap": ("expected those of dense", with_layout({"conv.weight": SPREAD}, strides=SPREAD_STRIDES)),
    "a default argument that is no input": ("none of the engine's inputs", renamed(LABELS, "unconditional/more")),
    "a default argument of two rows": ("of another dtype or shape", with_tensor(LABELS, "I64", [2], bytes(16))),
    "a default argument of int32": ("of another dtype or shape", with_tensor(LABELS, "I32", [1], bytes(4))),
    "a truth of 7": ("another byte than 0 and 1", TRUTH_OF_7),
    "a name with a new line": ("can be printed", renamed(LAST, "weights/a\nb")),
    "17 axes": ("is described by", table_with(LAST, shape=[1] * 15 + [3, 3])),
    "a profile of 17 axes": ("2 to 16 axes", altered(profile={name: [1] * 17 for name in MANIFEST["profile"]})),
    "a size that is no multiple": ("multiples", within("profile", opt=[2, 1, 12, 8])),
    "an input of 17 axes": ("at most 16 axes", altered(inputs=[{**MANIFEST["inputs"][0], "shape": [1] * 17}])),
    "an input without a name": ("expected a name", altered(inputs=[{**MANIFEST["inputs"][0], "name": ""}])),
    "built with no torch": ("built_with.torch", within("built_with", torch=None)),
    "a scale beyond float32": ("guidance_scale", altered(guidance_scale=1e39)),
    "a figure beyond float32": ("measured", altered(measured={"x": -1e39})),
    "minus no integer": ("out of range", in_manifest('"seconds_to_compile": 1', '"seconds_to_compile": -0')),
    "1e-999": ("out of range", in_manifest("1.5e-06", "1.5e-999")),
    "no library": ("holds no code/network.so", renamed("code/network.so", "code/other.so")),
    "a plan that is not there": ("holds 0 plans", without("plans/three")),
    "a plan of another name": ("holds no bytes under that name", renamed("plans/three", "plans/four")),
    "a plan that is not named": ("holds 2 plans", renamed("unconditional/labels", "plans/four")),
    "arguments without guidance": ("has no guidance", EngineBytes({**MANIFEST, "doubled": False}).bound().file()),
    "another plan than named": ("is another", altered(plans=[{**MANIFEST["plans"][0], "sha256": BLANK}])),
    "other figures of a plan": ("the manifest says", altered(plans=[{**MANIFEST["plans"][0], "nfe": 4}])),
}  # fmt: skip


def plan_file(**arrays: Any) -> bytes:
    """The plan with other arrays, its own checksum right again."""
    entry = {"sha256": BLANK, "branches": PLAN.branches, "format": "olss_fast.plan", "metadata": {}, "version": 1}
    entry |= {name: arrays.pop(name) for name in list(arrays) if name in entry}
    blank = safetensors.numpy.save({**PLAN_ARRAYS, **arrays}, metadata={"olss_fast.plan": json.dumps(entry)})
    return blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def spoiled(name: str, place: Any, value: float) -> bytes:
    array = PLAN_ARRAYS[name].copy()
    array[place] = value
    return plan_file(**{name: array})


PLAN_FAULTS: dict[str, tuple[str, bytes]] = {
    "flipped": ("damaged or altered", flipped(PLAN_BYTES, len(PLAN_BYTES) - 1)),
    "truncated": ("truncated", PLAN_BYTES[:-8]),
    "empty": ("begins with 8 bytes", b""),
    "huge header": ("announce a header", (2**63).to_bytes(8, "little") + PLAN_BYTES[8:]),
    "version 2": ("newer olss_fast", plan_file(version=2)),
    "three branches": ("branches", plan_file(branches=3)),
    "NaN": ("must be finite", spoiled("rows", (1, 0), np.nan)),
    "infinite time": ("must be finite", spoiled("timesteps", 0, np.inf)),
    "time beyond float32": ("beyond float32", spoiled("timesteps", 0, 1e300)),
    "acausal": ("expected exactly 0", spoiled("rows", (0, 1), 1.0)),
    "negative level": ("neither below 0", spoiled("sigmas", 0, -1.0)),
    "another network": ("uses network 1", spoiled("models", 0, 1)),
    "too few rows": ("rows has shape", plan_file(rows=PLAN_ARRAYS["rows"][:-1].copy())),
    "too few columns": ("rows has shape", plan_file(rows=PLAN_ARRAYS["rows"][:, :-1].copy())),
    "no steps": ("rows has shape", plan_file(timesteps=np.zeros(0))),
    "short levels": ("alphas does not have", plan_file(alphas=PLAN_ARRAYS["alphas"][:-1].copy())),
    "float32": ("no tensor", plan_file(rows=PLAN_ARRAYS["rows"].astype(np.float32))),
    "metadata of numbers": ("strings as metadata", plan_file(metadata={"a": 1})),
    "no metadata": ("strings as metadata", plan_file(metadata=None)),
    "one tensor more": ("6 tensors", plan_file(more=np.zeros(1))),
}

FAULTS = ENGINE_FAULTS | {
    f"plan: {name}": (text, EngineBytes().with_plan(data).file()) for name, (text, data) in PLAN_FAULTS.items()
}
