"""Loading an engine file: what it costs in memory and on the disk, and weights that its code was not compiled for."""

from __future__ import annotations

import errno
import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from engine_bytes import EngineBytes, framed
from engines import engine_file, tiny_engine

import olss_fast
from olss_fast.engine.compiled import LoadedCode
from olss_fast.engine.describe import inspected
from olss_fast.engine.verifying import verified
from olss_fast.errors import EngineFileError
from olss_fast.support.json import MOST_DEPTH, MOST_PARTS, strict_object

MB = 10**6


def peak_of(path: Path) -> int:
    """Bytes at most while a file is refused. (Not those that torch holds.)"""
    tracemalloc.start()
    try:
        with pytest.raises(EngineFileError):
            verified(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_wrong_sum_is_found_before_the_tensors_are_in_memory(tmp_path: Path) -> None:
    """64 MB behind a right header, of which each processor has a block at a time."""
    engine, size = EngineBytes(), 64 * MB
    engine.tensors["code/more"] = ("U8", [size], bytes(size))
    content = engine.hashed().file()
    (tmp_path / "x.olss").write_bytes(content[:-1] + b"\1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 2)
        assert peak_of(tmp_path / "x.olss") < 8 * MB


@pytest.mark.parametrize("part", ["[[[]]],", "[],", "{},", '{"":[]},', "0,", '"",', '""'])
def test_a_header_of_many_parts_takes_little_memory(tmp_path: Path, part: str) -> None:
    """16 MiB of text were 350 to 860 MB of objects; now the text and what copies of it the reader makes."""
    count = (2**24 - 100) // len(part)
    path = tmp_path / "x.olss"
    path.write_bytes(framed(b"[" + part.encode() * count + b"0]", b""))
    assert peak_of(path) < 100 * MB
    with pytest.raises(EngineFileError, match=f"more than {MOST_PARTS} parts"):
        inspected(path)


def test_what_is_within_the_bounds_is_read() -> None:
    deep = "[" * (MOST_DEPTH - 1) + "]" * (MOST_DEPTH - 1)
    assert strict_object('{"a\\\\": ' + deep + "}")
    flat = [0] * (MOST_PARTS - 2)
    assert strict_object(json.dumps({"[{,": flat})) == {"[{,": flat}
    for text in ('{"a": [' + deep + "]}", json.dumps({"a": [*flat, 0, 0]})):
        with pytest.raises(ValueError, match=r"nested more than|parts"):
            strict_object(text)


@pytest.mark.parametrize("number", ["-0", str(2**63), str(-(2**63) - 1), "1e400", "-1e400", "1e-400", "0.001e-400"])
def test_numbers_that_readers_do_not_agree_about(number: str) -> None:
    with pytest.raises(ValueError, match=r"64 bits|out of range"):
        strict_object(f'{{"a": {number}}}')


def test_other_numbers_are_read() -> None:
    text = '{"a": [0, -1, 9223372036854775807, 0.0, -0.0, 0e5, 5e-324, 1.7e308]}'
    assert strict_object(text)["a"] == [0, -1, 2**63 - 1, 0.0, -0.0, 0.0, 5e-324, 1.7e308]


# --- the folder for temporary files ----------------------------------------------------------------------------------


def test_a_full_folder_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    size = sum(map(len, tiny_engine("plain")._code.values()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("zipfile.ZipFile.writestr", full)
    message = f"cannot write {size} bytes to the folder for temporary files, '{tmp_path}': the disk is full.*TMPDIR"
    with pytest.raises(EngineFileError, match=message):
        olss_fast.load_engine(engine_file("plain"))
    assert list(tmp_path.iterdir()) == []


def test_no_folder_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = engine_file("plain")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(
        EngineFileError, match=r"the folder for temporary files, .*none': no such file or folder.*TMPDIR"
    ):
        olss_fast.load_engine(path)


# --- weights ---------------------------------------------------------------------------------------------------------


def weight(dtype: str, shape: list[int], content: bytes) -> bytes:
    """The "plain" engine with another bias, every checksum right."""
    engine = EngineBytes.of(engine_file("plain"))
    engine.tensors["weights/into.bias"] = (dtype, shape, content)
    return engine.hashed().file()


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", [1], 4), ("F32", [0], 0), ("F32", [4, 1], 16), ("F16", [4], 8), ("F32", [8], 32)],
)
def test_weights_of_another_shape_are_never_run(tmp_path: Path, dtype: str, shape: list[int], size: int) -> None:
    path = tmp_path / "x.olss"
    path.write_bytes(weight(dtype, shape, bytes(size)))
    for read in (verified, olss_fast.load_engine):
        with pytest.raises(EngineFileError, match=r"weight 'into.bias' is .* compiled for 'F32' of shape \[4\]"):
            read(path)


def test_another_value_is_a_weight_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "x.olss").write_bytes(weight("F32", [4], bytes(16)))
    assert torch.equal(olss_fast.load_engine(tmp_path / "x.olss").weights["into.bias"], torch.zeros(4))


def test_code_is_handed_no_other_weights_by_whoever_loads_it() -> None:
    engine = tiny_engine("plain")
    weights = {**engine.weights, "into.bias": torch.zeros(1)}
    with pytest.raises(EngineFileError, match=r"code cannot be run: its weight 'into.bias' is 'F32' of shape \[1\]"):
        LoadedCode(engine._code, weights, engine.device)
