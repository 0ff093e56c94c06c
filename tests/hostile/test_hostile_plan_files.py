"""Damaged and malicious plan files: each ends in a PlanFileError that says why, and in nothing else.

`sealed` gives an altered file a correct checksum, as somebody would who means harm; without that, nearly everything
would already stop at the checksum and the checks behind it would go untested.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from olss_fast.errors import PlanFileError
from olss_fast.plan import file as plan_file
from olss_fast.plan.file import plan_from_bytes, plan_to_bytes
from olss_fast.plan.plan import Plan

ZEROS = "0" * 64
FORMAT, MAX_FILE_BYTES, MAX_HEADER_BYTES = (
    plan_file.FORMAT.name,
    plan_file.FORMAT.most_bytes,
    plan_file.FORMAT.most_header,
)
PLAN = Plan(
    timesteps=[900, 400],
    rows=[[1, 0, 0], [2, -1, 0], [3, -2, -0.5]],
    alphas=[0.1, 0.5, 1],
    sigmas=[0.9, 0.5, 0],
    metadata={"method": "ddim", "prediction_type": "epsilon"},
)
GOOD = plan_to_bytes(PLAN)
DIGEST = re.search(rb'sha256\\":\\"([0-9a-f]{64})', GOOD)[1]  # type: ignore[index]


def sealed(blank: bytes) -> bytes:
    """The file with the right checksum in its first 64 zeros."""
    return blank.replace(ZEROS.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def header_and_data() -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(GOOD[:8], "little")
    return json.loads(GOOD[8 : 8 + length]), GOOD[8 + length :]


def assembled(header: object, data: bytes, *, text: str | None = None) -> bytes:
    raw = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The good file after `change` was made to its header (in place)."""
    header, data = header_and_data()
    entry = json.loads(header["__metadata__"][FORMAT]) | {"sha256": ZEROS}
    header["__metadata__"][FORMAT] = json.dumps(entry)
    change(header)
    return sealed(assembled(header, data))


def with_entry(**changes: object) -> bytes:
    """The good file with members of its entry changed (or removed, for None)."""

    def change(header: dict[str, Any]) -> None:
        entry = json.loads(header["__metadata__"][FORMAT]) | changes
        header["__metadata__"][FORMAT] = json.dumps({key: value for key, value in entry.items() if value is not None})

    return with_header(change)


def with_entry_text(old: str, new: str) -> bytes:
    def change(header: dict[str, Any]) -> None:
        text = header["__metadata__"][FORMAT]
        assert old in text
        header["__metadata__"][FORMAT] = text.replace(old, new)

    return with_header(change)


def with_tensors(**changes: np.ndarray | None) -> bytes:
    """A well-formed safetensors file with other tensors than it should have (or without some, for None)."""
    arrays: dict[str, Any] = {name: np.array(getattr(PLAN, name)) for name in ("timesteps", "rows", "alphas", "sigmas")}
    arrays = {**arrays, "models": np.array(PLAN.models), **changes}
    entry = {"sha256": ZEROS, "branches": 1, "format": FORMAT, "metadata": {}, "version": 1}
    kept = {name: array for name, array in arrays.items() if array is not None}
    return sealed(safetensors.numpy.save(kept, metadata={FORMAT: json.dumps(entry)}))


def with_descriptor(name: str, **changes: object) -> bytes:
    return with_header(lambda header: header[name].update(changes))


def repeated_name() -> bytes:
    header, data = header_and_data()
    return assembled(None, data, text=json.dumps(header)[:-1] + ', "rows": ' + json.dumps(header["alphas"]) + "}")


def altered(array: np.ndarray, place: int, value: float) -> np.ndarray:
    copy = np.array(array)
    copy.flat[place] = value
    return copy


