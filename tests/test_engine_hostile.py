"""Damaged and malicious engine files: each ends in an EngineFileError or a MachineError, before any code is mapped.

Most files here are a real engine whose library was replaced by a short text, so that many can be tried. `signed` gives
an altered file a right digest, as somebody would who means harm: without it, the digest would refuse nearly all, and
the checks behind it would go untested.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bytes import BLANK, EngineBytes, framed, signed
from engines import engine_file
from torch import Tensor

import olss_fast
from olss_fast.engine import compiled, container
from olss_fast.engine import engine as engine_module
from olss_fast.engine.container import Blob
from olss_fast.engine.describe import inspected
from olss_fast.engine.weights import hash_weights
from olss_fast.errors import EngineFileError, MachineError
from olss_fast.plan_io import plan_to_bytes

LIBRARY = b"\x7fELF: no program at all, and nothing that may be run"
REFUSED = (EngineFileError, MachineError)


class Mapped(BaseException):
    """Code would have been mapped into this process. No `except` of the package's own stops it."""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a file, in a folder that is all the place for files that there is, and in which nothing else may be
    written. Whoever would map code gets as far as `Mapped`."""

    def mapped(code: Mapping[str, bytes], weights: Mapping[str, Tensor], device: torch.device) -> None:
        raise Mapped(dict(code), dict(weights))

    whole()  # is built by the code that is replaced here
    monkeypatch.setattr(engine_module, "LoadedCode", mapped)
    monkeypatch.setattr(compiled.torch._C._aoti, "AOTIModelPackageLoader", mapped)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.olss"
    yield path
    assert os.listdir(tmp_path) == [path.name]


@functools.cache
def whole() -> EngineBytes:
    """A real engine, taken apart."""
    data = engine_file("guided").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["olss_fast.engine"]) | {"sha256": BLANK}
    tensors = {}
    for name, row in header.items():
        begin, end = (8 + length + offset for offset in row["data_offsets"])
        tensors[name] = (row["dtype"], row["shape"], data[begin:end])
    return EngineBytes(manifest, tensors)


def light() -> EngineBytes:
    """The same with another library, to be altered."""
    parts = copy.deepcopy(_light())
    assert isinstance(parts.manifest, dict)
    return parts


@functools.cache
def _light() -> EngineBytes:
    parts = EngineBytes(copy.deepcopy(whole().manifest), dict(whole().tensors))
    parts.tensors["code/network.so"] = ("U8", [len(LIBRARY)], LIBRARY)
    return hashed(parts)


def hashed(parts: EngineBytes) -> EngineBytes:
    """With the hashes of its code and weights right again."""
    folders: dict[str, dict[str, Blob]] = {"code": {}, "weights": {}}
    for full, (dtype, shape, content) in parts.tensors.items():
        folder, _, name = full.partition("/")
        if folder in folders:
            folders[folder][name] = Blob(dtype, tuple(shape), memoryview(content))
    code = {name: bytes(blob.data) for name, blob in folders["code"].items()}
    parts.manifest["hashes"] = {"weights": hash_weights(folders["weights"]), "code": compiled.hash_code(code)}
    return parts


def outcome(path: Path, data: bytes) -> str:
    """What became of a file: "refused", or "sound" if only its code was left to be mapped; nothing else may be."""
    path.write_bytes(data)
    try:
        assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f]*", inspected(path))  # nothing that would drive a terminal
    except EngineFileError as error:
        assert_names_it(error)
    try:
        olss_fast.load_engine(path)
    except REFUSED as error:
        assert_names_it(error)
        return "refused"
    except Mapped as reached:
        code, weights = reached.args
        held = light().tensors if len(data) < 10**5 else whole().tensors
        assert code == {"network.so": held["code/network.so"][2]}
        assert {f"weights/{name}" for name in weights} == {name for name in held if name.startswith("weights/")}
        assert all(each.contiguous().numpy().tobytes() == held[f"weights/{name}"][2] for name, each in weights.items())
        return "sound"
    raise AssertionError("an engine was loaded")


def assert_names_it(error: Exception) -> None:
    assert len(str(error)) < 2000
    assert str(error).isprintable()
    assert "hostile.olss" in str(error) or isinstance(error, MachineError)


def test_a_sound_file_is_refused_by_nothing_but_its_code(hostile: Path) -> None:
    assert outcome(hostile, whole().file()) == "sound"
    assert outcome(hostile, light().file()) == "sound"
    assert whole().file() == engine_file("guided").read_bytes()


# --- blindly -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, random_: random.Random, begin: int, end: int) -> bytes:
    place = random_.randrange(begin, end)
    return data[:place] + bytes([data[place] ^ 1 << random_.randrange(8)]) + data[place + 1 :]


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


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "batch", "cuda",
    "float16", "../../x", "/etc/passwd", "\ud800", "\x1b[2J", "x" * 5000, "0" * 64, [], [[]], [0], [1, 2, 3, 4], {},
    {"a": 1}, [{"name": "a"}], ["x"] * 100,
]  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a tree of JSON."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in members:
        yield (*path, key)
        yield from nodes(each, (*path, key))


def altered(tree: Any, random_: random.Random) -> None:
    """One node of the tree replaced, removed, copied or swapped with another."""
    path = random_.choice(list(nodes(tree)))
    *above, key = path
    holder = functools.reduce(lambda value, step: value[step], above, tree)
    what = random_.choice(["replace", "replace", "replace", "remove", "rename", "swap"])
    if what == "replace":
        holder[key] = copy.deepcopy(random_.choice(JUNK))
    elif what == "remove":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[str(random_.choice(JUNK))] = holder.pop(key)
    else:
        other = random_.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]


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


# --- with a purpose ------------------------------------------------------------------------------------------------


def refuses(hostile: Path, data: bytes, message: str, error: type[Exception] = EngineFileError) -> None:
    assert outcome(hostile, data) == "refused"
    with pytest.raises(error, match=message):
        olss_fast.load_engine(hostile)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("version", 2, "written in version 2 of the format; .* reads version 1: build the engine again"),
        ("version", True, "written in version True"),
        ("version", "1", "written in version '1'"),
        ("version", 1.0, "version is 1.0; expected int"),
        ("format", "olss_fast.plan", "its format is 'olss_fast.plan'; expected 'olss_fast.engine'"),
        ("notice", 3, "notice is 3; expected str"),
        ("built_with.torch", None, "built_with.torch is None; expected str"),
        ("built_with.cuda", 12.8, "built_with.cuda is 12.8; expected str or NoneType"),
        ("built_with.more", "1", "built_with has the members .* expected olss_fast, torch"),
        ("machine.device", "xpu", "machine.device is 'xpu'; expected cpu or cuda"),
        ("machine.capability", [9, "0"], "machine.capability is"),
        ("machine.instructions", "avx", "machine.instructions is 'avx'; expected a list"),
        ("machine.instructions", [3], r"machine.instructions\[0\] is 3; expected str"),
        ("dtype", "load", "dtype is 'load'; expected one of float16, bfloat16, float32, float64"),
        ("dtype", "int64", "dtype is 'int64'"),
        ("doubled", 1, "doubled is 1; expected bool"),
        ("doubled", False, r"unconditional arguments \['labels'\] but no guidance|guidance that the engine has not"),
        ("guidance_scale", "1", "guidance_scale is '1'; expected int or float"),
        ("guidance_scale", True, "guidance_scale is True"),
        ("guidance_scale", 1e39, r"guidance_scale is 1e\+39; expected a finite number"),
        ("guidance_scale", 10**400, "guidance_scale is 1000.*expected a finite number"),
        ("profile.min", [1, 2, 8], "its profile is unusable: min, opt and max are"),
        ("profile.min", [], "its profile is unusable: min is"),
        ("profile.min", [0, 2, 8, 8], "its profile is unusable: min is"),
        ("profile.max", [4, 2, 2**31, 24], "its profile is unusable: max is"),
        ("profile.max", [1, 2, 8, 8], "its profile is unusable: axis 0 has min 1, opt 2, max 1"),
        ("profile.multiple", [1, 1, 4, 5], "its profile is unusable: axis 3"),
        ("profile.multiple", [1, 1, 4, 0], "its profile is unusable"),
        ("profile.opt", [2, 2, True, 8], r"profile.opt\[2\] is True; expected int"),
        ("inputs", {}, "inputs is {}; expected a list"),
        ("inputs", [], "unconditional argument 'labels' is none of its inputs"),
        ("inputs.0.dtype", "load", "input 'labels' is 'load'; expected one of"),
        ("inputs.0.dtype", "__class__", "input 'labels' is '__class__'"),
        ("inputs.0.dtype", "int32", "unconditional.*'labels'.* is torch.int64; this engine takes int32"),
        ("inputs.0.shape", ["batch", 7], r"unconditional\['labels'\] has shape \(1,\); expected \(1, 7\)"),
        ("inputs.0.shape", [4], r"unconditional\['labels'\] has shape \(1,\); expected \(4,\)"),
        ("inputs.0.shape", [3, "batch"], "expected sizes, or first 'batch'"),
        ("inputs.0.shape", ["samples"], "expected sizes, or first 'batch'"),
        ("inputs.0.shape", [-1], "expected sizes, or first 'batch'"),
        ("inputs.0.shape", [2**31], "expected sizes, or first 'batch'"),
        ("inputs.0.shape", [None], r"inputs\[0\].shape\[0\] is None; expected int or str"),
        ("inputs.0.name", "", "the inputs are named"),
        ("inputs.0.name", "y", "unconditional argument 'labels' is none of its inputs"),
        ("fixed", {"gain": 1}, "fixed 'gain' is 1; expected a string"),
        ("fixed", [], r"fixed is \[\]; expected dict"),
        ("plans", [], r"it holds the plans|it holds no plan"),
        ("plans.0.name", "three", "the plans are named"),
        ("plans.0.name", "../two", "it holds the plans .*'two'.* and names .*'../two'"),
        ("plans.0.nfe", 3, "its manifest says of a plan .*'nfe': 3.*; the plan is .*'nfe': 2"),
        ("plans.0.branches", 2, "its manifest says of a plan"),
        ("plans.0.noises", 1, "its manifest says of a plan"),
        ("plans.0.sha256", "0" * 64, "its manifest says of a plan"),
        (
            "strides",
            {"into.weight": [1]},
            r"weight 'into.weight' of shape .* has strides \[1\]; expected those of dense",
        ),
        ("strides", {"into.weight": [0, 0, 0, 0]}, "expected those of dense memory"),
        ("strides", {"into.weight": [2**40, 1, 1, 1]}, "expected those of dense memory"),
        ("strides", {"into.weight": [-18, 9, 3, 1]}, "strides of 'into.weight' are"),
        ("strides", {"into.weight": "C"}, "strides of 'into.weight' are 'C'; expected numbers"),
        ("strides", {"idle.weight": [2, 1]}, "it has strides of .*'idle.weight'.*; expected names of its weights"),
        ("unused", [1], r"unused\[0\] is 1; expected str"),
        ("hashes.weights", "0" * 64, "the hash of its weights is .*: altered; build it again"),
        ("hashes.code", "", "the hash of its code is"),
        ("hashes.code", None, "hashes.code is None; expected str"),
        ("measured", {"x": "1"}, "measured.'x' is '1'; expected a finite number"),
        ("measured", {"x": True}, "measured.'x' is True"),
        ("measured", {"x": 10**400}, "measured.'x' is 1000"),
        ("more", 1, "the manifest has the members"),
    ],
    ids=lambda each: repr(each)[:30],
)
def test_manifests_that_say_what_cannot_be(hostile: Path, where: str, value: Any, message: str) -> None:
    parts = light()
    *above, last = (int(each) if each.isdigit() else each for each in where.split("."))
    functools.reduce(lambda tree, key: tree[key], above, parts.manifest)[last] = value
    refuses(hostile, parts.file(), message)


@pytest.mark.parametrize("member", list(EngineBytes().manifest))
def test_every_member_must_be_there(hostile: Path, member: str) -> None:
    parts = light()
    del parts.manifest[member]
    refuses(hostile, parts.file(), "has the members|its format is None|in version None|its sha256 is None")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("machine.system", "Plan9", "built for system Plan9, this is Linux: build the engine again here"),
        ("machine.architecture", "vax", "built for architecture vax, this is"),
        ("machine.instructions", ["avx", "avx1024"], "may use the instructions avx1024, which this processor lacks"),
        ("machine.device", "cuda", "was built for CUDA, and torch"),
        ("built_with.torch", "2.1.0", "built with torch 2.1.0, here is .*: install torch 2.1, or build"),
        ("built_with.torch", "", "built with torch , here is"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for code that wants one")
def test_other_machines_and_versions(hostile: Path, where: str, value: Any, message: str) -> None:
    parts = light()
    holder, last = where.split(".")
    parts.manifest[holder][last] = value
    refuses(hostile, parts.file(), message, MachineError)


def test_all_that_does_not_fit_a_machine_is_named_at_once(hostile: Path) -> None:
    parts = light()
    parts.manifest["machine"] |= {"architecture": "vax", "instructions": ["avx1024"]}
    parts.manifest["built_with"]["torch"] = "1.0"
    refuses(hostile, parts.file(), "architecture vax.*torch 1.0.*avx1024", MachineError)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("notice", "Trust me."),
        ("network", "\x1b]0;another title\x07"),
        ("fixed", {"\n\x1b[2J": "\r"}),
        ("measured", {"milliseconds_per_network_call": 1e-9}),
        ("measured", {}),
        ("unused", []),
        ("guidance_scale", -3),
    ],
)
def test_what_may_be_altered_is_still_shown_without_harm(hostile: Path, member: str, value: Any) -> None:
    """A digest is no signature. None of these changes what is run."""
    parts = light()
    parts.manifest[member] = value
    assert outcome(hostile, parts.file()) == "sound"
    assert "\x1b" not in inspected(hostile)


def with_text(old: str, new: str) -> bytes:
    """The manifest's text itself changed: what json.dumps never writes."""
    parts = light()
    text = json.dumps(parts.manifest)
    assert old in text
    return signed(EngineBytes(text.replace(old, new, 1), parts.tensors).blank())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": NaN', "NaN is not JSON"),
        ('"guidance_scale": 1.5', '"guidance_scale": Infinity', "Infinity is not JSON"),
        ('"guidance_scale": 1.5', '"guidance_scale": 1e999', "guidance_scale is inf; expected a finite"),
        ('"guidance_scale": 1.5', '"guidance_scale": ' + "9" * 5000, "is not valid JSON"),
        ('"version": 1', '"version": 1, "version": 1', "a name occurs twice"),
        ('"unused": [', '"unused": [' + "[" * 100000, "is not valid JSON"),
        ('"unused": [', '"unused": [' + '{"a":' * 900, "is not valid JSON"),
        ('"network": "', '"network": "\\ud800', "is not valid JSON .*ud800"),
        ('"doubled": true', '"doubled": yes', "is not valid JSON"),
        ("{", "[", "is not valid JSON"),
    ],
)
def test_manifests_that_are_no_json(hostile: Path, old: str, new: str, message: str) -> None:
    refuses(hostile, with_text(old, new), message)


