"""A plan's rows as increments: each row next to the network's input before it.

    x_{k+1} = rows[k+1] · basis = rho x_k + rows'[k+1] · basis        rows'[k+1] = rows[k+1] - rho rows[k]

In exact numbers the same; x_k is the tensor that the network was handed. In float32, rows · basis has two faults where
there is little signal, since the coefficients of x_T grow to alpha_S / alpha_T (15 for Stable Diffusion, 157 for DDPM):
large terms cancel, and the network answers to the rounding of x_k, of which the rows know nothing. Next to x_k both are
gone. What a one-step solver adds is one output times one number, as its inventors wrote it down.

rho = rows[k+1, p] / rows[k, p], where p is the column that no network wrote (x_T or a fresh noise) of which row k has
most.

Where sums are wider than x, nothing of the kind cancels, and rows · basis carries on no rounding of x. On the embedded
model in bfloat16 both forms are alike at 8 to 20 steps (2.7e-3 to 3.8e-3), at 50 of DDIM rows · basis is better (2.5e-3
against 5.8e-3): so the loops keep it in half precision. In a pipeline's slot rows are increments in every precision: a
sample that was changed between two steps then counts as what it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from olss_fast.plan.plan import Floats

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
    """Of the rows of a plan, or of the states before a scheduler scales them; fresh noises from `first_noise` on.

    `csrc/runtime/increments.h` does the same, operation by operation.
    """
    before, after, each = rows[:-1], rows[1:], np.arange(len(rows) - 1)
    pivots = np.array([0, *range(first_noise, rows.shape[1])])
    pivots = pivots[np.abs(before[:, pivots]).argmax(axis=1)]
    most, wanted = before[each, pivots], after[each, pivots]
    with np.errstate(over="ignore", invalid="ignore"):  # where there is next to nothing of it
        rho = np.divide(wanted, most, out=np.zeros_like(most), where=most != 0)
        carried = rho[:, None] * before
        rest: Floats = after - carried
    rest[np.abs(rest) <= NOTHING * (np.abs(after) + np.abs(carried))] = 0.0
    takes_x_besides = rest[:, 0].any()
    rest[:, 0] = rho
    if takes_x_besides or (np.abs(rest).max(axis=1) > GROWTH * np.abs(after).max(axis=1)).any():
        return Increments(rows, False)
    return Increments(np.concatenate([rows[:1], rest]), True)
