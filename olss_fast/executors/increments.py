"""A plan's rows as increments, for executors whose sums are no wider than what the network is handed.

    x_{k+1} = rows[k+1] · basis = rho x_k + rows'[k+1] · basis        rows'[k+1] = rows[k+1] - rho rows[k]

In exact numbers the same; x_k is the tensor that the network was handed. In float32, rows · basis has two faults where
there is little signal, since the coefficients of x_T grow to alpha_S / alpha_T (15 for Stable Diffusion, 157 for DDPM):
large terms cancel, and the network answers to the rounding of x_k, of which the rows know nothing. Next to x_k both are
gone. What a one-step solver adds is one output times one number, as its inventors wrote it down.

rho = rows[k+1, p] / rows[k, p], where p is the column that no network wrote (x_T or a fresh noise) of which row k has
most.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from olss_fast.plan import Floats

GROWTH = 2.0  # an increment may have coefficients so much larger than those of the row itself
NOTHING = 64 * float(np.finfo(np.float64).eps)  # of two numbers, is what their difference may be by rounding alone


class Increments(NamedTuple):
    """rows (S+1, columns): row 0 is the plan's. `anchored`: in all others, column 0 is x_k; else x_T, as in the plan.

    A plan is not anchored if one of its rows cannot be: where row k has hardly anything of x_T, so that rho would be
    large, or where row k+1 takes x_T in besides. No solver's rows do so, but fitted ones may.
    """

    rows: Floats
    anchored: bool


def increments(rows: Floats, first_noise: int) -> Increments:
    """Of the rows of a plan, or of the states before a scheduler scales them; fresh noises from `first_noise` on."""
    pivots = [0, *range(first_noise, rows.shape[1])]
    found = [rows[0]]
    for before, row in pairwise(rows):
        increment = _increment(before, row, pivots[int(np.abs(before[pivots]).argmax())])
        if increment is None:
            return Increments(rows, False)
        found.append(increment)
    return Increments(np.array(found), True)


def _increment(before: Floats, row: Floats, pivot: int) -> Floats | None:
    """rows'[k+1] with rho in column 0, or None."""
    rho = row[pivot] / before[pivot] if before[pivot] else np.float64(0.0)
    carried = rho * before
    rest: Floats = row - carried
    rest[np.abs(rest) <= NOTHING * (np.abs(row) + np.abs(carried))] = 0.0
    if rest[0]:
        return None
    rest[0] = rho
    return rest if np.abs(rest).max() <= GROWTH * np.abs(row).max() else None
