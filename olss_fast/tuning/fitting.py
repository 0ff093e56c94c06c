"""Coefficients of a student's rows, by ridge regression on a recorded teacher.

Row k+1 of the student is w minimising

    || A w - x_{s_{k+1}} ||^2 / M  +  ridge * sum_j m_j (w_j - p_j)^2,        A = [x_T, f_{s_1} .. f_{s_{k+1}}]

over all M pixels of the fit samples, with m_j the mean square of column j (so `ridge` has no unit) and p the row of
an analytic solver at the same times (Duan et al. 2023, section 4, with the shrinkage target moved from 0 to p).
*Teacher-forced* rows, as originally published, use the teacher's outputs for A; *on-policy* rows use the outputs on
the student's own rollout, row after row, and so correct the drift of the earlier rows.

A finished rollout is one small Gram matrix a sample: with y the teacher's sample and G_p = [A | y]^T [A | y] of sample
p, the error of a last row w is rmse_p(w)^2 = (w, -1) G_p (w, -1)^T / pixels for every w, so the last row is solved
exactly for any weighting of the samples, without the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import StoreError
from olss_fast.executors.reference import Loop
from olss_fast.network import Denoiser, require_finite
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule
from olss_fast.solvers.dpm_solver_pp import dpm_solver_pp
from olss_fast.tuning.recording import Float64, Recording, merge_triangles, triangle


@dataclass(frozen=True)
class Task:
    """The inputs of every fit: a recorded teacher, and the student's network.

    With `fixed_start` row 0 and the first timestep are the teacher's, as when a pipeline passes its own latents to the
    network first.
    """

    recording: Recording
    denoiser: Denoiser
    schedule: NoiseSchedule
    branches: int = 1
    fixed_start: bool = False

    @property
    def noise(self) -> Tensor:
        return self.denoiser.noise

    def rollout(self, student: Student, chunk: slice, known: Tensor | None = None) -> Loop:
        """The student's run on the samples `chunk`, made to its end; `known`: the columns that it begins with."""
        return Loop(student, self.noise[chunk][None] if known is None else known).finish(self.denoiser.asking(chunk))

    def with_branches(self, branches: int) -> Task:
        return replace(self, branches=branches)


@dataclass(frozen=True)
class Student:
    """Rows (n+1, 1 + n branches) and timesteps (n,) of a sampler that is being fitted."""

    rows: Float64
    timesteps: Float64

    @property
    def nfe(self) -> int:
        return len(self.timesteps)

    @property
    def branches(self) -> int:
        return int(self.rows.shape[1] - 1) // self.nfe

    @property
    def models(self) -> list[int]:
        """A student uses one network."""
        return [0] * self.nfe

    def known(self, evaluation: int) -> int:
        """How many columns exist when row `evaluation` is formed."""
        return 1 + evaluation * self.branches

    def plan(self, schedule: NoiseSchedule, metadata: dict[str, str]) -> Plan:
        """The student as a Plan, with the levels of `schedule`."""
        scale = schedule.input_scale(self.timesteps)
        return Plan(
            timesteps=self.timesteps,
            rows=self.rows,
            alphas=np.append(schedule.alpha(self.timesteps) * scale, 1.0),
            sigmas=np.append(schedule.sigma(self.timesteps) * scale, 0.0),
            branches=self.branches,
            metadata={**schedule.metadata(), **metadata},
        )


def analytic_student(task: Task, timesteps: Float64) -> Student:
    """DPM-Solver++ 2M at the same timesteps, the shrinkage target of fitted rows; f = u + g (c - u) split if asked."""
    rows = np.array(dpm_solver_pp(task.schedule, timesteps=timesteps, order=2).rows)
    if task.branches == 2:
        g = task.denoiser.guidance_scale
        split = np.stack([(1.0 - g) * rows[:, 1:], g * rows[:, 1:]], axis=2).reshape(len(rows), -1)
        rows = np.concatenate([rows[:, :1], split], axis=1)
    return Student(rows, np.asarray(timesteps, dtype=np.float64))


def begun_student(task: Task, path: Sequence[int]) -> tuple[Student, Student]:
    """The analytic student at a path's times, and one to be fitted, of which row 0 is the teacher's."""
    grid = task.recording.grid
    prior = analytic_student(task, grid.timesteps[list(path)])
    student = Student(np.zeros_like(prior.rows), prior.timesteps)
    student.rows[0, 0] = grid.rows[0, 0]
    return prior, student


