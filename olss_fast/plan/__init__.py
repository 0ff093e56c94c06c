"""The Plan: a sampler as data; its file, its text, its diagnostic."""

from olss_fast.plan.plan import Plan

__all__ = ["Plan"]
