"""The Plan: a sampler as data; its file, its text, its diagnostic."""

from __future__ import annotations

from olss_fast.plan.plan import Plan

__all__ = ["Plan"]
