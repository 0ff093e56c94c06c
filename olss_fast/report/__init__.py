"""Results of tuning and comparing: figures, tables, pictures."""

from __future__ import annotations

from olss_fast.report.report import Candidate, Report

__all__ = ["Candidate", "Report"]
