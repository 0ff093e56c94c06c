"""Engine and .npy files that nobody should trust, as the C++ runtime reads them: each is refused by name.

The reader is compiled with address and undefined-behaviour sanitizers: an access outside the file's memory, an overflow
or an uncaught exception ends it, and the test. Nothing of such a file is ever run: no code is loaded in here at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from engine_bytes import BLANK, MANIFEST, PLAN, PLAN_BYTES, EngineBytes, digest, framed, signed
from runtime_build import check_files

from olss_fast.plan_io import plan_to_bytes

FILE, VERSION = "0", "1"  # kinds of olss::Error
SOUND = EngineBytes().file()
HEADER = int.from_bytes(SOUND[:8], "little")
MUTATED = 5000


def answers(tmp_path: Path, contents: list[bytes], suffix: str = "olss") -> list[str]:
    paths = [tmp_path / f"{i}.{suffix}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return check_files(paths)


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_a_sound_file_is_taken(tmp_path: Path) -> None:
    assert answers(tmp_path, [SOUND]) == ["ok"]


def test_a_file_of_several_pieces_is_taken(tmp_path: Path) -> None:
    """The checksum is over pieces of 4 MiB: a last one that is whole, of one byte, and an altered one in the middle."""
    files = []
    for size in (0, 1):
        engine = EngineBytes()
        rest = 12 * 2**20 - 8 - HEADER - len(engine.data)
        for _ in range(2):  # the header's own length depends on the size written into it
            engine.tensors["weights/more"] = ("U8", [rest + size], bytes(rest + size))
            rest = 12 * 2**20 - len(engine.file()) + rest + size
        files.append(engine.file())
        assert len(files[-1]) == 12 * 2**20 + size
    said = answers(tmp_path, [*files, flipped(files[0], 6 * 2**20)])
    assert said[:2] == ["ok", "ok"]
    assert "damaged or altered" in said[2]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    sizes = [
        0,
        1,
        7,
        8,
        9,
        8 + HEADER // 2,
        8 + HEADER - 1,
        8 + HEADER,
        8 + HEADER + 1,
        len(SOUND) // 2,
        len(SOUND) - 1,
    ]
    for size, said in zip(sizes, answers(tmp_path, [SOUND[:size] for size in sizes]), strict=True):
        assert said.startswith(FILE), (size, said)
        assert ("truncated" if size >= 8 else "begins with 8 bytes") in said, (size, said)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """One bit in every 7th byte, all of the header's length, and both ends of the data."""
    places = [*range(8), *range(8, len(SOUND), 7), 8 + HEADER - 1, 8 + HEADER, len(SOUND) - 1]
    bits = [place % 8 for place in places]
    said = answers(tmp_path, [flipped(SOUND, place, bit) for place, bit in zip(places, bits, strict=True)])
    assert [place for place, each in zip(places, said, strict=True) if each == "ok"] == []


# --- faults under a right checksum ------------------------------------------------------------------------------------


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
    return engine.file()


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
    return engine.file()


def last_row() -> tuple[str, int, int]:
    name, row = list(EngineBytes().table().items())[-1]
    return name, *row["data_offsets"]


LAST, BEGIN, END = last_row()
REVERSED = dict(reversed(EngineBytes().table().items()))
LATE_BATCH = {"name": "a", "dtype": "bool", "shape": [1, "batch"]}
PLAN_ARRAYS = safetensors.numpy.load(PLAN_BYTES)

