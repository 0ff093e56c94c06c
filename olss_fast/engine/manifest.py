"""The description of an engine file: the entry of its container (`support.container`).

The names below are those in the file. Every member is required, and no others are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from olss_fast.compiling.shapes import BATCH, DTYPES, Profile
from olss_fast.errors import EngineFileError, InputError
from olss_fast.support import container
from olss_fast.support.container import MOST_AXES, Format, refuse
from olss_fast.support.text import quoted

FORMAT = Format("olss_fast.engine", 2, "engine file", EngineFileError)  # 2: code has its own description
NOTICE = (
    "This file contains machine code, which runs when the file is loaded. Load only what comes from somebody you trust."
)
INPUT_DTYPES = (*DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool")
CODE_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class Kind(NamedTuple):
    """What a JSON value must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: value in names)


def _is_finite(value: object) -> bool:
    """True if finite in single precision, in which scales are used: neither NaN nor 1e999, which JSON allows."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -3.4e38 < value < 3.4e38


def _is_shape(value: object) -> bool:
    """True for sizes, in place of the first of which BATCH may stand."""
    if not isinstance(value, list) or len(value) > MOST_AXES:
        return False
    return all(type(size) is int and 0 <= size < 2**31 for size in value[value[:1] == [BATCH] :])


STRING = Kind("a string", lambda value: isinstance(value, str))
NATURALS = Kind("a list of whole numbers from 0 on", container.naturals)
NATURALS_OR_NULL = Kind("whole numbers from 0 on, or null", lambda value: value is None or container.naturals(value))
_STRING_OR_NULL = Kind("a string or null", lambda value: value is None or isinstance(value, str))
_WHOLE = Kind("a whole number", lambda value: type(value) is int)
NUMBER = Kind("a finite number", _is_finite)
ANY = "*"  # as the only member of a mapping: it has any names

# What each member must be: a Kind, [what each item is], or a mapping of members.
_SCHEMA: dict[str, Any] = {
    "sha256": STRING,
    "format": STRING,
    "version": _WHOLE,
    "notice": STRING,
    "built_with": {
        "olss_fast": STRING,
        "torch": STRING,
        **dict.fromkeys(("triton", "cuda", "driver"), _STRING_OR_NULL),
    },
    "machine": {
        "device": _one_of("cpu", "cuda"),
        "name": STRING,
        "system": STRING,
        "architecture": STRING,
        "capability": NATURALS_OR_NULL,
        "instructions": [STRING],
    },
    "network": STRING,
    "dtype": _one_of(*DTYPES),
    "profile": {"min": [_WHOLE], "opt": [_WHOLE], "max": [_WHOLE], "multiple": [_WHOLE]},
    "doubled": Kind("true or false", lambda value: isinstance(value, bool)),
    "guidance_scale": NUMBER,
    "inputs": [
        {
            "name": STRING,
            "dtype": _one_of(*INPUT_DTYPES),
            "shape": Kind("sizes, the first of which may be 'batch'", _is_shape),
        }
    ],
    "fixed": {ANY: STRING},
    "plans": [{"name": STRING, "nfe": _WHOLE, "branches": _WHOLE, "noises": _WHOLE, "sha256": STRING}],
    "strides": {ANY: NATURALS},
    "unused": [STRING],
    "tied": {ANY: STRING},
    "hashes": {"weights": STRING, "code": STRING},
    "measured": {ANY: NUMBER},
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
    """A checked manifest; `facts` are all its members as in the file. device: "cpu" or "cuda"."""

    facts: Mapping[str, Any]
    profile: Profile
    inputs: tuple[Input, ...]
    dtype: str
    device: str
    doubled: bool
    guidance_scale: float

    @property
    def plan_names(self) -> list[str]:
        return [plan["name"] for plan in self.facts["plans"]]


def compiled_for(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The members that compiled code relies on. They are also stored beside the code (`weights`), and must match."""
    relied_on = {name: facts[name] for name in ("dtype", "profile", "doubled", "inputs")}
    return {"device": facts["machine"]["device"], **relied_on}


def parse(facts: Mapping[str, Any]) -> Manifest:
    """Checks every member. Raises `container.Refused`."""
    check(facts, _SCHEMA, "the manifest")
    try:
        profile = Profile(**facts["profile"])
    except InputError as cause:
        refuse(f"its profile is unusable: {cause}")
    if len(profile.min) > MOST_AXES:
        refuse(f"its profile has {len(profile.min)} axes; expected at most {MOST_AXES}")
    inputs = tuple(Input(each["name"], each["dtype"], tuple(each["shape"])) for each in facts["inputs"])
    for what in ("inputs", "plans"):
        names = [each["name"] for each in facts[what]]
        if len(set(names)) != len(names) or not all(names):
            refuse(f"the {what} are named {quoted(names, 200)}; expected different names")
    if not facts["plans"]:
        refuse("it holds no plan; expected at least one")
    told = facts["dtype"], facts["machine"]["device"], facts["doubled"], float(facts["guidance_scale"])
    return Manifest(facts, profile, inputs, *told)


def check(value: Any, expected: Any, source: str, path: str = "") -> None:
    """Raises `Refused` unless the JSON at `path` of `source` is as expected: a Kind, [each item], or {member: …}."""
    where = f"{source}'s {path}" if path else source
    if isinstance(expected, Kind):
        if not expected.fits(value):
            refuse(f"{where} is {quoted(value)}; expected {expected.words}")
    elif isinstance(expected, list):
        if not isinstance(value, list):
            refuse(f"{where} is {quoted(value)}; expected a list")
        for i, each in enumerate(value):
            check(each, expected[0], source, f"{path}[{i}]")
    elif not isinstance(value, dict):
        refuse(f"{where} is {quoted(value)}; expected an object")
    elif ANY in expected:
        for name, each in value.items():
            check(each, expected[ANY], source, f"{path}.{quoted(name)}")
    else:
        if differs := set(value) ^ set(expected):
            name = min(differs)
            how = "no member" if name in expected else "the unknown member"
            refuse(f"{where} has {how} {quoted(name)}; expected exactly the members {', '.join(sorted(expected))}")
        for name, each in expected.items():
            check(value[name], each, source, f"{path}.{name}" if path else name)