def ridge_solve(r: Float64, ridge: float, prior: Float64) -> Float64:
    """The row w (C,) from the triangle (C+1, C+1) of the columns [A | target]; see the module's equation."""
    a, target = r[:, :-1], r[:, -1]
    shrink = np.diag(np.sqrt(ridge) * np.linalg.norm(a, axis=0))
    left = np.concatenate([a, shrink])
    right = np.concatenate([target - a @ prior, np.zeros(len(prior))])
    correction: Float64 = np.linalg.lstsq(left, right, rcond=None)[0]
    return prior + correction


def fitted_row(
    recording: Recording, chunks: Sequence[slice], columns: Iterable[Tensor], target: int, ridge: float, prior: Float64
) -> Float64:
    """The row that forms the teacher's state `target` of `columns`, one tensor a chunk, shrunk toward `prior`."""
    triangles = [
        triangle(torch.cat([each, recording.state(chunk, target).to(each)[None]]))
        for chunk, each in zip(chunks, columns, strict=True)
    ]
    return ridge_solve(merge_triangles(triangles), ridge, prior)


def teacher_forced(task: Task, path: Sequence[int], ridge: float) -> Student:
    """All rows from the triangle alone, on the teacher's own outputs (as originally published). No network calls."""
    r, grid = task.recording.r, task.recording.grid
    prior, student = begun_student(task, path)
    for k, target in enumerate([*path[1:], grid.nfe]):
        columns = [0, *(1 + i for i in path[: k + 1])]
        both = np.concatenate([r[:, columns], (r @ grid.rows[target])[:, None]], axis=1)
        student.rows[k + 1, : k + 2] = ridge_solve(both, ridge, prior.rows[k + 1, : k + 2])
    return student


def on_policy(task: Task, path: Sequence[int], ridge: float) -> Student:
    """Rows fitted one after the other on the student's own rollout over the fit samples.

    Costs len(path) evaluations a sample. The rollout's history lives on disk, so memory does not grow with samples.
    """
    recording = task.recording
    chunks = recording.chunks(recording.split.fit)
    prior, student = begun_student(task, path)
    with recording.store.scratch() as folder:
        history = History(folder, task, chunks)
        for k, target in enumerate([*path[1:], recording.grid.nfe], start=1):
            columns = (history.advance(chunk, student) for chunk in chunks)
            known = student.known(k)
            student.rows[k, :known] = fitted_row(recording, chunks, columns, target, ridge, prior.rows[k, :known])
    return student


class History:
    """The columns [x_T | f_0 ..] of a student's rollout, one file per chunk: only one chunk is in memory."""

    def __init__(self, folder: Path, task: Task, chunks: Sequence[slice]) -> None:
        self.folder, self.task = folder, task
        for chunk in chunks:
            self._append(chunk, task.noise[chunk][None])

    def _file(self, chunk: slice) -> Path:
        return self.folder / str(chunk.start)

    def _append(self, chunk: slice, columns: Tensor) -> None:
        try:
            with self._file(chunk).open("ab") as file:
                file.write(columns.to(torch.float32).cpu().contiguous().numpy().tobytes())
        except OSError as error:
            advice = self.task.recording.store.advice
            raise StoreError(f"cannot write a rollout to {self.folder}: {error}. Free some space. {advice}") from error

    def read(self, chunk: slice) -> Tensor:
        """(columns so far, B, ...) in float32, on the noise's device."""
        noise = self.task.noise
        flat = np.fromfile(self._file(chunk), dtype=np.float32)
        shape = (-1, chunk.stop - chunk.start, *noise.shape[1:])
        return torch.from_numpy(flat).reshape(shape).to(noise.device)

    def advance(self, chunk: slice, student: Student) -> Tensor:
        """Make the student's next evaluation, keep the outputs, and return all columns including them, in float64."""
        loop = Loop(student, self.read(chunk))
        outputs = loop.ask(self.task.denoiser.asking(chunk))
        require_finite(outputs, step=loop.evaluation - 1, first_sample=chunk.start)
        self._append(chunk, outputs)
        return loop.columns


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


def huber(errors: Float64, threshold: float) -> float:
    """Mean of e^2 / (2 threshold) up to `threshold` and of e - threshold / 2 beyond it (Huber 1964, scaled)."""
    return float(np.mean(np.where(errors > threshold, errors - threshold / 2, errors**2 / (2 * threshold))))