FAULTS: dict[str, tuple[str, bytes]] = {
    "longer header than file": ("truncated", (len(SOUND) // 8 * 8).to_bytes(8, "little") + SOUND[8:]),
    "header of 2^64 - 8 bytes": ("announce a header", (2**64 - 8).to_bytes(8, "little") + SOUND[8:]),
    "header above 16 MiB": ("announce a header", (2**24 + 8).to_bytes(8, "little") + SOUND[8:]),
    "header that is no multiple of 8": ("announce a header", (HEADER + 1).to_bytes(8, "little") + SOUND[8:]),
    "appended": ("something was appended", SOUND + b"\0"),
    "appended and signed": ("something was appended", signed(EngineBytes().blank() + bytes(8))),
    "header is a list": ("__metadata__", signed(framed(b"[]", EngineBytes().data))),
    "header is empty": ("not valid JSON", signed(framed(b"", EngineBytes().data))),
    "text behind the header": ("something follows", signed(framed(EngineBytes().header() + b"x", EngineBytes().data))),
    "not UTF-8": ("not UTF-8", in_bytes(b"conv", b"co\xffv")),
    "overlong UTF-8": ("not UTF-8", in_bytes(b"conv", b"c\xc0\xafv")),
    "NaN": ("not valid JSON", in_manifest("1.5e-06", "NaN")),
    "Infinity": ("not valid JSON", in_manifest("1.5e-06", "Infinity")),
    "1e999": ("out of range", in_manifest("1.5e-06", "1e999")),
    "2^63": ("out of range", in_manifest('"seconds_to_compile": 1', f'"seconds_to_compile": {2**63}')),
    "01": ("begins with 0", in_manifest('"version": 1', '"version": 01')),
    "half a surrogate pair": ("surrogate", in_manifest("Some processor", "\\ud800 processor")),
    "a repeated tensor": ("occurs twice", in_text('"plans/three"', '"code/network.so"')),
    "a repeated member": ("occurs twice", in_manifest('"fixed"', '"notice"')),
    "deep JSON": ("nested more than", in_manifest('{"return_dict": "False"}', "[" * 100_000)),
    "deep header": ("nested more than", in_text('{"dtype"', '{"a":' * 100_000 + '{"dtype"')),
    "a million values": ("more than", in_manifest('{"return_dict": "False"}', "[" + "0," * 2**21 + "0]")),
    "two metadata entries": ("single entry", in_text('{"olss_fast.engine"', '{"a": "b", "olss_fast.engine"')),
    "version 2": ("newer olss_fast", altered(version=2)),
    "version 0": ("positive integer", altered(version=0)),
    "version true": ("positive integer", altered(version=True)),
    "no version": ("positive integer", altered(version=None)),
    "another format": ("its format is", altered(format="olss_fast.plan")),
    "sha256 is not first": ("first member is sha256", EngineBytes(json.dumps(dict(reversed(MANIFEST.items())))).file()),
    "sha256 in upper case": ("lower-case", altered(sha256="A" * 64)),
    "a wrong sha256": ("damaged or altered", EngineBytes().blank().replace(BLANK.encode(), b"1" * 64, 1)),
    "sha256 in escapes": ("in escapes", EngineBytes(json.dumps(MANIFEST).replace(BLANK, "\\u0030" * 64, 1)).blank()),
    "a missing member": ("exactly the members", altered(unused=None)),
    "an additional member": ("exactly the members", altered(more=1)),
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
    "a shape that hides behind 0": ("do not fit its shape", table_with(LAST, shape=[2**62, 2**62, 0])),
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
    "no library": ("holds no code/network.so", renamed("code/network.so", "code/other.so")),
    "a plan that is not there": ("holds 0 plans", without("plans/three")),
    "a plan of another name": ("holds no such bytes", renamed("plans/three", "plans/four")),
    "a plan that is not named": ("holds 2 plans", renamed("unconditional/labels", "plans/four")),
    "arguments without guidance": ("has no guidance", altered(doubled=False)),
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
    "flipped": ("not that of its content", flipped(PLAN_BYTES, len(PLAN_BYTES) - 1)),
    "truncated": ("truncated", PLAN_BYTES[:-8]),
    "empty": ("expected 8 to", b""),
    "huge header": ("header should have", (2**63).to_bytes(8, "little") + PLAN_BYTES[8:]),
    "version 2": ("format and version", plan_file(version=2)),
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
    "one tensor more": ("6 tensors", plan_file(more=np.zeros(1))),
}


def test_every_fault_is_named(tmp_path: Path) -> None:
    plans = {
        f"plan: {name}": (text, EngineBytes().with_plan(data).file()) for name, (text, data) in PLAN_FAULTS.items()
    }
    faults = {**FAULTS, **plans}
    said = dict(zip(faults, answers(tmp_path, [data for _, data in faults.values()]), strict=True))
    wrong = {name: said[name] for name, (expected, _) in faults.items() if expected not in said[name]}
    assert wrong == {}
    assert {name for name, each in said.items() if not each.startswith(FILE)} == {"version 2"}
    assert said["version 2"].startswith(VERSION)
    assert {name: each for name, each in said.items() if len(each) > 800} == {}


def test_members_of_another_type_are_refused(tmp_path: Path) -> None:
    """Each member of the manifest in turn, at every depth, made something else."""
    strange: list[Any] = [None, True, -1, 1.5, "x", [], {}, [None], {"a": None}]
    cases = [(path, value) for path, old in members(MANIFEST) for value in strange if not alike(old, value)]
    contents = [EngineBytes(json.dumps(replaced(MANIFEST, path, value))).file() for path, value in cases]
    for case, said in zip(cases, answers(tmp_path, contents), strict=True):
        assert said != "ok", case


def members(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in items:
        yield (*path, name), each
        yield from members(each, (*path, name))


def alike(old: Any, value: Any) -> bool:
    """Whether `value` might stand in place of `old`: of the same type, or null where that is allowed."""
    number = (int, float)
    same = type(old) is type(value) or (
        isinstance(old, number) and isinstance(value, number) and not isinstance(value, bool)
    )
    return same or value is None or (old is None and isinstance(value, (str, list)))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    result = value.copy()
    result[path[0]] = replaced(value[path[0]], path[1:], new)
    return result


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Files near `data`: bytes changed, removed, doubled, moved, replaced by ones that mean something in JSON."""
    rng = random.Random(seed)
    telling = b'{}[]",:\\0123456789eE.-+ntf\x00\xff\x80'
    changes: list[Callable[[bytes, int, int], bytes]] = [
        lambda text, at, size: text[:at] + bytes(rng.randrange(256) for _ in range(size)) + text[at + size :],
        lambda text, at, size: text[:at] + bytes([rng.choice(telling)]) + text[at + 1 :],
        lambda text, at, size: text[:at] + text[at + size :],
        lambda text, at, size: text[: at + size] + text[at:],
        lambda text, at, size: text[:at] + text[at + size :] + text[at : at + size],
    ]
    for _ in range(count):
        text = data
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            text = rng.choice(changes)(text, rng.randrange(len(text)), rng.choice((1, 1, 2, 8, 40)))
        yield text


def test_mutated_files_are_refused(tmp_path: Path) -> None:
    """With the digest that they had: all of them."""
    contents = [each for each in mutations(SOUND, MUTATED, seed=1) if each != SOUND]
    assert [i for i, said in enumerate(answers(tmp_path, contents)) if said == "ok"] == []


def test_mutated_headers_under_a_right_digest_do_no_harm(tmp_path: Path) -> None:
    """Most are refused; a few changed words of a text nobody checks. What matters is that the sanitizers are silent."""
    header = EngineBytes().header()
    contents = [signed(framed(each, EngineBytes().data)) for each in mutations(header, MUTATED, seed=2)]
    said = answers(tmp_path, contents)
    assert sum(each == "ok" for each in said) < len(said) / 4
    assert sum("digest" in each for each in said) < len(said) / 4  # the checks behind the digest were reached


def test_mutated_plans_under_right_digests_do_no_harm(tmp_path: Path) -> None:
    contents = [
        EngineBytes().with_plan(each).file()
        for each in mutations(PLAN_BYTES, MUTATED // 8, seed=3)
        if each != PLAN_BYTES
    ]
    assert "ok" not in answers(tmp_path, contents)  # the plan has a checksum of its own


def test_the_digest_is_what_the_specification_says() -> None:
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# --- .npy files -------------------------------------------------------------------------------------------------------


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_npy_files(tmp_path: Path) -> None:
    sound = [
        np.zeros(shape, dtype)
        for dtype in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")
        for shape in ((), (3,), (0, 2))
    ]
    assert set(answers(tmp_path, [npy(each) for each in sound], "npy")) == {"ok"}
    plain = npy(np.arange(6.0).reshape(2, 3))
    faults = {
        "does not begin": b"PK" + plain[2:],
        "truncated?": plain[:40],
        "needs 48 bytes": plain[:-1],
        "and it has 49": plain + b"\0",
        "of version 9": plain[:6] + b"\x09" + plain[7:],
        "Fortran order": npy(np.asfortranarray(np.ones((2, 3)))),
        "'<c16'": npy(np.ones(2, complex)),
        "'>f8'": npy(np.ones(2, ">f8")),
        "'|O'": b"\x93NUMPY\x01\x00\x40\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(63)
        + b"\n"
        + b"cposix",
        "structured": npy(np.zeros(1, [("a", "f8")])),
        "is not what NumPy writes": plain.replace(b"'descr'", b"'dexcr'"),
        "expected at most": plain.replace(b"(2, 3), }" + b" " * 30, b"(4294967296, 4294967296), }".ljust(39)),
    }
    for expected, said in zip(faults, answers(tmp_path, list(faults.values()), "npy"), strict=True):
        assert expected in said
    mutated = list(mutations(plain[:128], MUTATED // 2, seed=4))
    assert len(set(answers(tmp_path, [each + plain[128:] for each in mutated], "npy"))) > 5


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.olss"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    (said,) = check_files([path])
    assert said.startswith(FILE)
    assert {"folder": "it is a folder", "pipe": "pipe", "nothing": "no such file"}[kind] in said


def test_a_plan_that_python_writes_is_taken(tmp_path: Path) -> None:
    assert answers(tmp_path, [EngineBytes().with_plan(plan_to_bytes(PLAN)).file()]) == ["ok"]
