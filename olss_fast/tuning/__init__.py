"""The search for the best plan of a network: record, find a path, fit, polish, judge."""

from __future__ import annotations

from olss_fast.tuning.tuning import Effort, TuneResult, tune

__all__ = ["Effort", "TuneResult", "tune"]