def test_deep_but_valid_json(hostile: Path) -> None:
    for depth in (50, 500, 900, 950, 980, 990):
        refuses(
            hostile, with_text('"unused": [', '"unused": [' + "[" * depth + "]" * depth + ", "), "JSON|expected str"
        )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", r"the safetensors header is \[\]; expected a JSON object"),
        (b"{}", "its __metadata__ is None; expected the single entry"),
        (b'{"__metadata__": {}}', "its __metadata__ is {}"),
        (b'{"__metadata__": {"format": "pt"}}', "perhaps a plan or a model and not an engine"),
        (b'{"__metadata__": {"olss_fast.engine": 3}}', "__metadata__ is"),
        (b'{"__metadata__": {"olss_fast.engine": "3"}}', "entry 'olss_fast.engine' is 3; expected a JSON object"),
        (b'{"__metadata__": {"olss_fast.engine": ""}}', "entry 'olss_fast.engine' is not valid JSON"),
        (b'{"a": 1, "a": 2}', "a name occurs twice"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 10**6, "is not valid JSON"),
        (b'{"a":' * 10**6, "is not valid JSON"),
    ],
)
def test_headers_that_are_none(hostile: Path, header: bytes, message: str) -> None:
    refuses(hostile, framed(header, b"data"), message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "is described by None"),
        ({"dtype": "U8", "shape": [1]}, "expected dtype, shape and data_offsets"),
        ({"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": 1}, "expected dtype, shape and data_offsets"),
        ({"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}, "has dtype 'C64'; expected one of F64"),
        ({"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}, "has dtype"),
        ({"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}, "expected sizes"),
        ({"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}, "expected sizes"),
        ({"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}, "expected sizes"),
        ({"dtype": "U8", "shape": "1", "data_offsets": [0, 1]}, "expected sizes"),
        ({"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}, "expected sizes"),
        ({"dtype": "U8", "shape": [2**41], "data_offsets": [0, 2**41]}, "expected sizes"),
        ({"dtype": "U8", "shape": [1] * 17, "data_offsets": [0, 1]}, "expected sizes"),
        ({"dtype": "F64", "shape": [2**30, 2**30, 2**30], "data_offsets": [0, 1]}, "one that a file could hold"),
        ({"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}, "one that a file could hold"),
        ({"dtype": "U8", "shape": [2**39], "data_offsets": [0, 2**39]}, "ends at byte 549755813888 of .*: truncated"),
        ({"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}, "begins at byte 1 of the data; expected 0"),
        ({"dtype": "U8", "shape": [0], "data_offsets": [1, 1]}, "begins at byte 1 of the data; expected 0"),
        ({"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}, "has 2 bytes; its data_offsets are"),
        ({"dtype": "U8", "shape": [2], "data_offsets": [2, 0]}, "has 2 bytes; its data_offsets are"),
        ({"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}, "begins at byte .* expected 5"),
    ],
)
def test_tables_that_do_not_fit_the_data(hostile: Path, row: Any, message: str) -> None:
    parts = light()
    table = parts.table()
    table[next(iter(table))] = row
    refuses(hostile, parts.file(table), message)


def renamed(old: str, new: str) -> EngineBytes:
    parts = light()
    parts.tensors = {new if name == old else name: each for name, each in parts.tensors.items()}
    return hashed(parts)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("code/network.so", "code/../network.so", r"its code is \['../network.so'\]; expected network.so and plain"),
        ("code/network.so", "code//tmp/network.so", "its code is"),
        ("code/network.so", "code/network.so/x", "its code is"),
        ("code/network.so", "code/network", "its code is"),
        ("code/network.so", "../network.so", "it holds the tensor '../network.so'; expected one of code/…"),
        ("code/network.so", "/etc/cron.d/x", "it holds the tensor '/etc/cron.d/x'"),
        ("code/network.so", "network.so", "it holds the tensor 'network.so'"),
        ("code/network.so", "code/", "it holds the tensor 'code/'"),
        ("code/network.so", "", "it holds the tensor ''|expected a name that can be printed"),
        ("plans/two", "plans/../two", "it holds the plans .*'../two'.* and names"),
        ("plans/two", "plans/other", "it holds the plans"),
        ("plans/two", "weights/two", "it holds the plans"),
        ("unconditional/labels", "unconditional/y", "unconditional argument 'y' is none of its inputs"),
        ("weights/time.bias", "weights/a\x00b", "named 'weights/a.x00b'; expected a name that can be printed"),
        ("weights/time.bias", "weights/a\nb", "expected a name that can be printed"),
    ],
)
def test_names_of_tensors(hostile: Path, old: str, new: str, message: str) -> None:
    refuses(hostile, renamed(old, new).file(), message)


@pytest.mark.parametrize("name", ["../evil.so", "/tmp/evil.so", "a/b.cubin", ".hidden", "-x", "a b", "x" * 300, "ü"])
def test_names_of_files_beside_the_code(hostile: Path, name: str) -> None:
    parts = light()
    parts.tensors[f"code/{name}"] = ("U8", [4], b"evil")
    refuses(hostile, hashed(parts).file(), "its code is .*; expected network.so and plain names beside it")


def changed_tensor(name: str, tensor: tuple[str, list[Any], bytes]) -> EngineBytes:
    parts = light()
    parts.tensors[name] = tensor
    return hashed(parts)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("unconditional/labels", ("I32", [1], bytes(4)), r"unconditional\['labels'\] is torch.int32"),
        (
            "unconditional/labels",
            ("I64", [2], bytes(16)),
            r"unconditional\['labels'\] has shape \(2,\); expected \(1,\)",
        ),
        ("unconditional/labels", ("I64", [0], b""), r"unconditional\['labels'\] has shape \(0,\)"),
        ("unconditional/labels", ("I64", [], bytes(8)), r"unconditional\['labels'\] has shape \(\)"),
        ("weights/flag", ("BOOL", [2], b"\x01\x07"), "tensor 'flag' of dtype BOOL holds the byte 7; expected 0 and 1"),
        ("plans/more", ("U8", [4], b"plan"), "it holds the plans .*'more'"),
        ("plans/two", ("U8", [4], b"plan"), "plan two' is no usable plan file: it has 4 bytes"),
        ("plans/two", ("U8", [0], b""), "plan two' is no usable plan file: it has 0 bytes"),
        ("more", ("U8", [4], b"more"), "it holds the tensor 'more'"),
    ],
)
def test_tensors_that_do_not_fit(hostile: Path, name: str, tensor: Any, message: str) -> None:
    refuses(hostile, changed_tensor(name, tensor).file(), message)


def test_weights_and_code_have_hashes_of_their_own(hostile: Path) -> None:
    for name in ("weights/time.bias", "code/network.so"):
        parts = light()
        dtype, shape, content = parts.tensors[name]
        parts.tensors[name] = (dtype, shape, bytes([content[0] ^ 1]) + content[1:])
        refuses(hostile, parts.file(), f"the hash of its {name.partition('/')[0]} is .*: altered")


def with_plan(content: bytes, **facts: Any) -> bytes:
    """Another plan under the name of the third, whose facts in the manifest are made to fit."""
    parts = light().with_plan(content)
    parts.manifest["plans"][1] |= facts | {"sha256": parts.manifest["plans"][0]["sha256"]}
    parts.manifest["plans"][0]["sha256"] = light().manifest["plans"][0]["sha256"]
    return parts.file()


def test_plans_altered_inside(hostile: Path) -> None:
    _, _, content = light().tensors["plans/three"]
    random_ = random.Random(3)
    for _ in range(300):
        refuses(hostile, with_plan(flipped(content, random_, 0, len(content))), "plan three' is no usable plan file")


def test_plans_altered_inside_with_a_right_checksum(hostile: Path) -> None:
    """They are plans, and may be other ones; a plan for two networks cannot be run."""
    from engines import GUIDED

    two = GUIDED["three"].replace(models=[0, 1, 0])
    refuses(hostile, with_plan(plan_to_bytes(two)), "plan 'three' needs more than one network")
    refuses(hostile, with_plan(plan_to_bytes(GUIDED["two"])), "its manifest says of a plan")
    assert outcome(hostile, with_plan(plan_to_bytes(GUIDED["two"]), nfe=2)) == "sound"


def test_a_branched_plan_in_an_engine_without_guidance(hostile: Path) -> None:
    parts = light()
    parts.manifest |= {"doubled": False, "guidance_scale": 1.0}
    parts.tensors.pop("unconditional/labels")
    refuses(hostile, hashed(parts).file(), "plan 'split' needs .* guidance that the engine has not")


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
    "ELF": (lambda: whole().tensors["code/network.so"][2], "announce a header of .* is it an engine file at all"),
    "zip bomb": (zip_bomb, "announce a header of"),
    "pickle": (lambda: b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.", "announce a header of"),
    "JSON": (lambda: json.dumps(light().manifest).encode(), "announce a header of"),
    "plan": (lambda: light().tensors["plans/two"][2], "perhaps a plan or a model and not an engine"),
    "cached code": (lambda: b"".join(container.encode("olss_fast.code", {}, {})), "perhaps a plan or a model"),
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
