"""Who may import whom: ONE table. It keeps the house free of circles, and its stairs short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from olss_fast import _HOME

PACKAGE = Path(__file__).parents[2] / "olss_fast"
ROOMS = [
    "errors",
    "support",
    "plan",
    "schedule",
    "solvers",
    "capturing",
    "network",
    "kernels",
    "executors",
    "sampling",
    "metrics",
    "methods",
    "report",
    "tuning",
    "compiling",
    "engine",
    "onnx",
    "adapters",
    "testing",
    "demo",
    "cli",
    "__main__",
]
"""A room may import from itself and from rooms above it in this list, never below, at the top of a file or within a
function. Imports that are for types alone do not count."""

# Today's figures, which a change may lower: more would be a house that one gets lost in.
DEEPEST = 10  # files that importing one file may load one through the other
MOST_FILES = 15  # in one folder
CLIENTS = {"cli", "demo"}  # rooms that use the package as users do, by `import olss_fast`


def name_of(path: Path) -> str:
    where = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path("kernels") / path.name
    return ".".join(("olss_fast", *where.with_suffix("").parts)).removesuffix(".__init__")


FILES = {name_of(path): path for folder in (PACKAGE, PACKAGE.parent / "kernels") for path in folder.rglob("*.py")}


def imports(name: str, *, lazily: bool) -> Iterator[str]:
    """The files of the package that a file imports; those for types alone left out."""
    waiting: list[ast.AST] = [ast.parse(FILES[name].read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazily:
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relative to itself"
            within = [f"{node.module}.{each.name}" for each in node.names]
            if node.module == "olss_fast":  # whose names are those of other files
                within = [f"olss_fast.{_HOME.get(each.name, each.name)}" for each in node.names]
            yield from {each if each in FILES else str(node.module) for each in within} & FILES.keys()
        elif isinstance(node, ast.Import):
            found = {each.name for each in node.names} & FILES.keys()
            assert "olss_fast" not in found or room_of(name) in CLIENTS, f"{name} imports all of olss_fast"
            yield from found


def room_of(name: str) -> str:
    return name.split(".")[1]


@cache
def stairs(name: str) -> tuple[str, ...]:
    """The longest chain of imports that begins with a file."""
    below = [stairs(each) for each in imports(name, lazily=False) if each not in (name, "olss_fast")]
    return (name, *max(below, key=len, default=()))


def test_every_room_is_in_the_table() -> None:
    assert {room_of(name) for name in FILES if name != "olss_fast"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_upwards(room: str) -> None:
    above = set(ROOMS[: ROOMS.index(room) + 1])
    files = [name for name in FILES if name != "olss_fast" and room_of(name) == room]
    wrong = [
        (name, each)
        for name in files
        for each in imports(name, lazily=True)
        if each != "olss_fast" and room_of(each) not in above
    ]
    assert wrong == []


def test_stairs_are_short() -> None:
    longest = max((stairs(name) for name in FILES if name != "olss_fast"), key=len)
    assert len(longest) <= DEEPEST, " > ".join(longest)


def test_no_folder_is_crowded() -> None:
    folders = {path.parent for path in FILES.values()}
    crowded = {folder.name: count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES}
    assert crowded == {}
