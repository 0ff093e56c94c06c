"""A plan for people: one line of facts, a table with a row per evaluation, and the remaining metadata.

lambda is log(alpha / sigma), half the log signal-to-noise ratio. A coefficient that causality forces to zero is left
blank; one that happens to be zero is a dot. If not all columns fit, each row shows x_T and its newest outputs: f[i-1]
is the output just before row i.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from olss_fast.support.arguments import checked_count
from olss_fast.support.text import clipped, printable

if TYPE_CHECKING:
    from olss_fast.plan.plan import Plan

_IN_FACTS = ("method", "order", "prediction_type", "spacing", "guidance_scale")
_GAP = "  "


def describe(plan: Plan, *, width: int = 120) -> str:
    """The text of `Plan.describe`. Lines are at most `width` characters, but never below the columns of levels."""
    width = checked_count("width", width)
    levels = _level_columns(plan)
    room = width - _space(levels) + len(_GAP)  # no gap before the first column
    table = _joined(levels + _coefficients(plan, room))
    facts = clipped(_facts(plan), width)
    return "\n".join([facts, "", *table, *_notes(plan, width)])


def _facts(plan: Plan) -> str:
    data = plan.metadata
    name = data.get("method", "unnamed plan") + (f" order {data['order']}" if "order" in data else "")
    parts = [name, _count(plan.nfe, "evaluation")]
    parts += [data[key] for key in ("prediction_type", "spacing") if key in data]
    if "guidance_scale" in data:
        parts.append(f"guidance {data['guidance_scale']}")
    if plan.branches == 2:
        parts.append("unconditional and conditional columns")
    if plan.noises:
        parts.append(_count(plan.noises, "fresh noise"))
    return printable(" · ".join(parts))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _level_columns(plan: Plan) -> list[list[str]]:
    with np.errstate(divide="ignore"):
        lam = np.log(plan.alphas) - np.log(plan.sigmas)
    columns = [
        ["step", *map(str, range(plan.nfe)), "sample"],
        ["timestep", *(_number(time, 7) for time in plan.timesteps), ""],
        ["lambda", *(f"{value:.3f}" for value in lam)],
        ["alpha", *(_number(value) for value in plan.alphas)],
        ["sigma", *(_number(value) for value in plan.sigmas)],
    ]
    if plan.models.any():
        columns.insert(1, ["model", *map(str, plan.models), ""])
    return columns


def _coefficients(plan: Plan, room: int) -> list[list[str]]:
    if plan.columns * len(_GAP + "x_T") <= room:  # else they cannot fit, and a long plan has a million of them
        columns = [_column(plan, name, [column] * (plan.nfe + 1)) for column, name in enumerate(plan.column_names)]
        if _space(columns) <= room:
            return columns
    return _newest(plan, room)


def _newest(plan: Plan, room: int) -> list[list[str]]:
    """x_T, an ellipsis for omitted columns, and as many of the newest outputs of each row as fit."""
    rows = np.arange(plan.nfe + 1)
    left: list[list[str]] = [_column(plan, "x_T", 0 * rows), ["…"] * (plan.nfe + 2)]
    right: list[list[str]] = []
    for age in range(1, plan.nfe + 1):
        first = 1 + (rows - age) * plan.branches
        newer = [
            _column(plan, f"{letter}[i-{age}]", np.where(rows >= age, first + k, -1))
            for k, letter in enumerate("f" if plan.branches == 1 else "uc")
        ]
        if _space(left + newer + right) > room:
            break
        right = newer + right
    return left + right


def _column(plan: Plan, name: str, columns: Iterable[int]) -> list[str]:
    """A heading, and for each row the coefficient at that row's entry of `columns` (blank where it is negative)."""
    return [name, *(_coefficient(plan, row, column) for row, column in enumerate(columns))]


def _coefficient(plan: Plan, row: int, column: int) -> str:
    is_output = 1 <= column < plan.noise_slice.start
    if column < 0 or (is_output and (column - 1) // plan.branches >= row):
        return ""
    value = float(plan.rows[row, column])
    return _number(value) if value else "·"


def _joined(columns: list[list[str]]) -> list[str]:
    widths = [_width(column) for column in columns]
    rows = zip(*columns, strict=True)
    return [_GAP.join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _notes(plan: Plan, width: int) -> list[str]:
    notes = [(printable(key), printable(text)) for key, text in plan.metadata.items() if key not in _IN_FACTS]
    margin = max((len(key) for key, _ in notes), default=0)
    lines = [clipped(f"{key:<{margin}}{_GAP}{text}", width) for key, text in notes]
    return ["", *lines] if lines else []


def _space(columns: list[list[str]]) -> int:
    return sum(len(_GAP) + _width(column) for column in columns)


def _width(column: list[str]) -> int:
    return max(map(len, column))


def _number(value: float, digits: int = 4) -> str:
    return f"{float(value):.{digits}g}"
