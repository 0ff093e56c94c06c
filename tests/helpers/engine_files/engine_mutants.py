"""Engine files near a sound one, for both readers: blindly damaged, and altered under right checksums."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

from engine_bytes import BLANK, PLAN_BYTES, EngineBytes, framed, signed

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "batch", "cuda",
    "float16", "../../x", "/etc/passwd", "\ud800", "\x1b[2J", "x" * 5000, "0" * 64, [], [[]], [0], [1, 2, 3, 4], {},
    {"a": 1}, [{"name": "a"}], ["x"] * 100,
]  # fmt: skip


def altered(tree: Any, random_: random.Random) -> None:
    """One node of the tree replaced, removed, copied or swapped with another."""
    path = random_.choice([path for path, _ in members(tree)])
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


def mutations(data: bytes, count: int, seed: float) -> Iterator[bytes]:
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
            text = rng.choice(changes)(text, rng.randrange(max(1, len(text))), rng.choice((1, 1, 2, 8, 40)))
        yield text


def _blind(random_: random.Random) -> bytes:
    return next(mutations(EngineBytes().file(), 1, random_.random()))


def _header(random_: random.Random) -> bytes:
    """Another text as the header, under a right checksum."""
    header = next(mutations(EngineBytes().header(), 1, random_.random()))
    return signed(framed(header, EngineBytes().data))


def _manifest(random_: random.Random) -> bytes:
    engine = EngineBytes()
    altered(engine.manifest, random_)
    return engine.file()


def _table(random_: random.Random) -> bytes:
    engine, table = EngineBytes(), EngineBytes().table()
    altered(table, random_)
    return engine.file(table)


def _content(random_: random.Random) -> bytes:
    """A tensor with other bytes; every checksum is right."""
    engine = EngineBytes()
    name = random_.choice(list(engine.tensors))
    dtype, shape, content = engine.tensors[name]
    engine.tensors[name] = (dtype, shape, next(mutations(content, 1, random_.random()))[: len(content)].ljust(1))
    if dtype == "U8":
        engine.tensors[name] = (dtype, [len(engine.tensors[name][2])], engine.tensors[name][2])
    if name == "plans/three":
        engine.with_plan(engine.tensors[name][2])
    return engine.hashed().file()


def _kinds(random_: random.Random) -> bytes:
    """A tensor of another dtype, shape or name, with as many bytes as it then needs; every checksum is right."""
    engine = EngineBytes()
    name = random_.choice(list(engine.tensors))
    dtype, shape, content = engine.tensors.pop(name)
    dtype = random_.choice([dtype, *SIZES])
    shape = random_.choice([shape, [*shape, 1], shape[:-1], shape[::-1], [2, *shape], [0, *shape], [1] * 17])
    count = SIZES[dtype]
    for size in shape:
        count *= size
    name = random_.choice([name, name, name, name + "x", "weights/" + name, name.partition("/")[2]])
    engine.tensors[name] = (dtype, shape, (content * (1 + count // max(1, len(content))))[:count])
    return engine.hashed().file()


def _bound(random_: random.Random) -> bytes:
    """Another manifest, and code that was compiled for it; every checksum is right."""
    engine = EngineBytes()
    altered(engine.manifest, random_)
    try:
        return engine.bound().file()
    except (KeyError, TypeError, ValueError):  # a manifest that says not enough
        return engine.file()


def _layout(random_: random.Random) -> bytes:
    engine = EngineBytes()
    dtype, _, content = engine.tensors["code/weights.json"]
    tree = json.loads(content)
    altered(tree, random_)
    try:
        text = json.dumps(tree).encode()
    except (TypeError, ValueError):
        text = b"{}"
    engine.tensors["code/weights.json"] = (dtype, [len(text)], text)
    weights = tree.get("weights")
    if random_.random() < 0.5 and isinstance(weights, dict) and isinstance(weights.get("conv.weight"), dict):
        engine.manifest["strides"] = {"conv.weight": weights["conv.weight"].get("strides")}  # type: ignore[index]
    return engine.hashed().file()


def _plan(random_: random.Random) -> bytes:
    """A plan with another header or other numbers, all checksums right, its own too."""
    length = 8 + int.from_bytes(PLAN_BYTES[:8], "little")
    header, data = PLAN_BYTES[8:length], PLAN_BYTES[length:]
    place = header.index(b'sha256\\":\\"') + len(b'sha256\\":\\"')
    blank = header[:place] + BLANK.encode() + header[place + 64 :]
    if random_.random() < 0.5:
        blank = next(mutations(blank, 1, random_.random()))
    else:
        data = next(mutations(data, 1, random_.random()))[: len(data)].ljust(len(data), b"\0")
    whole = framed(blank, data)
    return EngineBytes().with_plan(whole.replace(BLANK.encode(), sha256(whole).hexdigest().encode(), 1)).file()


SIZES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1}
KINDS: list[Callable[[random.Random], bytes]] = [
    _blind, _header, _header, _manifest, _manifest, _table, _content, _content, _kinds, _layout, _bound, _plan
]  # fmt: skip


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """So many files, the same for the same seed: about one in twelve with the checksum that it had, the others with
    right ones, so that the checks behind them are reached."""
    random_ = random.Random(seed)
    for i in range(count):
        yield KINDS[i % len(KINDS)](random_)
