"""Engine files altered with a purpose, their digest made right again: each is refused by a message of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bytes import EngineBytes, framed, put, signed
from engines import GUIDED
from hostile_engines import flipped, light, nothing_mapped, outcome, refuses

from olss_fast.engine.describe import inspected
from olss_fast.errors import MachineError
from olss_fast.plan.file import plan_to_bytes


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    with nothing_mapped(tmp_path) as path:
        yield path


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("version", 1, "in version 1 of the format, by an older olss_fast; .* reads version 2: make"),
        ("version", 3, "in version 3 of the format, by a newer olss_fast; .* reads version 2: make"),
        ("version", True, "version is True; expected a positive integer"),
        ("version", "2", "version is '2'; expected a positive integer"),
        ("version", 2.0, "version is 2.0; expected a positive integer"),
        ("format", "olss_fast.plan", "its format is 'olss_fast.plan'; expected 'olss_fast.engine'"),
        ("notice", 3, "the manifest's notice is 3; expected a string"),
        ("built_with.torch", None, "built_with.torch is None; expected a string"),
        ("built_with.cuda", 12.8, "built_with.cuda is 12.8; expected a string or null"),
        ("built_with.more", "1", "built_with has the unknown member 'more'; expected exactly the members cuda, dr"),
        ("machine.device", "xpu", "machine.device is 'xpu'; expected one of cpu, cuda"),
        ("machine.capability", [9, "0"], "machine.capability is"),
        ("machine.instructions", "avx", "machine.instructions is 'avx'; expected a list"),
        ("machine.instructions", [3], r"machine.instructions\[0\] is 3; expected a string"),
        ("dtype", "load", "dtype is 'load'; expected one of float16, bfloat16, float32, float64"),
        ("dtype", "int64", "dtype is 'int64'"),
        ("doubled", 1, "doubled is 1; expected true or false"),
        (
            "doubled",
            False,
            r"unconditional arguments \['labels'\] but no guidance|guidance, which this engine does not have",
        ),
        ("guidance_scale", "1", "guidance_scale is '1'; expected a finite number"),
        ("guidance_scale", True, "guidance_scale is True"),
        ("guidance_scale", 1e39, r"guidance_scale is 1e\+39; expected a finite number"),
        ("guidance_scale", 10**400, "the number '1000.* is no integer of 64 bits|is not valid JSON"),
        ("profile.min", [1, 2, 8], "its profile is unusable: min, opt and max are"),
        ("profile.min", [], "its profile is unusable: min is"),
        ("profile.min", [0, 2, 8, 8], "its profile is unusable: min is"),
        ("profile.max", [4, 2, 2**31, 24], "its profile is unusable: max is"),
        ("profile.max", [1, 2, 8, 8], "its profile is unusable: axis 0 has min 1, opt 2, max 1"),
        ("profile.multiple", [1, 1, 4, 5], "its profile is unusable: axis 3"),
        ("profile.multiple", [1, 1, 4, 0], "its profile is unusable"),
        ("profile.opt", [2, 2, True, 8], r"profile.opt\[2\] is True; expected a whole number"),
        ("inputs", {}, "inputs is {}; expected a list"),
        ("inputs", [], "unconditional argument 'labels' is none of its inputs"),
        ("inputs.0.dtype", "load", r"the manifest's inputs\[0\].dtype is 'load'; expected one of"),
        ("inputs.0.dtype", "__class__", r"inputs\[0\].dtype is '__class__'"),
        ("inputs.0.dtype", "int32", "unconditional.*'labels'.* is torch.int64; this engine takes int32"),
        ("inputs.0.shape", ["batch", 7], r"unconditional\['labels'\] has shape \(1,\); expected \(1, 7\)"),
        ("inputs.0.shape", [4], r"unconditional\['labels'\] has shape \(1,\); expected \(4,\)"),
        ("inputs.0.shape", [3, "batch"], "expected sizes, the first of which may be 'batch'"),
        ("inputs.0.shape", ["samples"], "expected sizes, the first of which may be 'batch'"),
        ("inputs.0.shape", [-1], "expected sizes, the first of which may be 'batch'"),
        ("inputs.0.shape", [2**31], "expected sizes, the first of which may be 'batch'"),
        ("inputs.0.shape", [None], r"inputs\[0\].shape is \[None\]; expected sizes, the first of which may be 'batch'"),
        ("inputs.0.name", "", "the inputs are named"),
        ("inputs.0.name", "y", "unconditional argument 'labels' is none of its inputs"),
        ("fixed", {"gain": 1}, "fixed.'gain' is 1; expected a string"),
        ("fixed", [], r"fixed is \[\]; expected an object"),
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
            r"'into.weight' is 'F32' .* with strides \[1\] and its code was compiled for",
        ),
        ("strides", {"into.weight": [-18, 9, 3, 1]}, "strides.'into.weight' is"),
        ("strides", {"into.weight": "C"}, "strides.'into.weight' is 'C'; expected a list of whole numbers"),
        ("strides", {"idle.weight": [2, 1]}, "it has strides of .*'idle.weight'.*; expected names of its weights"),
        ("unused", [1], r"unused\[0\] is 1; expected a string"),
        ("tied", {"a": 1}, "tied.'a' is 1; expected a string"),
        ("tied", [], r"tied is \[\]; expected an object"),
        ("hashes.weights", "0" * 64, "the hash of its weights is .*: altered; build it again"),
        ("hashes.code", "", "the hash of its code is"),
        ("hashes.code", None, "hashes.code is None; expected a string"),
        ("measured", {"x": "1"}, "measured.'x' is '1'; expected a finite number"),
        ("measured", {"x": True}, "measured.'x' is True"),
        ("measured", {"x": 10**400}, "is not valid JSON"),
        ("more", 1, "the manifest has the unknown member 'more'"),
    ],
    ids=lambda each: repr(each)[:30],
)
def test_manifests_that_say_what_cannot_be(hostile: Path, where: str, value: Any, message: str) -> None:
    put((parts := light()).manifest, where, value)
    refuses(hostile, (parts.bound() if where.startswith(("inputs", "doubled")) else parts).file(), message)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("dtype", "float64"),
        ("profile.max", [8, 2, 16, 24]),
        ("profile.multiple", [1, 1, 2, 2]),
        ("doubled", False),
        ("inputs.0.dtype", "int32"),
        ("inputs.0.shape", ["batch", 1]),
        ("inputs.0.shape", [1]),
        ("inputs", []),
        ("machine.device", "cuda"),
    ],
)
def test_manifests_that_the_code_was_not_compiled_for(hostile: Path, where: str, value: Any) -> None:
    put((parts := light()).manifest, where, value)
    name = where.removeprefix("machine.").partition(".")[0]
    refuses(hostile, parts.hashed().file(), f"its {name} is .* and its code was compiled for .*: build it again")


@pytest.mark.parametrize("member", list(EngineBytes().manifest))
def test_every_member_must_be_there(hostile: Path, member: str) -> None:
    parts = light()
    del parts.manifest[member]
    refuses(hostile, parts.file(), "has no member|its format is None|its version is None|its first member is")


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
    refuses(hostile, parts.bound().file(), message, MachineError)


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
        ("tied", {"second": "of nothing"}),
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
        ('"version": 2', '"version": NaN', "NaN is not JSON"),
        ('"guidance_scale": 1.5', '"guidance_scale": Infinity', "Infinity is not JSON"),
        ('"guidance_scale": 1.5', '"guidance_scale": 1e999', "the number '1e999' is out of range"),
        ('"guidance_scale": 1.5', '"guidance_scale": ' + "9" * 5000, "is not valid JSON"),
        ('"version": 2', '"version": 2, "version": 2', "a name occurs twice"),
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
        nested = with_text('"unused": [', '"unused": [' + "[" * depth + "]" * depth + ", ")
        refuses(hostile, nested, "JSON|expected a string")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", r"the safetensors header is \[\]; expected a JSON object"),
        (b"{}", "its __metadata__ is None; expected the single entry"),
        (b'{"__metadata__": {}}', "its __metadata__ is {}"),
        (b'{"__metadata__": {"format": "pt"}}', "perhaps a model, and no engine file"),
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
    return parts.hashed()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "code/network.so",
            "code/../network.so",
            r"its code is \['../network.so', 'weights.json'\]; expected network.so, weights.json and plain",
        ),
        ("code/network.so", "code//etc/network.so", "its code is"),
        ("code/network.so", "code/network.so/x", "its code is"),
        ("code/network.so", "code/network", "its code is"),
        ("code/network.so", "../network.so", "it holds the tensor '../network.so'; expected one of code/…"),
        ("code/network.so", "/etc/cron.d/x", "it holds the tensor '/etc/cron.d/x'"),
        ("code/network.so", "network.so", "it holds the tensor 'network.so'"),
        ("code/network.so", "code/", "it holds the tensor 'code/'"),
        ("code/network.so", "", "it holds the tensor ''|expected a name that can be printed"),
        ("plans/two", "plans/../two", "it holds the plans .*'../two'.* and names"),
        ("plans/two", "plans/other", "it holds the plans"),
        ("plans/two", "weights/two", "its weight .two. is .* compiled for none"),
        ("unconditional/labels", "unconditional/y", "unconditional argument 'y' is none of its inputs"),
        ("weights/time.bias", "weights/a\x00b", "named 'weights/a.x00b'; expected a name that can be printed"),
        ("weights/time.bias", "weights/a\nb", "expected a name that can be printed"),
    ],
)
def test_names_of_tensors(hostile: Path, old: str, new: str, message: str) -> None:
    refuses(hostile, renamed(old, new).file(), message)


@pytest.mark.parametrize("name", ["../evil.so", "/etc/evil.so", "a/b.cubin", ".hidden", "-x", "a b", "x" * 300, "ü"])
def test_names_of_files_beside_the_code(hostile: Path, name: str) -> None:
    parts = light()
    parts.tensors[f"code/{name}"] = ("U8", [4], b"evil")
    refuses(hostile, parts.hashed().file(), "its code is .*; expected network.so, weights.json and plain names")


def changed_tensor(name: str, tensor: tuple[str, list[Any], bytes]) -> EngineBytes:
    parts = light()
    parts.tensors[name] = tensor
    return parts.hashed()


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
        ("plans/more", ("U8", [4], b"plan"), "it holds the plans .*'more'"),
        ("plans/two", ("U8", [4], b"plan"), "plan two' is no usable plan file: it has 4 bytes"),
        ("plans/two", ("U8", [0], b""), "plan two' is no usable plan file: it has 0 bytes"),
        ("more", ("U8", [4], b"more"), "it holds the tensor 'more'"),
    ],
)
def test_tensors_that_do_not_fit(hostile: Path, name: str, tensor: Any, message: str) -> None:
    refuses(hostile, changed_tensor(name, tensor).file(), message)


def with_layout(name: str, entry: dict[str, Any], tensor: tuple[str, list[Any], bytes]) -> bytes:
    """Another weight, and the layout that fits it."""
    parts = light()
    layout = json.loads(parts.tensors["code/weights.json"][2])
    layout["weights"][name] = entry
    text = json.dumps(layout).encode()
    parts.tensors |= {"code/weights.json": ("U8", [len(text)], text), f"weights/{name}": tensor}
    if entry["strides"] is not None:
        parts.manifest["strides"][name] = entry["strides"]
    return parts.hashed().file()


def test_layouts_that_no_memory_has(hostile: Path) -> None:
    flag = {"dtype": "BOOL", "shape": [2], "strides": None}
    said = "tensor 'flag' of dtype BOOL holds the byte 7; expected 0 and 1"
    refuses(hostile, with_layout("flag", flag, ("BOOL", [2], b"\x01\x07")), said)
    tensor = light().tensors["weights/into.weight"]
    for strides in ([1], [0, 0, 0, 0], [2**40, 1, 1, 1]):
        entry = {"dtype": "F32", "shape": tensor[1], "strides": strides}
        said = "weight 'into.weight' of shape .* has strides .*; expected those of dense memory"
        refuses(hostile, with_layout("into.weight", entry, tensor), said)


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
    draws = random.Random(3)
    for _ in range(300):
        refuses(hostile, with_plan(flipped(content, draws, 0, len(content))), "plan three' is no usable plan file")


def test_plans_altered_inside_with_a_right_checksum(hostile: Path) -> None:
    """They are plans, and may be other ones; a plan for two networks cannot be run."""
    two = GUIDED["three"].replace(models=[0, 1, 0])
    refuses(hostile, with_plan(plan_to_bytes(two)), "plan 'three' needs more than one network")
    refuses(hostile, with_plan(plan_to_bytes(GUIDED["two"])), "its manifest says of a plan")
    assert outcome(hostile, with_plan(plan_to_bytes(GUIDED["two"]), nfe=2)) == "sound"


def test_a_branched_plan_in_an_engine_without_guidance(hostile: Path) -> None:
    parts = light()
    parts.manifest |= {"doubled": False, "guidance_scale": 1.0}
    parts.tensors.pop("unconditional/labels")
    refuses(hostile, parts.bound().file(), "plan 'split' needs .* guidance, which this engine does not have")