class Bomb:
    """Unpickling this would raise at once, so a reader that unpickles anything is found out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the file was unpickled')",)


HEADER, DATA = header_and_data()
HOSTILE: dict[str, tuple[bytes, str]] = {
    # sizes
    "empty": (b"", "it has 0 bytes; a safetensors file begins with 8"),
    "seven bytes": (GOOD[:7], "it has 7 bytes"),
    "only a length": (GOOD[:8], "its header should reach to byte .*: truncated"),
    "truncated header": (GOOD[:100], "truncated; copy the file again, or make it again"),
    "truncated data": (GOOD[:-1], "'timesteps' ends at byte 152 of 151 bytes of data: truncated"),
    "appended": (GOOD + b"\0", "end at byte 152 of 153 bytes of data: something was appended"),
    "two plans": (GOOD + GOOD, "something was appended"),
    "too large": (GOOD + bytes(MAX_FILE_BYTES), f"expected at most {MAX_FILE_BYTES}"),
    "huge header": ((2**63).to_bytes(8, "little") + GOOD[8:], f"announce a header of {2**63} bytes"),
    "large header": (assembled({"x": "y" * MAX_HEADER_BYTES}, b""), f"up to {MAX_HEADER_BYTES}"),
    # not safetensors
    "pickle": (pickle.dumps(Bomb()), "no usable plan file"),
    "pickle behind a length": (assembled(None, b"", text="x").replace(b"x", b"\x80"), "not valid JSON"),
    "zip": (b"PK\x03\x04" + bytes(100), "no usable plan file"),
    "text": (b"timesteps: 900, 400\n" * 10, "is it a safetensors file at all"),
    "zeros": (bytes(1000), "not valid JSON"),
    # header
    "not JSON": (assembled(None, DATA, text="{'a': 1}"), "header is not valid JSON"),
    "not UTF-8": (assembled(None, DATA, text='{"\ud800": 1}'), "header is not valid JSON"),
    "UTF-16": (b"\x08\0\0\0\0\0\0\0" + "{}  ".encode("utf-16-le"), "header is not valid JSON"),
    "byte order mark": (assembled(None, DATA, text="\ufeff" + json.dumps(HEADER)), "not valid JSON"),
    "a list": (assembled([1, 2], DATA), r"header is \[1, 2\]; expected a JSON object"),
    "nested deeply": (assembled(None, DATA, text="[" * 200_000), "not valid JSON"),
    "long number": (assembled(None, DATA, text="9" * 100_000), "header is"),
    "NaN": (assembled(None, DATA, text='{"a": NaN}'), "NaN is not JSON"),
    "infinite": (assembled(None, DATA, text='{"a": -Infinity}'), "-Infinity is not JSON"),
    "repeated name": (repeated_name(), "a name occurs twice"),
    "a model": (safetensors.numpy.save({"conv.weight": np.zeros(3)}), r"tensors \['conv.weight'\]: perhaps a model"),
    "other metadata": (with_header(lambda h: h["__metadata__"].update(format="pt")), "expected the single entry"),
    "metadata not an object": (with_header(lambda h: h.update(__metadata__=[1])), "expected the single entry"),
    "entry not text": (with_header(lambda h: h["__metadata__"].update({FORMAT: 5})), "expected the single entry"),
    # entry
    "entry not JSON": (with_header(lambda h: h["__metadata__"].update({FORMAT: "x"})), "entry .* not valid JSON"),
    "entry a list": (with_header(lambda h: h["__metadata__"].update({FORMAT: "[]"})), "expected a JSON object"),
    "entry repeats": (with_entry_text('"version"', '"version": 1, "version"'), "a name occurs twice"),
    "other format": (with_entry(format="report"), "its format is 'report'; expected 'olss_fast.plan'"),
    "no format": (with_entry(format=None), "its format is None"),
    "newer": (with_entry(version=2), "in version 2 of the format, by a newer olss_fast; this release reads version 1"),
    "newer, with more": (with_entry(version=7, extra=[1]), "by a newer olss_fast.*upgrade olss_fast"),
    "far newer": (with_entry_text('"version": 1', '"version": 1' + "0" * 15), "in version 1000000"),
    "astronomic version": (with_entry_text('"version": 1', '"version": 1' + "0" * 4000), "the number '1000"),
    "version zero": (with_entry(version=0), "its version is 0; expected a positive integer"),
    "version text": (with_entry(version="1"), "its version is '1'"),
    "version true": (with_entry(version=True), "its version is True"),
    "version fraction": (with_entry(version=1.0), "its version is 1.0"),
    "no version": (with_entry(version=None), "its version is None"),
    "additional member": (with_entry(code="x"), "has the members .*'code'"),
    "missing member": (with_entry(branches=None), "has the members"),
    "branches three": (with_entry(branches=3), "branches is 3"),
    "branches text": (with_entry(branches="1"), "branches is '1'"),
    "branches true": (with_entry(branches=True), "branches is True"),
    "branches do not fit": (with_entry(branches=2), "at least 5 columns"),
    "metadata a list": (with_entry(metadata=[]), r"metadata is \[\]"),
    "metadata number": (with_entry(metadata={"order": 2}), r"metadata\['order'\] is 2"),
    "metadata half a character": (with_entry_text('"ddim"', '"\\ud800"'), "is not valid JSON .*ud800"),
    # checksum
    "wrong checksum": (GOOD.replace(DIGEST, b"f" * 64), "damaged or altered"),
    "upper-case checksum": (GOOD.replace(DIGEST, DIGEST.upper()), "expected 64 lower-case"),
    "short checksum": (with_entry(sha256="abc"), "sha256 is 'abc'; expected 64"),
    "checksum number": (with_entry(sha256=5), "sha256 is 5"),
    "checksum in other letters": (with_entry(sha256="٣" * 64), "expected 64 lower-case hexadecimal digits"),
    # tensors
    "unknown tensor": (with_tensors(weights=np.zeros(2)), "it holds the tensors .*'weights'"),
    "missing tensor": (with_tensors(models=None), "it holds the tensors"),
    "single precision": (with_tensors(rows=PLAN.rows.astype(np.float32)), "'rows' has dtype 'F32' .*expected F64"),
    "integers for floats": (with_tensors(alphas=np.zeros(3, np.int64)), "'alphas' has dtype 'I64'"),
    "floats for integers": (with_tensors(models=np.zeros(2)), "'models' has dtype 'F64' .* expected I64 in 1"),
    "flat rows": (with_tensors(rows=np.ones(9)), "'rows' has dtype 'F64' and shape .* expected F64 in 2"),
    "scalar": (with_tensors(timesteps=np.array(1.0)), "'timesteps' has"),
    "no steps": (with_tensors(timesteps=np.ones(0), models=np.ones(0, np.int64)), "at least one network evaluation"),
    "rows do not fit": (with_tensors(rows=np.ones((4, 3))), r"rows has shape \(4, 3\); expected 3 rows"),
    "levels do not fit": (with_tensors(sigmas=np.ones(2)), "sigmas has 2 entries"),
    "many columns": (with_tensors(rows=np.zeros((3, 20_000))), r"rows has shape \[3, 20000\]; expected at most"),
    "many steps": (with_tensors(rows=np.zeros((5000, 1))), "expected at most"),
    "not a number": (with_tensors(rows=altered(PLAN.rows, 0, np.nan)), r"rows\[0, 0\] is nan"),
    "infinity": (with_tensors(timesteps=np.array([np.inf, 0])), r"timesteps\[0\] is inf"),
    "acausal": (with_tensors(rows=altered(PLAN.rows, 1, 5e-324)), r"rows\[0, 1\] is 5e-324; expected exactly 0"),
    "negative level": (with_tensors(sigmas=np.array([1, 1, -1.0])), r"sigmas\[2\] is -1.0"),
    "negative model": (with_tensors(models=np.array([0, -1])), "models reaches from -1 to 0"),
    # table of tensors
    "astronomic shape": (with_descriptor("rows", shape=[2**62, 2**62]), "expected sizes"),
    "astronomic vector": (with_descriptor("alphas", shape=[2**63]), "no integer of 64 bits"),
    "overflowing shape": (with_descriptor("alphas", shape=[2**64 + 3]), "no integer of 64 bits"),
    "negative shape": (with_descriptor("alphas", shape=[-3]), r"shape \[-3\]"),
    "true for one": (with_descriptor("timesteps", shape=[True]), r"shape \[True\]"),
    "shape a number": (with_descriptor("alphas", shape=3), "shape 3"),
    "fractional shape": (with_descriptor("alphas", shape=[3.0]), r"shape \[3.0\]"),
    "offsets overlap": (with_descriptor("alphas", data_offsets=[0, 24]), "begins at byte 0 of the data; expected 16"),
    "offsets reversed": (with_descriptor("alphas", data_offsets=[40, 16]), "has 24 bytes; its data_offsets are"),
    "offsets beyond": (with_descriptor("alphas", data_offsets=[0, 2**60]), "expected sizes and .begin, end."),
    "offsets negative": (with_descriptor("alphas", data_offsets=[-24, 0]), "sizes and .begin, end."),
    "three offsets": (with_descriptor("alphas", data_offsets=[0, 1, 2]), "sizes and .begin, end."),
    "offsets text": (with_descriptor("alphas", data_offsets="ab"), "sizes and .begin, end."),
    "unknown dtype": (with_descriptor("alphas", dtype="F128"), "dtype 'F128'"),
    "dtype a list": (with_descriptor("alphas", dtype=["F64"]), r"dtype \['F64'\]"),
    "additional description": (with_descriptor("alphas", device="cuda"), "expected dtype, shape and data_offsets"),
    "description a number": (with_header(lambda h: h.update(alphas=5)), "is described by 5"),
    "terminal escape": (with_entry(format="\x1b[2J"), r"\\x1b\[2J"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_with_its_reason(name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(PlanFileError, match=message) as caught:
        plan_from_bytes(data, source="some/plan.safetensors")
    text = str(caught.value)
    assert text.startswith("'some/plan.safetensors' is no usable plan file: ")
    assert text.isprintable()
    assert len(text) < 600  # nobody reads more, and a file must not choose how much is printed


def test_helpers_without_a_change_give_a_good_file() -> None:
    """Else the cases above might be refused for the helper's own faults."""
    for data in (GOOD, with_entry(), with_header(lambda header: None), with_tensors()):
        assert plan_from_bytes(data) == PLAN


