"""The search for the best plan of a network: record, find a path, fit, polish, judge."""

from __future__ import annotations

from olss_fast.tuning.study import Effort

__all__ = ["Effort"]
