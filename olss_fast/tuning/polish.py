"""Polish a fitted student: Levenberg-Marquardt on all its coefficients and times for the error of its sample.

Parameters are the rows 0 .. n-1 and the log-SNR of each evaluation; the last row is linear and eliminated (variable
projection, Golub & Pereyra 1973, in Kaufman's form). A column of the Jacobian is one forward difference that runs the
student again from the changed step on: about n^2 / 2 evaluations for a coefficient of every row, no back-propagation.

Directions of row k are the columns of S_k = (R_k / sqrt(M))^-1 with R_k the triangle of the columns known there: a unit
along any of them changes the network input by one root mean square, so that steps of one size suit all of them,
whatever the scale and the correlation of the columns. Damping is Marquardt's, mu diag(J^T J). A few samples carry the
Jacobian, a few others choose the damping, all fit samples carry the residual of the step that is taken, and the
validation samples say when to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import NetworkError
from olss_fast.executors.reference import Loop
from olss_fast.tuning.fitting import Student, Task, huber, roll
from olss_fast.tuning.recording import Float64, triangle

EXACT = 1e-7  # root mean square errors below this are rounding of the float32 teacher
STATE_STEP = 1e-2  # forward-difference step, root mean square of the change of a network input
LOG_SNR_STEP = 1e-2
COLLINEAR = 1e-4  # directions that need coefficients larger than 1/COLLINEAR per unit of change are left alone
DAMPING_FACTORS = (0.1, 1.0, 10.0)
PATIENCE = 3  # iterations without a better validation loss that end the polish


@dataclass(frozen=True)
class Direction:
    """One parameter: a change of row `evaluation` (or of its log-SNR, if `row` is None) per unit."""

    evaluation: int
    row: Float64 | None

    def apply(self, student: Student, amount: float, task: Task) -> Student:
        """The student moved by `amount` along this direction."""
        if self.row is not None:
            rows = student.rows.copy()
            rows[self.evaluation, : len(self.row)] += amount * self.row
            return replace(student, rows=rows)
        timesteps = student.timesteps.copy()
        timesteps[self.evaluation] = shift_log_snr(task, timesteps[self.evaluation], amount)
        return replace(student, timesteps=timesteps)


def shift_log_snr(task: Task, timestep: float, amount: float) -> float:
    """The timestep whose log-SNR is larger by `amount`, kept inside the schedule."""
    schedule = task.schedule
    lowest, highest = float(schedule.lam(schedule.first)), float(schedule.lam(schedule.last))
    return float(schedule.timestep_of_lam(np.clip(schedule.lam(timestep) + amount, lowest, highest)))


def evaluations_of_jacobian(nfe: int, branches: int = 1) -> int:
    """Network evaluations a sample for one Jacobian, base rollout included."""
    return nfe + sum((2 + k * branches) * (nfe - k) for k in range(nfe))


class Objective:
    """Errors of a student on the fit and the validation samples, its last row solved exactly on the former."""

    def __init__(self, task: Task, *, ridge: float, robust: bool) -> None:
        self.task, self.ridge, self.robust = task, ridge, robust
        self.threshold = 0.0

    def solve(self, student: Student) -> tuple[Student, float, float]:
        """The student with its best last row, its loss on the fit samples and on the validation samples."""
        split = self.task.recording.split
        fit = roll(self.task, student, split.fit)
        prior = student.rows[-1]
        row, errors = prior, fit.errors(prior)
        if not np.isfinite(fit.gram).all():
            raise NetworkError(f"the network returned NaN or infinity on a student's rollout, at {student.timesteps}")
        self.threshold = self.threshold or max(0.5 * float(np.median(errors)), EXACT)
        for _ in range(5 if self.robust else 1):  # iteratively re-weighted least squares
            row = fit.best_row(self.weights(errors), ridge=self.ridge, prior=prior)
            errors = fit.errors(row)
        solved = replace(student, rows=np.concatenate([student.rows[:-1], row[None]]))
        validation = roll(self.task, solved, split.validation).errors(row)
        return solved, self.loss(errors), self.loss(validation)

    def loss_on(self, student: Student, samples: range) -> float:
        """Loss on some fit samples, with the last row that is best for them."""
        some, row = roll(self.task, student, samples), student.rows[-1]
        if not np.isfinite(some.gram).all():
            return float("inf")
        row = some.best_row(self.weights(some.errors(row)), ridge=self.ridge, prior=row)
        return self.loss(some.errors(row))

    def weights(self, errors: Float64) -> Float64:
        """Derivative of the loss by e^2, up to a factor: constant for least squares, 1/e beyond the threshold."""
        return 1.0 / np.maximum(errors, self.threshold) if self.robust else np.ones_like(errors)

    def loss(self, errors: Float64) -> float:
        """Mean loss of per-sample errors (P,): squared, or Huber if `robust`."""
        return huber(errors, self.threshold) if self.robust else float(np.mean(errors**2))


def polish(
    task: Task,
    student: Student,
    *,
    iterations: int,
    jacobian_samples: int,
    ridge: float,
    robust: bool,
    rng: np.random.Generator,
) -> Student:
    """`student`, improved until `PATIENCE` iterations brought no better validation loss, or `iterations` are done."""
    objective = Objective(task, ridge=ridge, robust=robust)
    student, loss, best_loss = objective.solve(student)
    best, damping, failures = student, 1e-2, 0
    for _ in range(iterations if best_loss > 0.0 else 0):
        subsets = [_subset(task, jacobian_samples, rng) for _ in range(2)]
        try:
            damping, step = _best_step(task, student, objective, damping, *subsets)
            tried, tried_loss, validation = objective.solve(step)
        except NetworkError:  # a step to where the network is not finite: what was reached before stands
            break
        failures = 0 if tried_loss < loss and validation < best_loss else failures + 1
        if tried_loss < loss:
            student, loss = tried, tried_loss
        else:
            damping *= 10.0
        if validation < best_loss:
            best, best_loss = tried, validation
        if failures == PATIENCE:
            break
    return best


def _best_step(
    task: Task, student: Student, objective: Objective, damping: float, samples: range, others: range
) -> tuple[float, Student]:
    """The step of the damping, around the last one used, that does best on `others`."""
    equations = _normal_equations(task, student, samples, objective)
    steps = {mu: equations.step(student, mu, task) for mu in damping * np.array(DAMPING_FACTORS)}
    best = min(steps, key=lambda mu: objective.loss_on(steps[mu], others))
    return best, steps[best]


def _subset(task: Task, count: int, rng: np.random.Generator) -> range:
    """A run of `count` fit samples at a random place: samples are exchangeable, and a run is one slice."""
    fit = task.recording.split.fit
    count = min(count, len(fit))
    start = int(rng.integers(fit.start, fit.stop - count + 1))
    return range(start, start + count)


@dataclass(frozen=True)
class NormalEquations:
    """J^T W J and J^T W r over the directions and, behind them, the coefficients of the last row."""

    directions: list[Direction]
    hessian: Float64
    gradient: Float64

    def step(self, student: Student, damping: float, task: Task) -> Student:
        """The Levenberg-Marquardt step, last row left to `Objective.solve`."""
        scale = np.diag(self.hessian)
        scale = np.maximum(scale, 1e-9 * scale.max())  # a time that the network ignores has a column of zeros
        scale[len(self.directions) :] *= 1e-6  # the last row is linear: damping it would only slow the step down
        left = self.hessian + damping * np.diag(scale)
        move = -np.linalg.lstsq(left, self.gradient, rcond=None)[0]
        for direction, amount in zip(self.directions, move, strict=False):
            student = direction.apply(student, float(amount), task)
        return student


def _normal_equations(task: Task, student: Student, samples: range, objective: Objective) -> NormalEquations:
    directions = list(_directions(task, student, samples))
    size = len(directions) + student.rows.shape[1]
    hessian, gradient, mass = np.zeros((size, size)), np.zeros(size), 0.0
    for chunk in task.recording.chunks(samples):
        run = task.rollout(student, chunk)
        residual = (run.x - task.recording.result(chunk).to(run.x)).flatten(1)
        errors = residual.square().mean(1).sqrt().cpu().numpy()
        weights = torch.as_tensor(objective.weights(errors), device=residual.device)
        moved = [_difference(task, student, each, run, chunk) for each in directions]
        jacobian = torch.cat([torch.stack(moved), run.columns]).flatten(2)
        weighted = (jacobian * weights[:, None]).flatten(1)
        hessian += (weighted @ jacobian.flatten(1).T).cpu().numpy()
        gradient += (weighted @ residual.flatten()).cpu().numpy()
        mass += float(weights.sum()) * residual.shape[1]
    if not (np.isfinite(hessian).all() and np.isfinite(gradient).all()):
        raise NetworkError(f"the network returned NaN or infinity near a student's rollout, at {student.timesteps}")
    return NormalEquations(directions, hessian / mass, gradient / mass)


def _directions(task: Task, student: Student, samples: range) -> Iterator[Direction]:
    """For each evaluation its rows' orthonormal directions and its time, in the order of the evaluations."""
    first = task.recording.chunks(samples)[0]
    columns = task.rollout(student, first).columns
    pixels = columns[0].numel()
    for k in range(1 if task.fixed_start else 0, student.nfe):
        known = student.known(k)
        r = triangle(columns[:known]) / np.sqrt(pixels)
        kept = np.flatnonzero(np.diag(r) > COLLINEAR * np.linalg.norm(r, axis=0))
        for coefficients in np.linalg.inv(np.linalg.qr(r[:, kept], mode="r")).T:
            row = np.zeros(known)
            row[kept] = coefficients
            yield Direction(k, row)
        if not task.schedule.whole_times:
            yield Direction(k, None)


def _difference(task: Task, student: Student, direction: Direction, run: Loop, chunk: slice) -> Tensor:
    """Forward difference of the sample of `run` along `direction`: only the evaluations from the changed one on run."""
    step = LOG_SNR_STEP if direction.row is None else STATE_STEP
    changed = direction.apply(student, step, task)
    if direction.row is None and changed.timesteps[direction.evaluation] == student.timesteps[direction.evaluation]:
        step = -step  # at the end of the schedule: look the other way
        changed = direction.apply(student, step, task)
    known = run.columns[: student.known(direction.evaluation)]
    return (task.rollout(changed, chunk, known).x - run.x) / step
