"""A plan's rows as increments: each row relative to the previous network input.

    x_{k+1} = rows[k+1] · basis = rho x_k + rows'[k+1] · basis        rows'[k+1] = rows[k+1] - rho rows[k]

In exact arithmetic both are equal; x_k is the tensor that the network received. In float32, rows · basis has two faults
at low signal, where the coefficients of x_T grow to alpha_S / alpha_T (15 for Stable Diffusion, 157 for DDPM): large
terms cancel, and the network sees the rounding of x_k, which the rows ignore. Increments have neither. A one-step
solver then adds one output times one number, as in its paper.

rho = rows[k+1, p] / rows[k, p], where p is the column of x_T or a fresh noise with the largest coefficient in row k.

Where sums are wider than x, these terms do not cancel, and rows · basis does not carry on the rounding of x. On the
embedded model in bfloat16 both forms agree at 8 to 20 steps (2.7e-3 to 3.8e-3); at 50 DDIM steps rows · basis is better
(2.5e-3 against 5.8e-3), so the loops keep it in half precision. In a pipeline's slot rows are increments in every
precision: a sample changed between two steps is then used as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from olss_fast.plan.plan import Floats

GROWTH = 2.0  # how much larger an increment's coefficients may be than those of the row
NOTHING = 64 * float(np.finfo(np.float64).eps)  # relative rounding error of a difference


class Increments(NamedTuple):
    """rows (S+1, columns): row 0 is the plan's. `anchored`: in all others, column 0 is x_k; else x_T, as in the plan.

    A plan is not anchored if one of its rows cannot be: row k has next to no x_T, which would make rho large, or row
    k+1 adds x_T of its own. This never happens with a solver's rows, but may with fitted ones.
    """

    rows: Floats
    anchored: bool


def increments(rows: Floats, first_noise: int) -> Increments:
    """Increments of a plan's rows or of a scheduler's unscaled states; fresh noises: the columns from `first_noise`.

    `csrc/runtime/run/increments.h` does the same, operation by operation.
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
