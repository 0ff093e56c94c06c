"""JSON of unknown origin, read strictly: what two readers might read differently is no JSON here."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from olss_fast._text import quoted


def strict_object(text: str | bytes) -> dict[str, Any]:
    """The object that `text` (UTF-8) spells. Raises ValueError, which says why: no JSON or no object, a name that
    occurs twice, NaN or Infinity, what is nested too deeply, or strings that are no text."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # JSON's escapes can spell lone surrogates
    except (ValueError, RecursionError) as cause:  # decoding and JSON errors are ValueErrors
        raise ValueError(f"is not valid JSON ({quoted(str(cause))})") from cause
    if not isinstance(value, dict):
        raise ValueError(f"is {quoted(value)}; expected a JSON object")
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError(f"a name occurs twice among {quoted(sorted(name for name, _ in pairs))}")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
