"""The search for the best plan of a network: record, find a path, fit, polish, judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olss_fast.tuning.study import Effort

__all__ = ["Effort"]


def __getattr__(name: str) -> Any:
    """`Effort`, imported on first use: path planning needs only numpy."""
    if name != "Effort":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from olss_fast.tuning.study import Effort

    return Effort
