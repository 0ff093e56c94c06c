"""Damaged engine files, more than 10,000 of them, and files of other kinds: each is refused before any code is mapped.

With a wrong digest all are refused. With the digest made right again, texts for people and figures may differ, and
code, weights and plans may not.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_bytes import signed
from engine_mutants import altered
from engines import engine_file
from hostile_engines import Mapped, flipped, light, nothing_mapped, outcome, whole

import olss_fast
from olss_fast.engine import cache
from olss_fast.engine.describe import inspected
from olss_fast.errors import EngineFileError
from olss_fast.support import container


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    with nothing_mapped(tmp_path) as path:
        yield path


def test_a_sound_file_is_refused_by_nothing_but_its_code(hostile: Path) -> None:
    assert outcome(hostile, whole().file()) == "sound"
    assert outcome(hostile, light().file()) == "sound"
    assert whole().file() == engine_file("guided").read_bytes()


# --- blindly -------------------------------------------------------------------------------------------------------


def cut(data: bytes, random_: random.Random) -> tuple[int, int]:
    begin = random_.randrange(len(data))
    return begin, min(len(data), begin + random_.choice([1, 8, 64, 1000]))


def swapped(data: bytes, random_: random.Random) -> bytes:
    size = random_.choice([1, 8, 64, 512])
    first, second = sorted(random_.sample(range(0, len(data) - size, size), 2))
    middle = data[first + size : second]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]


def without(data: bytes, random_: random.Random) -> bytes:
    begin, end = cut(data, random_)
    return data[:begin] + data[end:]


def zeroed(data: bytes, random_: random.Random) -> bytes:
    begin, end = cut(data, random_)
    return data[:begin] + bytes(end - begin) + data[end:]


def inserted(data: bytes, random_: random.Random) -> bytes:
    place = random_.choice([0, 8, len(data), random_.randrange(len(data))])
    return data[:place] + random_.randbytes(random_.choice([1, 8, 100])) + data[place:]


def relengthened(data: bytes, random_: random.Random) -> bytes:
    old = int.from_bytes(data[:8], "little")
    near = [max(0, old + step) for step in range(-40, 41) if step]
    new = random_.choice([*near, 0, 1, len(data), len(data) - 8, 2**24, 2**24 + 1, 2**40, 2**63, 2**64 - 1])
    return new.to_bytes(8, "little") + data[8:]


BLIND: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit of the header": lambda data, random_: flipped(data, random_, 0, 8 + int.from_bytes(data[:8], "little")),
    "a bit of the data": lambda data, random_: flipped(
        data, random_, 8 + int.from_bytes(data[:8], "little"), len(data)
    ),
    "truncated": lambda data, random_: data[: random_.randrange(len(data))],
    "without a stretch": without,
    "with a stretch of zeros": zeroed,
    "with a stretch more": inserted,
    "with two blocks swapped": swapped,
    "with another header length": relengthened,
}


@pytest.mark.parametrize("how", BLIND)
def test_damaged_files(hostile: Path, how: str) -> None:
    random_, data = random.Random(how), light().file()
    damaged = [each for _ in range(800) if (each := BLIND[how](data, random_)) != data]
    assert len(damaged) > 700
    assert Counter(outcome(hostile, each) for each in damaged) == {"refused": len(damaged)}


@pytest.mark.parametrize("how", BLIND)
def test_damaged_files_of_full_size(hostile: Path, how: str) -> None:
    random_, data = random.Random(how), whole().file()
    assert {outcome(hostile, each) for _ in range(5) if (each := BLIND[how](data, random_)) != data} == {"refused"}


@pytest.mark.parametrize("how", BLIND)
def test_damaged_files_with_a_right_digest(hostile: Path, how: str) -> None:
    """Free are texts for people, figures, sizes, and the default arguments. Code, weights and plans have hashes of
    their own: none of these was altered in what would be mapped."""
    random_, blank = random.Random(how), light().blank()
    found = Counter(outcome(hostile, signed(BLIND[how](blank, random_))) for _ in range(300))
    assert found["refused"] >= 150
    assert sum(found.values()) == 300


def test_altered_manifests_with_a_right_digest(hostile: Path) -> None:
    random_, found = random.Random(1), Counter[str]()
    for _ in range(1200):
        parts = light()
        for _ in range(random_.choice([1, 1, 2])):
            altered(parts.manifest, random_)
        found[outcome(hostile, parts.file())] += 1
    assert found["refused"] > 800
    assert found["sound"] > 20


def test_altered_tables_with_a_right_digest(hostile: Path) -> None:
    random_, found = random.Random(2), Counter[str]()
    original = light().table()
    for _ in range(1000):
        parts, table = light(), light().table()
        altered(table, random_)
        if list(table.items()) != list(original.items()):
            found[outcome(hostile, parts.file(table))] += 1
    # The same tensor under another name, or of another shape of as many bytes, has another hash.
    assert found == {"refused": found.total()}
    assert found.total() > 800


# --- no engine files at all ----------------------------------------------------------------------------------------


def refused_both_ways(path: Path, message: str) -> None:
    for read in (olss_fast.load_engine, inspected):
        with pytest.raises(EngineFileError, match=message):
            read(path)


def zip_bomb() -> bytes:
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("manifest.json", "../../code/network.so", "data.pkl"):
                archive.writestr(name, bytes(20 * 2**20))
        file.seek(0)
        return file.read()


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it has 0 bytes; a safetensors file begins with 8 bytes"),
    "short": (lambda: b"1234567", "it has 7 bytes"),
    "no header": (lambda: bytes(8), "is not valid JSON"),
    "zeros": (lambda: bytes(10**6), "is not valid JSON"),
    "ELF": (lambda: whole().tensors["code/network.so"][2], "announce a header of .* is it a safetensors file at all"),
    "zip bomb": (zip_bomb, "announce a header of"),
    "pickle": (lambda: b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.", "announce a header of"),
    "JSON": (lambda: json.dumps(light().manifest).encode(), "announce a header of"),
    "plan": (lambda: light().tensors["plans/two"][2], "perhaps a model, and no engine file"),
    "cached code": (lambda: b"".join(container.encode(cache.FORMAT, {}, {})), "perhaps a model, and no engine file"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_other_kinds(hostile: Path, what: str) -> None:
    content, message = OTHERS[what]
    hostile.write_bytes(content())
    refused_both_ways(hostile, message)


def test_what_is_no_file(hostile: Path) -> None:
    refused_both_ways(hostile, "o such file")
    hostile.mkdir()
    refused_both_ways(hostile, "a folder")
    hostile.rmdir()
    os.mkfifo(hostile)  # opening it would wait for ever
    refused_both_ways(hostile, "pipe")
    hostile.unlink()
    hostile.symlink_to(hostile)
    refused_both_ways(hostile, "symbolic links")
    refused_both_ways(Path("a\0b"), "null byte")


@pytest.mark.parametrize("announced", [0, 2**24, 2**24 + 1, 10**11])
def test_huge_sparse_files_are_not_read(hostile: Path, announced: int) -> None:
    """100 GB that take no room on the disk, and would in memory."""
    with hostile.open("wb") as file:
        file.write(announced.to_bytes(8, "little"))
        file.truncate(100 * 2**30)
    refused_both_ways(hostile, "header")


def test_a_link_to_an_engine_is_one(hostile: Path) -> None:
    hostile.symlink_to(engine_file("guided"))
    with pytest.raises(Mapped):
        olss_fast.load_engine(hostile)
