"""Strict JSON for files of unknown origin: anything that two readers might read differently is refused.

The C++ runtime's reader (csrc/runtime/files/json.h) accepts and refuses the same texts.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from olss_fast.support.text import quoted

MOST_DEPTH = 32
MOST_PARTS = 2**18  # commas and opening brackets: 16 MiB of "[],[],…" would be hundreds of MB in memory
_MARKS = re.compile(r'"[^"]*"|[][{},]')  # strings, whose content does not count


def strict_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in `text` (UTF-8). Raises ValueError with the reason: not JSON or not an object, a repeated name,
    NaN or Infinity, too deep nesting, too many parts, integers beyond 64 bits, other numbers beyond float64, or strings
    that are not text."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        _check_size(decoded)
        value = json.loads(
            decoded,
            object_pairs_hook=_without_repeats,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
        json.dumps(value, ensure_ascii=False).encode()  # JSON's escapes can spell lone surrogates
    except (ValueError, RecursionError) as cause:  # decoding and JSON errors are ValueErrors
        raise ValueError(f"is not valid JSON ({quoted(str(cause))})") from cause
    if not isinstance(value, dict):
        raise ValueError(f"is {quoted(value)}; expected a JSON object")
    return value


def _check_size(text: str) -> None:
    """Refuses too deep nesting or too many parts before any object is created."""
    depth = parts = 0
    for number, found in enumerate(_MARKS.finditer(text.replace(r"\\", "").replace(r"\"", ""))):
        mark = found[0]
        depth += (mark in "[{") - (mark in "]}")
        parts += mark in "[{,"
        if depth > MOST_DEPTH:
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
        if parts > MOST_PARTS or number > 4 * MOST_PARTS:  # no JSON of fewer parts has more strings and brackets
            raise ValueError(f"more than {MOST_PARTS} parts")


def _integer(text: str) -> int:
    number = int(text) if len(text) < 21 else 2**64
    if not -(2**63) <= number < 2**63 or text == "-0":
        raise ValueError(f"the number {quoted(text)} is no integer of 64 bits")
    return number


def _number(text: str) -> float:
    number = float(text)
    vanished = number == 0 and re.match(r"-?[0.]*[1-9]", text)
    if number in (float("inf"), float("-inf")) or vanished:
        raise ValueError(f"the number {quoted(text)} is out of range")
    return number


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError(f"a name occurs twice among {quoted(sorted(name for name, _ in pairs))}")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
