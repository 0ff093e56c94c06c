"""Improve a path on the student's own rollout.

The planner works on the teacher's triangle and so cannot see how a student drifts. Here paths are compared by what
counts: rows are fitted on-policy on some fit samples and the error of the sample is measured on them and on as many
validation samples. A change of node k leaves the evaluations before it as they are, so a trial costs n - k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import NetworkError
from olss_fast.executors.reference import Loop
from olss_fast.tuning.fitting import Task, begun_student, fitted_row
from olss_fast.tuning.recording import Float64, distance

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

    def __init__(self, task: Task, samples: int) -> None:
        self.task, split = task, task.recording.split
        self.fit_chunks = task.recording.chunks(split.fit[:samples])
        self.chunks = self.fit_chunks + task.recording.chunks(split.validation[:samples])

    def trial(self, path: Path, *, base: Trial | None = None, changed: int = 0) -> Trial:
        """Fit and score `path`; with `base`, a trial that agrees with it before node `changed` (1 or later)."""
        task, n = self.task, len(path)
        prior, student = begun_student(task, path)
        columns = [task.noise[chunk][None] for chunk in self.chunks]
        if base is not None:
            student.rows[:changed] = base.rows[:changed]
            columns = [whole[: student.known(changed)] for whole in base.columns]
        loops = [Loop(student, each) for each in columns]
        for k, target in list(enumerate([*path, task.recording.grid.nfe]))[changed:]:
            if k > 0:
                some, known = [loop.columns for loop in loops[: len(self.fit_chunks)]], student.known(k)
                row = fitted_row(task.recording, self.fit_chunks, some, target, RIDGE, prior.rows[k, :known])
                student.rows[k, :known] = row
            for loop, chunk in zip(loops, self.chunks, strict=True):
                loop.follow(student)
                if k < n:
                    loop.ask(task.denoiser.asking(chunk))
            if k < n and not all(bool(torch.isfinite(loop.columns[-1]).all()) for loop in loops):
                return Trial(path, student.rows, (), float("inf"))
        results = map(task.recording.result, self.chunks)
        errors = [distance(loop.x, result) for loop, result in zip(loops, results, strict=True)]
        error = float(torch.cat(errors).mean())
        known_columns = tuple(loop.columns for loop in loops)
        return Trial(path, student.rows, known_columns, error if np.isfinite(error) else float("inf"))

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
        if np.any(np.diff([*path, self.task.recording.grid.nfe]) <= 0):
            return best
        tried = self.trial(path, base=best, changed=k)
        return tried if tried.error < WORTH * best.error else best
