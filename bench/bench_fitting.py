"""Fitting one row from a triangle, against plain least squares over all pixels: `pytest bench/bench_fitting.py -s`.

`fold` is what every fit needs once: the pixels of 11 columns and a target, folded chunk by chunk into a triangle, and
one ridge solution from it. Plain least squares finds the latter from the pixels themselves, the ridge as further rows.
`solve again` is what every later ridge, prior or path costs, once the triangle is there: it does not see the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from olss_fast.tuning.fitting import ridge_solve
from olss_fast.tuning.recording import merge_triangles, triangle

Float64 = npt.NDArray[np.float64]
COLUMNS, SAMPLES, CHUNK, LATENT = 11, 16, 4, (4, 32, 32)
RIDGE = 1e-6
PRIOR = np.zeros(COLUMNS)


def recorded() -> torch.Tensor:
    """Columns and target (12, samples, ...), float32; outputs nearly repeat each other, as those of a network do."""
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn((COLUMNS + 1, SAMPLES, *LATENT), generator=generator)
    return torch.stack([fresh[0], *(fresh[1] + 0.1 * each for each in fresh[1:])])


def fold(columns: torch.Tensor) -> Float64:
    return merge_triangles([triangle(chunk) for chunk in columns.split(CHUNK, dim=1)])


def from_triangle(columns: torch.Tensor) -> Float64:
    return ridge_solve(fold(columns), RIDGE, PRIOR)


def from_pixels(columns: torch.Tensor) -> Float64:
    """argmin_w ‖A w − x‖² + ridge Σ_j ‖A_j‖² w_j²: a tall least-squares problem in float64."""
    tall = columns.flatten(1).double().T.numpy()
    a, x = tall[:, :-1], tall[:, -1]
    left = np.concatenate([a, np.diag(math.sqrt(RIDGE) * np.linalg.norm(a, axis=0))])
    found: Float64 = np.linalg.lstsq(left, np.concatenate([x, PRIOR]), rcond=None)[0]
    return found


def bench_fold(versus: Callable[..., Any]) -> None:
    columns = recorded()
    np.testing.assert_allclose(from_triangle(columns), from_pixels(columns), atol=1e-9)
    bytes_kept = fold(columns).nbytes
    name = "plain least squares"
    versus(lambda: from_triangle(columns), lambda: from_pixels(columns), name=name, counts={"bytes kept": bytes_kept})


def bench_solve_again(versus: Callable[..., Any]) -> None:
    columns = recorded()
    r = fold(columns)
    versus(lambda: ridge_solve(r, RIDGE, PRIOR), lambda: np.linalg.lstsq(r[:, :-1], r[:, -1]), name="lstsq of R")
