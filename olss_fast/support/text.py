"""Showing text of unknown origin: metadata of a foreign file, a path, a value that was not expected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def printable(text: str) -> str:
    """Text with control characters escaped, so that a foreign file cannot drive the reader's terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def clipped(text: str, width: int) -> str:
    """At most `width` characters, the last one an ellipsis if something was left out."""
    return text if len(text) <= width else text[: width - 1] + "…"


def quoted(value: object, width: int = 60) -> str:
    """`repr` for an error message: printable and short."""
    return clipped(printable(repr(value)), width)


def a(value: Any) -> str:
    """The type and value, for a message: "a str 'five.safetensors'"."""
    return "None" if value is None else f"a {type(value).__name__} {quoted(value)}"


def first_few(numbers: Collection[Any]) -> str:
    """The first four of some numbers: "999, 749, 499, 249, …"."""
    return ", ".join(f"{float(number):g}" for number in list(numbers)[:4]) + (", …" if len(numbers) > 4 else "")
