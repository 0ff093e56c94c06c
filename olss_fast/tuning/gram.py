"""A student's rollout reduced to one small Gram matrix a sample: errors and best last rows without the images.

For sample p let A = [x_T, f_0 .. f_{n-1}] be the student's own columns and y the teacher's sample. With
G_p = [A | y]^T [A | y], the error of a last row w is  rmse_p(w)^2 = (w, -1) G_p (w, -1)^T / pixels  for every w, so the
last row is solved exactly for any weighting of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from olss_fast.tuning.fitting import Student, Task
    from olss_fast.tuning.recording import Float64


@dataclass(frozen=True)
class Rollout:
    """Gram matrices (P, C+1, C+1) of the columns and the teacher's sample, each summed over `pixels` of a sample."""

    gram: Float64
    pixels: int

    def errors(self, row: Float64) -> Float64:
        """Root mean square distance (P,) between row . columns and the teacher's sample."""
        v = np.append(row, -1.0)
        squares: Float64 = np.einsum("i,pij,j->p", v, self.gram, v) / self.pixels
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))

    def best_row(self, weights: Float64, *, ridge: float, prior: Float64) -> Float64:
        """argmin_w of the weighted sum of squared errors, with the ridge toward `prior` of `fitting`."""
        total = np.einsum("p,pij->ij", weights / weights.sum(), self.gram)
        a, b = total[:-1, :-1], total[:-1, -1]
        correction: Float64 = np.linalg.lstsq(a + ridge * np.diag(np.diag(a)), b - a @ prior, rcond=None)[0]
        return prior + correction


def roll(task: Task, student: Student, samples: range) -> Rollout:
    """Run the student on `samples` (n evaluations each)."""
    grams = []
    for chunk in task.recording.chunks(samples):
        columns = task.rollout(student, chunk).columns
        target = task.recording.result(chunk).to(columns)
        both = torch.cat([columns, target[None]]).flatten(2).transpose(0, 1)
        grams.append((both @ both.transpose(1, 2)).cpu().numpy())
    return Rollout(np.concatenate(grams), task.noise[0].numel())


def huber(errors: npt.NDArray[np.float64], threshold: float) -> float:
    """Mean of e^2 / (2 threshold) up to `threshold` and of e - threshold / 2 beyond it (Huber 1964, scaled)."""
    return float(np.mean(np.where(errors > threshold, errors - threshold / 2, errors**2 / (2 * threshold))))
