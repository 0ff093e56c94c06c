"""Engine and .npy files that nobody should trust, as the C++ runtime reads them: each is refused by name.

The reader is compiled with address and undefined-behaviour sanitizers: an access outside the file's memory, an overflow
or an uncaught exception ends it, and the test. Nothing of such a file is ever run: no code is loaded in here at all.
"""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bytes import MANIFEST, PIECE, PLAN, PLAN_BYTES, EngineBytes, digest, framed, signed
from engine_faults import FAULTS, HEADER, SOUND, flipped
from engine_mutants import alike, members, mutations, replaced
from runtime_build import check_files

from olss_fast.plan.file import plan_to_bytes

FILE, VERSION = "0", "1"  # kinds of olss::Error
MUTATED = 5000


def answers(tmp_path: Path, contents: list[bytes], suffix: str = "olss") -> list[str]:
    paths = [tmp_path / f"{i}.{suffix}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return check_files(paths)


@pytest.mark.slow
def test_a_sound_file_is_taken(tmp_path: Path) -> None:
    assert answers(tmp_path, [SOUND]) == ["ok"]


@pytest.mark.slow
def test_a_file_of_several_pieces_is_taken(tmp_path: Path) -> None:
    """The checksum is over pieces of 16 MiB: one, two and three that are whole, a last one of one byte, an altered one
    in the middle."""
    files, noise = [], random.Random(0).randbytes(3 * PIECE)  # no two pieces are alike
    for pieces, size in ((1, 0), (1, 1), (2, 1), (3, 0)):
        engine, whole = EngineBytes(), pieces * PIECE
        rest = whole - 8 - HEADER - len(engine.data)
        for _ in range(2):  # the header's own length depends on the size written into it
            engine.tensors["code/more"] = ("U8", [rest + size], noise[: rest + size])
            rest = whole - len(engine.hashed().file()) + rest + size
        files.append(engine.file())
        assert len(files[-1]) == whole + size
    altered = [flipped(files[1], PIECE // 2), flipped(files[3], PIECE + PIECE // 2)]
    swapped = files[3][:PIECE] + files[3][2 * PIECE :] + files[3][PIECE : 2 * PIECE]
    said = answers(tmp_path, [*files, *altered, swapped])
    assert said[:4] == ["ok"] * 4
    assert all("damaged or altered" in each for each in said[4:])


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


def test_every_fault_is_named(tmp_path: Path) -> None:
    said = dict(zip(FAULTS, answers(tmp_path, [data for _, data in FAULTS.values()]), strict=True))
    wrong = {name: said[name] for name, (expected, _) in FAULTS.items() if expected not in said[name]}
    assert wrong == {}
    assert {name for name, each in said.items() if each.startswith(VERSION)} == {
        "version 1",
        "version 3",
        "plan: version 2",
    }
    assert {each[:1] for each in said.values()} == {FILE, VERSION}
    texts = {name: each.replace(str(tmp_path), "") for name, each in said.items()}
    assert {name: each for name, each in texts.items() if len(each) > 500} == {}  # quotes of what came are cut


def test_members_of_another_type_are_refused(tmp_path: Path) -> None:
    """Each member of the manifest in turn, at every depth, made something else."""
    strange: list[Any] = [None, True, -1, 1.5, "x", [], {}, [None], {"a": None}]
    cases = [(path, value) for path, old in members(MANIFEST) for value in strange if not alike(old, value)]
    contents = [EngineBytes(json.dumps(replaced(MANIFEST, path, value))).file() for path, value in cases]
    for case, said in zip(cases, answers(tmp_path, contents), strict=True):
        assert said != "ok", case


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