def test_every_flipped_bit_is_noticed() -> None:
    for place in range(len(GOOD)):
        for bit in range(8):
            flipped = bytearray(GOOD)
            flipped[place] ^= 1 << bit
            with pytest.raises(PlanFileError):
                plan_from_bytes(bytes(flipped))


def test_every_truncation_is_noticed() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(PlanFileError):
            plan_from_bytes(GOOD[:length])


# --- random mutations ----------------------------------------------------------------------------------------------

INTERESTING = [
    b"0",
    b"-1",
    b"1e999",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"',
    b"\\",
    b"\xff",
    b"\0" * 8,
    b"NaN",
    b"[" * 40,
]


def mutated(data: bytes, generator: random.Random) -> bytes:
    """One to four random edits: flips, insertions, deletions, repeats, swaps, or a number replaced by another."""
    edited = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place, length = generator.randrange(len(edited)), generator.randint(1, 16)
        kind = generator.randrange(6)
        if kind == 0:
            edited[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            edited[place : place + length] = generator.randbytes(length)
        elif kind == 2:
            del edited[place : place + length]
        elif kind == 3:
            edited[place:place] = edited[place : place + length]
        elif kind == 4:
            edited[place : place + generator.randint(0, 3)] = generator.choice(INTERESTING)
        else:
            numbers = list(re.finditer(rb"\d+", bytes(edited[8:])))
            if numbers:
                start, end = generator.choice(numbers).span()
                edited[8 + start : 8 + end] = str(generator.choice([0, 1, 2, 3, 24, 2**32, 2**63, 2**64])).encode()
        if not edited:
            return b""
    return bytes(edited)


def resealed(data: bytes) -> bytes:
    """The mutated file as an attacker would finish it: right header length where it can be told, right checksum."""
    end = data.find(b"}}", 8) + 2
    if end >= 10:
        header, rest = data[8:end], data[end:].lstrip(b" ")
        header += b" " * (-len(header) % 8)
        data = len(header).to_bytes(8, "little") + header + rest
    return sealed(data)


def outcome(data: bytes) -> str:
    """'plan', or the message. Any other error than PlanFileError, or a warning, fails the test by itself."""
    try:
        plan = plan_from_bytes(data)
    except PlanFileError as error:
        return str(error)
    assert plan_from_bytes(plan_to_bytes(plan)) == plan  # what was accepted is a plan in every respect
    return "plan"


def test_ten_thousand_accidents_are_all_noticed() -> None:
    generator = random.Random(0)
    for _ in range(10_000):
        data = mutated(GOOD, generator)
        assert data == GOOD or outcome(data) != "plan"


def test_ten_thousand_sealed_mutations_end_in_a_plan_or_a_named_error() -> None:
    generator = random.Random(1)
    blank = GOOD.replace(DIGEST, ZEROS.encode())
    outcomes = [outcome(resealed(mutated(blank, generator))) for _ in range(10_000)]
    # The test is worth something only if many files come through the checksum to the checks behind it.
    assert sum("damaged or altered" not in text for text in outcomes) > 5000
    assert outcomes.count("plan") > 200
    reasons = {re.sub(r"[^a-z ]+", "", text[40:])[:30] for text in outcomes}
    assert len(reasons) > 20
