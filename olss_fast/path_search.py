"""Improve a path on the student's own rollout.

The planner works on the teacher's triangle and so cannot see how a student drifts. Here paths are compared by what
counts: rows are fitted on-policy on some fit samples and the error of the sample is measured on them and on as many
validation samples. A change of node k leaves the evaluations before it as they are, so a trial costs n - k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import NetworkError
from olss_fast.executors import reference
from olss_fast.fitting import Float64, Task, analytic_student, ridge_solve
from olss_fast.teacher import merge_triangles, triangle

Path = tuple[int, ...]
RIDGE = 1e-5
WORTH = 0.998  # a move must lower the error by this factor: less is noise of the samples
LAST_STRIDES = (1.0, 0.6, 0.35, 0.2)
BENDS = (0.85, 1.0, 1.15, 1.35)


def bent_paths(teacher_steps: int, steps: int) -> Iterator[Path]:
    """The two-parameter family s_k = L (k / (n-1))^q, L = T (1 - c/n): the uniform path (c = q = 1), bent.

    q > 1 spends more evaluations on the noise end, c < 1 shortens the last stride.
    """
    for last in LAST_STRIDES:
        for bend in BENDS:
            share = (np.arange(steps) / max(steps - 1, 1)) ** bend
            path = np.rint(share * teacher_steps * (1.0 - last / steps)).astype(int)
            if path[-1] < teacher_steps and bool(np.all(np.diff(path) > 0)):
                yield tuple(int(i) for i in path)


@dataclass(frozen=True)
class Trial:
    """A path with its on-policy rows, the columns of its rollout (one tensor a chunk) and its mean error."""

    path: Path
    rows: Float64
    columns: tuple[Tensor, ...]
    error: float


class PathSearch:
    """Compares paths of one length on `samples` fit samples and as many validation samples."""

    def __init__(self, task: Task, samples: int, progress: Callable[[int], object] = lambda samples: None) -> None:
        split = task.recording.split
        self.task, self.progress = task, progress
        self.fit_chunks = task.recording.chunks(split.fit[:samples])
        self.chunks = self.fit_chunks + task.recording.chunks(split.validation[:samples])
        self.pixels = sum(c.stop - c.start for c in self.fit_chunks) * task.noise[0].numel()

    def trial(self, path: Path, *, base: Trial | None = None, changed: int = 0) -> Trial:
        """Fit and score `path`; with `base`, a trial that agrees with it before node `changed`."""
        task, n = self.task, len(path)
        student = analytic_student(task, task.recording.teacher.timesteps[list(path)])
        rows = np.zeros_like(student.rows)
        rows[0, 0] = task.recording.teacher.rows[0, 0]
        columns = [task.noise[chunk][None].to(torch.float64) for chunk in self.chunks]
        if base is not None and changed > 0:
            rows[:changed] = base.rows[:changed]
            columns = [whole[: student.known(changed)] for whole in base.columns]
            self._fit_row(rows, changed, columns, path[changed], student.rows)
        for k in range(changed, n):
            timestep = float(student.timesteps[k])
            columns = [self._ask(c, rows[k], timestep, where) for c, where in zip(columns, self.chunks, strict=True)]
            if not all(bool(torch.isfinite(c[-1]).all()) for c in columns):
                return Trial(path, rows, tuple(columns), float("inf"))
            self._fit_row(rows, k + 1, columns, path[k + 1] if k + 1 < n else task.recording.teacher.nfe, student.rows)
        return Trial(path, rows, tuple(columns), self._error(rows[n], columns))

    def _ask(self, columns: Tensor, row: Float64, timestep: float, chunk: slice) -> Tensor:
        x = reference.combine(torch.as_tensor(row[: len(columns)], device=columns.device), columns)
        self.progress(x.shape[0])
        return torch.cat([columns, self.task.ask(x, timestep, chunk)])

    def _fit_row(self, rows: Float64, k: int, columns: Sequence[Tensor], target: int, prior: Float64) -> None:
        triangles = [
            triangle(torch.cat([c, self.task.recording.state(chunk, target).to(c)[None]]))
            for c, chunk in zip(columns, self.fit_chunks, strict=False)
        ]
        known = len(columns[0])
        rows[k, :known] = ridge_solve(merge_triangles(triangles), self.pixels, RIDGE, prior[k, :known])

    def _error(self, row: Float64, columns: Sequence[Tensor]) -> float:
        errors = []
        for c, chunk in zip(columns, self.chunks, strict=True):
            result = reference.combine(torch.as_tensor(row, device=c.device), c)
            errors.append((result - self.task.recording.result(chunk).to(result)).flatten(1).square().mean(1).sqrt())
        error = float(torch.cat(errors).mean())
        return error if np.isfinite(error) else float("inf")

    def best(self, paths: Sequence[Path], scales: Sequence[int]) -> Path:
        """The best of `paths`, its nodes then moved by +-`scales` as long as that helps."""
        best = min((self.trial(path) for path in dict.fromkeys(paths)), key=lambda trial: trial.error)
        if best.error == float("inf"):
            raise NetworkError(f"the network returned NaN or infinity on every path tried, such as {best.path}")
        for scale in scales:
            for k in range(len(best.path) - 1, 0, -1):  # late nodes are cheap to move
                for move in (scale, -scale):
                    best = self._moved(best, k, move)
        return best.path

    def _moved(self, best: Trial, k: int, move: int) -> Trial:
        path = (*best.path[:k], best.path[k] + move, *best.path[k + 1 :])
        if np.any(np.diff([*path, self.task.recording.teacher.nfe]) <= 0):
            return best
        tried = self.trial(path, base=best, changed=k)
        return tried if tried.error < WORTH * best.error else best
