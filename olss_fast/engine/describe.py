"""Text description of an engine file, from its header, with the SHA-256 of the whole file. For speed, only the standard
library is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from olss_fast.engine.manifest import FORMAT, Manifest, parse
from olss_fast.support import container
from olss_fast.support.files import AnyPath, open_regular
from olss_fast.support.text import clipped, printable

WIDTH = 120  # of a line
PLANS = 20  # that are listed; an engine may have any number
_MARK = f'"{FORMAT.name}"'.encode()


def is_engine_file(path: AnyPath) -> bool:
    """True if a file's header names the format, with any file name; the file may still be damaged."""
    try:
        with open_regular(Path(path)) as file:
            length = int.from_bytes(file.read(8), "little")
            return _MARK in file.read(min(length, container.MAX_HEADER_BYTES))
    except (OSError, ValueError):
        return False


def inspected(path: AnyPath, *, as_json: bool = False) -> str:
    """The output of `olss-fast inspect`: `describe`, or the manifest with the sha256 of the whole file in place of the
    format's checksum. Raises EngineFileError."""
    with container.naming(path, FORMAT):
        facts, sizes = container.read_header(path, FORMAT)
        found = parse(facts)
    sha256 = container.file_sha256(path, FORMAT)
    return json.dumps({**facts, "sha256": sha256}, indent=1) if as_json else describe(found, sizes, sha256)


def describe(found: Manifest, sizes: Mapping[str, int], sha256: str) -> str:
    """One line of facts, then aligned names and values. sizes: bytes of the file's tensors, by name. sha256: of the
    file, as `sha256sum` prints it."""
    rows = [*_rows(found, sizes), ("sha256", sha256)]
    lines = [clipped(line, WIDTH) for line in [_headline(found), "", *aligned(rows)]]
    return "\n".join([*lines, "", printable(str(found.facts["notice"]))])


def aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values in two columns."""
    rows = list(rows)
    margin = max(len(name) for name, _ in rows)
    return [f"{name:<{margin}}  {printable(text)}" for name, text in rows]


def _headline(found: Manifest) -> str:
    guidance = "guided" if found.doubled else "no guidance"
    plans = len(found.plan_names)
    parts = [str(found.facts["network"]), found.dtype, found.device, guidance, f"{plans} plan{'s' * (plans != 1)}"]
    return printable(" · ".join(parts))


def _rows(found: Manifest, sizes: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    facts = found.facts
    machine, built_with = facts["machine"], facts["built_with"]
    yield "noise", f"{found.profile}, compiled at {' × '.join(map(str, found.profile.opt))}"
    sizes_of = [f"{each.name} {each.dtype}[{', '.join(map(str, each.shape))}]" for each in found.inputs]
    yield "arguments", ", ".join(sizes_of) or "none"
    if facts["fixed"]:
        yield "built in", ", ".join(f"{name}={value}" for name, value in facts["fixed"].items())
    if found.doubled:
        yield "guidance", f"scale {found.guidance_scale:g}, both halves in one batch"
    yield from _below("plans", _plan_lines(found))
    yield "size", ", ".join(f"{folder} {_bytes(folder, sizes)}" for folder in ("code", "weights", "plans"))
    yield "machine", f"{machine['name']}, {machine['system']} {machine['architecture']}{_capability(machine)}"
    yield "built with", ", ".join(f"{name} {version}" for name, version in built_with.items() if version is not None)
    yield from _below(
        "measured", [f"{name.replace('_', ' ')} {value:.4g}" for name, value in facts["measured"].items()]
    )


def _plan_lines(found: Manifest) -> list[str]:
    plans = found.facts["plans"]
    margin = max(len(plan["name"]) for plan in plans)
    lines = [f"{plan['name']:<{margin}}  {_plan(plan)}" for plan in plans[:PLANS]]
    lines[0] += ", the default"
    return lines + ([f"… and {len(plans) - PLANS} more"] if len(plans) > PLANS else [])


def _plan(plan: Mapping[str, int]) -> str:
    parts = [f"{plan['nfe']} evaluation{'s' * (plan['nfe'] != 1)}"]
    parts += ["both outputs of a guided pair apart"] if plan["branches"] == 2 else []
    parts += [f"{plan['noises']} fresh noise{'s' * (plan['noises'] != 1)}"] if plan["noises"] else []
    return ", ".join(parts)


def _below(name: str, lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    return [("" if i else name, line) for i, line in enumerate(lines)]


def _capability(machine: Mapping[str, object]) -> str:
    numbers = machine["capability"]
    if isinstance(numbers, list):
        return f", compute capability {'.'.join(map(str, numbers))}"
    flags = machine["instructions"]
    return f", {len(flags)} instruction sets" if isinstance(flags, list) and flags else ""


def _bytes(folder: str, sizes: Mapping[str, int]) -> str:
    """ "512 B", "12.3 kB", "4.5 MB"."""
    count = sum(size for name, size in sizes.items() if name.startswith(f"{folder}/"))
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"
