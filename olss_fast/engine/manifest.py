"""The description of an engine file: the entry of its container (`support.container`).

The names below are those in the file. Every member is required, and no others are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olss_fast.compiling.shapes import DTYPES, Profile
from olss_fast.errors import EngineFileError, InputError
from olss_fast.support import container
from olss_fast.support.container import MOST_AXES, Format, refuse
from olss_fast.support.files import AnyPath
from olss_fast.support.text import quoted

FORMAT = Format("olss_fast.engine", 2, "engine file", EngineFileError)  # 2: code has its own description
NOTICE = (
    "This file contains machine code, which runs when the file is loaded. Load only what comes from somebody you trust."
)
INPUT_DTYPES = (*DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool")
BATCH = "batch"  # the size of an input's first axis, if that is the number of samples
CODE_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")

_OPTIONAL = (str, type(None))
# What each member must be: a type or several, [what each item is], or a mapping of members; _Any maps any names.
_SCHEMA: dict[str, Any] = {
    "sha256": str,
    "format": str,
    "version": int,
    "notice": str,
    "built_with": {"olss_fast": str, "torch": str, "triton": _OPTIONAL, "cuda": _OPTIONAL, "driver": _OPTIONAL},
    "machine": {
        "device": str,
        "name": str,
        "system": str,
        "architecture": str,
        "capability": (list, type(None)),
        "instructions": [str],
    },
    "network": str,
    "dtype": str,
    "profile": {"min": [int], "opt": [int], "max": [int], "multiple": [int]},
    "doubled": bool,
    "guidance_scale": (int, float),
    "inputs": [{"name": str, "dtype": str, "shape": [(int, str)]}],
    "fixed": dict,
    "plans": [{"name": str, "nfe": int, "branches": int, "noises": int, "sha256": str}],
    "strides": dict,
    "unused": [str],
    "tied": dict,
    "hashes": {"weights": str, "code": str},
    "measured": dict,
}


@dataclass(frozen=True)
class Input:
    """One argument of the network: its dtype and shape, whose first size is BATCH if it is per sample."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def per_sample(self) -> bool:
        return self.shape[:1] == (BATCH,)


@dataclass(frozen=True)
class Manifest:
    """A checked manifest; `facts` are all its members as in the file."""

    facts: Mapping[str, Any]
    profile: Profile
    inputs: tuple[Input, ...]

    @property
    def dtype(self) -> str:
        return str(self.facts["dtype"])

    @property
    def device(self) -> str:
        """The kind of device: "cpu" or "cuda"."""
        return str(self.facts["machine"]["device"])

    @property
    def doubled(self) -> bool:
        return bool(self.facts["doubled"])

    @property
    def guidance_scale(self) -> float:
        return float(self.facts["guidance_scale"])

    @property
    def plan_names(self) -> list[str]:
        return [plan["name"] for plan in self.facts["plans"]]

    @property
    def size_names(self) -> str:
        """The inputs as text, with dtypes and shapes."""
        return ", ".join(f"{each.name} {each.dtype}[{', '.join(map(str, each.shape))}]" for each in self.inputs)


def compiled_for(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The members that compiled code relies on. They are also stored beside the code (`weights`), and must match."""
    relied_on = {name: facts[name] for name in ("dtype", "profile", "doubled", "inputs")}
    return {"device": facts["machine"]["device"], **relied_on}


def read(path: AnyPath) -> Manifest:
    """The manifest of an engine file, from its header only. Raises EngineFileError."""
    with container.naming(path, FORMAT):
        return parse(container.read_header(path, FORMAT)[0])


def parse(facts: Mapping[str, Any]) -> Manifest:
    """Checks every member. Raises `container.Refused`."""
    _check(facts, _SCHEMA, "the manifest")
    _check_values(facts)
    try:
        profile = Profile(**facts["profile"])
    except InputError as cause:
        refuse(f"its profile is unusable: {cause}")
    if len(profile.min) > MOST_AXES:
        refuse(f"its profile has {len(profile.min)} axes; expected at most {MOST_AXES}")
    inputs = tuple(Input(each["name"], each["dtype"], tuple(each["shape"])) for each in facts["inputs"])
    return Manifest(facts, profile, inputs)


def _check(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            refuse(f"{where} is {quoted(value)}; expected an object")
        if differs := set(value) ^ set(expected):
            name = min(differs)
            how = "no member" if name in expected else "the unknown member"
            refuse(f"{where} has {how} {quoted(name)}; expected exactly the members {', '.join(sorted(expected))}")
        for name, each in expected.items():
            _check(value[name], each, name if where == "the manifest" else f"{where}.{name}")
    elif isinstance(expected, list):
        if not isinstance(value, list):
            refuse(f"{where} is {quoted(value)}; expected a list")
        for i, each in enumerate(value):
            _check(each, expected[0], f"{where}[{i}]")
    elif not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        names = expected if isinstance(expected, tuple) else (expected,)
        refuse(f"{where} is {quoted(value)}; expected {' or '.join(each.__name__ for each in names)}")


def _check_values(facts: Mapping[str, Any]) -> None:
    machine = facts["machine"]
    if machine["device"] not in ("cpu", "cuda"):
        refuse(f"machine.device is {quoted(machine['device'])}; expected cpu or cuda")
    if machine["capability"] is not None and not container.naturals(machine["capability"]):
        refuse(f"machine.capability is {quoted(machine['capability'])}; expected two numbers, as [9, 0]")
    if facts["dtype"] not in DTYPES:
        refuse(f"dtype is {quoted(facts['dtype'])}; expected one of {', '.join(DTYPES)}")
    if not _finite(facts["guidance_scale"]):
        refuse(f"guidance_scale is {quoted(facts['guidance_scale'])}; expected a finite number")
    for each in facts["inputs"]:
        if each["dtype"] not in INPUT_DTYPES:
            refuse(
                f"input {quoted(each['name'])} is {quoted(each['dtype'])}; expected one of {', '.join(INPUT_DTYPES)}"
            )
        first, rest = each["shape"][:1], each["shape"][1:]
        fits = len(each["shape"]) <= MOST_AXES and all(map(_size, rest))
        if not fits or not all(size == BATCH or _size(size) for size in first):
            refuse(f"input {quoted(each['name'])} has shape {quoted(each['shape'])}; expected sizes, or first 'batch'")
    for name, strides in facts["strides"].items():
        if not container.naturals(strides):
            refuse(f"strides of {quoted(name)} are {quoted(strides)}; expected numbers")
    for name, value in facts["fixed"].items():
        if not isinstance(value, str):
            refuse(f"fixed {quoted(name)} is {quoted(value)}; expected a string")
    for name, value in facts["tied"].items():
        if not isinstance(value, str):
            refuse(f"tied.{quoted(name)} is {quoted(value)}; expected the name of a weight")
    for name, value in facts["measured"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            refuse(f"measured.{quoted(name)} is {quoted(value)}; expected a finite number")
    _check_names("inputs", [each["name"] for each in facts["inputs"]])
    _check_names("plans", [each["name"] for each in facts["plans"]])
    if not facts["plans"]:
        refuse("it holds no plan; expected at least one")


def _finite(value: float) -> bool:
    """True if finite in single precision, in which scales are used: neither NaN nor 1e999, which JSON allows."""
    return -3.4e38 < value < 3.4e38


def _size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _check_names(what: str, names: list[str]) -> None:
    if len(set(names)) != len(names) or not all(names):
        refuse(f"the {what} are named {quoted(names, 200)}; expected different names")
