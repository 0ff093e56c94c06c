"""Engine files written by hand from the format's specification, to be damaged. Nothing in them can be run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import GUIDED

from olss_fast.plan.file import plan_to_bytes

BLANK = "0" * 64
PIECE = 16 * 2**20
PLAN = GUIDED["three"]
PLAN_BYTES = plan_to_bytes(PLAN)


def digest(data: bytes) -> str:
    pieces = [data[begin : begin + PIECE] for begin in range(0, len(data), PIECE)]
    sums = [hashlib.sha256(piece).digest() for piece in pieces]
    return sums[0].hex() if len(sums) == 1 else hashlib.sha256(b"".join(sums)).hexdigest()


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def signed(blank: bytes) -> bytes:
    """The file with its own digest in the first place where 64 zeros are; those that have none stay as they are."""
    return blank.replace(BLANK.encode(), digest(blank).encode(), 1)


def framed(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


MANIFEST: dict[str, Any] = {
    "sha256": BLANK,
    "format": "olss_fast.engine",
    "version": 2,
    "notice": "This file contains machine code.",
    "built_with": {"olss_fast": "0.1.0", "torch": "2.13.0+cpu", "triton": None, "cuda": None, "driver": None},
    "machine": {
        "device": "cpu",
        "name": "Some processor",
        "system": "Linux",
        "architecture": "x86_64",
        "capability": None,
        "instructions": ["fma"],
    },
    "network": "Network",
    "dtype": "float32",
    "profile": {"min": [1, 1, 8, 8], "opt": [2, 1, 8, 8], "max": [4, 1, 8, 8], "multiple": [1, 1, 8, 8]},
    "doubled": True,
    "guidance_scale": 1.5,
    "inputs": [{"name": "labels", "dtype": "int64", "shape": ["batch"]}],
    "fixed": {"return_dict": "False"},
    "plans": [
        {
            "name": "three",
            "nfe": PLAN.nfe,
            "branches": PLAN.branches,
            "noises": PLAN.noises,
            "sha256": hashlib.sha256(PLAN_BYTES).hexdigest(),
        }
    ],
    "strides": {"conv.weight": [9, 1, 3, 1]},
    "unused": ["idle"],
    "tied": {},
    "hashes": {"weights": "1" * 64, "code": "2" * 64},
    "measured": {"seconds_to_compile": 1, "largest_difference": 1.5e-6},
}


WEIGHTS = {"conv.weight": {"dtype": "F32", "shape": [1, 1, 3, 3], "strides": [9, 1, 3, 1]}}


def compiled_for(manifest: Mapping[str, Any], weights: object = WEIGHTS) -> bytes:
    """What lies beside code that was compiled for all that the manifest says, and for these weights."""
    facts = {name: manifest[name] for name in ("dtype", "profile", "doubled", "inputs")}
    return json.dumps({"device": manifest["machine"]["device"], **facts, "weights": weights}).encode()


LAYOUT = compiled_for(MANIFEST)


@dataclass
class EngineBytes:
    """An engine file in parts. `manifest` may be text, for what json.dumps never writes."""

    manifest: dict[str, Any] | str = field(default_factory=lambda: copy.deepcopy(MANIFEST))
    tensors: dict[str, tuple[str, list[Any], bytes]] = field(
        default_factory=lambda: {
            "code/network.so": ("U8", [40], b"\x7fELF" + b"no program at all".ljust(36, b".")),
            "code/weights.json": ("U8", [len(LAYOUT)], LAYOUT),
            "plans/three": ("U8", [len(PLAN_BYTES)], PLAN_BYTES),
            "unconditional/labels": ("I64", [1], (3).to_bytes(8, "little")),
            "weights/conv.weight": ("F32", [1, 1, 3, 3], bytes(range(36))),
        }
    )

    @classmethod
    def of(cls, path: Path) -> EngineBytes:
        """The parts of a file, its digest blank again."""
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        manifest = json.loads(header.pop("__metadata__")["olss_fast.engine"])
        tensors = {
            name: (row["dtype"], row["shape"], content[end + row["data_offsets"][0] : end + row["data_offsets"][1]])
            for name, row in header.items()
        }
        return cls({**manifest, "sha256": BLANK}, tensors)

    def bound(self) -> EngineBytes:
        """With code that was compiled for what its manifest says."""
        assert isinstance(self.manifest, dict)
        layout = compiled_for(self.manifest, json.loads(self.tensors["code/weights.json"][2])["weights"])
        self.tensors["code/weights.json"] = ("U8", [len(layout)], layout)
        return self.hashed()

    def hashed(self) -> EngineBytes:
        """With the hashes of its code and weights right again."""
        assert isinstance(self.manifest, dict)
        self.manifest["hashes"] = {"weights": self._weights_hash(), "code": self._code_hash()}
        return self

    def _weights_hash(self) -> str:
        rows = [
            f"{name} {dtype} {list(shape)} {hashlib.sha256(content).hexdigest()}\n"
            for name, (dtype, shape, content) in self._folder("weights")
        ]
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    def _code_hash(self) -> str:
        parts = [f"{name} {len(content)}\n".encode() + content for name, (_, _, content) in self._folder("code")]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _folder(self, folder: str) -> list[tuple[str, tuple[str, list[Any], bytes]]]:
        return sorted((name[len(folder) + 1 :], each) for name, each in self.tensors.items() if name.startswith(folder))

    def table(self) -> dict[str, Any]:
        rows, end = {}, 0
        for name, (dtype, shape, content) in self.tensors.items():
            begin, end = end, end + len(content)
            rows[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        return rows

    @property
    def data(self) -> bytes:
        return b"".join(content for _, _, content in self.tensors.values())

    def header(self, table: Mapping[str, Any] | None = None) -> bytes:
        manifest = self.manifest if isinstance(self.manifest, str) else _compact(self.manifest)
        rows = self.table() if table is None else table
        return _compact({"__metadata__": {"olss_fast.engine": manifest}, **rows}).encode()

    def blank(self, table: Mapping[str, Any] | None = None) -> bytes:
        return framed(self.header(table), self.data)

    def file(self, table: Mapping[str, Any] | None = None) -> bytes:
        return signed(self.blank(table))

    def with_plan(self, content: bytes) -> EngineBytes:
        """Another plan file under the same name, with the right hash."""
        self.tensors["plans/three"] = ("U8", [len(content)], content)
        assert isinstance(self.manifest, dict)
        self.manifest["plans"][0]["sha256"] = hashlib.sha256(content).hexdigest()
        return self


MANIFEST["hashes"] = EngineBytes().hashed().manifest["hashes"]  # type: ignore[index]


def put(tree: Any, where: str, value: Any) -> None:
    """Sets the place "a.0.b" of nested dicts and lists."""
    *above, last = (int(each) if each.isdigit() else each for each in where.split("."))
    functools.reduce(lambda part, key: part[key], above, tree)[last] = value
