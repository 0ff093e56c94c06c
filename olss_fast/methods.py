"""The table of tuning methods: how each makes its plan from what a `study.Study` offers, and how it is shown.

A new method is a function and a row here. `tune` walks over the table; reports, tables and plots look their kinds up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olss_fast.plan.plan import Plan
    from olss_fast.tuning.study import Study

ANALYTIC = "analytic"  # plans that no method made
OLSS = "olss"


@dataclass(frozen=True)
class Method:
    """How one kind of plan is made.

    title    its name in tables and plots
    make     the plan for a number of steps: fitted, or of an analytic solver at times that the method found. Gradients
             are off: a method that differentiates the network turns them on for itself
    line     colour and dashes of a line of its own in plots, and a column of its own in tables; None for variants of
             OLSS, of which the best is shown
    offered  whether it can be made, and is worth it
    """

    title: str
    make: Callable[[Study], Plan]
    line: tuple[str, str] | None = None
    offered: Callable[[Study], bool] = lambda study: True


def published(study: Study) -> Plan:
    """Teacher-forced rows on the planned path, as in the paper."""
    return study.plan(study.teacher_forced(study.planned))


def uniform(study: Study) -> Plan:
    """On-policy rows at evenly spaced steps of the teacher's."""
    return study.plan(study.on_policy(study.uniform, ridges=[study.fitted.ridge]))


def unpolished(study: Study) -> Plan:
    """On-policy rows on the searched path."""
    return study.plan(study.fitted)


def polished(study: Study) -> Plan:
    """The same, polished: the method itself."""
    return study.plan(study.polished(study.fitted))


def split(study: Study) -> Plan:
    """Polished rows that weigh unconditional and conditional outputs apart."""
    return study.plan(study.polished(study.on_policy(study.searched, branches=2)))


METHODS: dict[str, Method] = {
    "olss-published": Method("OLSS, as published", published, line=("#b08d57", ":")),
    "olss-uniform": Method("OLSS, uniform path", uniform, line=("#e8916f", "--")),
    "olss-unpolished": Method("OLSS, not polished", unpolished),
    OLSS: Method("OLSS", polished),
    "olss-split": Method("OLSS, split guidance", split, offered=lambda study: study.splits),
}
"""By kind, in the order in which candidates stand in a report."""


def with_lines() -> dict[str, Method]:
    """The methods that are shown beside OLSS, the best known last."""
    return {kind: method for kind, method in reversed(METHODS.items()) if method.line}


def is_olss(kind: str) -> bool:
    """Whether plans of this kind are OLSS or a variant of it, neither analytic nor shown beside it."""
    return METHODS[kind].line is None if kind in METHODS else kind.startswith(OLSS)


def kind_of(plan: Plan) -> str:
    """The kind of a plan by what `tune` wrote in its metadata, else "analytic"."""
    if plan.metadata.get("method") == OLSS:
        return plan.metadata.get("variant", OLSS)
    return plan.metadata.get("kind", ANALYTIC)


def title_of(kind: str) -> str:
    """The method's title; an unknown kind is its own."""
    return METHODS[kind].title if kind in METHODS else kind
