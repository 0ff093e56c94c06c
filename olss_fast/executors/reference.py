"""The reference executor: rows . basis in float64. Every other executor is tested against it.

Row i of a plan times the basis [x_T | f_0 .. | z_1 ..] is the network input at evaluation i, row S the sample. Raw
outputs are kept exactly as the network returned them and each row is computed from them directly, so no rounding error
is carried from step to step. This is the only loop over a plan in torch: sampling, recording, fitting, scoring run it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from olss_fast.executors.increments import increments
from olss_fast.plan.plan import Plan

Evaluate = Callable[..., Tensor]
"""`evaluate(x, timestep, branches=, model=)` -> raw outputs (branches, B, ...). It does not modify x."""

OnStep = Callable[[int, Tensor], None]
"""`on_step(i, x)`: after evaluation i, with row i + 1 of the plan: the next network input, or finally the sample."""

LONG = 16  # evaluations; up to here, adding all columns costs less than checking if two suffice


class Steps(Protocol):
    """The fields of a Plan that a loop runs: a Plan, or rows that are still being fitted.

    `rows` and `timesteps` are arrays, or tensors that require gradients (on the device of the columns).
    """

    @property
    def rows(self) -> Any: ...
    @property
    def timesteps(self) -> Any: ...
    @property
    def models(self) -> Any: ...
    @property
    def branches(self) -> int: ...


class Loop:
    """One run of a plan: its columns so far, and the rows formed from them.

    It starts from `columns` (1 + i branches, B, ...): noise[None], or those of another run before evaluation i, and
    gets further ones from the network (`ask`, `finish`) or from the caller (`push`). `step_noise` (Z, B, ...) are the
    fresh unit noises of a stochastic plan. Everything is float64, on the columns' device. With gradients enabled, a
    loop is differentiable in rows, timesteps, columns and weights; under `torch.no_grad()` it writes in place.
    """

    def __init__(self, steps: Steps, columns: Tensor, *, step_noise: Tensor | None = None) -> None:
        self._noises: int = steps.rows.shape[1] - 1 - len(steps.timesteps) * steps.branches
        self._x: Tensor | None
        self._pairs: list[tuple[float, float]] | None
        self.evaluation = (len(columns) - 1) // steps.branches  # the next one
        self._known = self._noises + len(columns)
        self._joins = torch.is_grad_enabled()
        size = self._known if self._joins else steps.rows.shape[1]
        self._basis = columns.new_empty((size, *columns.shape[1:]), dtype=torch.float64)  # [z_1 .. | x_T | f_0 ..]
        self._basis[self._noises : self._known] = columns
        if self._noises:
            self._basis[: self._noises] = 0.0 if step_noise is None else step_noise
        self.follow(steps)
        self._pairs = _one_step(steps) if len(steps.timesteps) > LONG and not self._noises else None

    def follow(self, steps: Steps) -> Loop:
        """Continue with other steps, such as the same plus one more fitted row."""
        rows = steps.rows if isinstance(steps.rows, Tensor) else torch.tensor(steps.rows, device=self._basis.device)
        self.plan, self._x, self._pairs = steps, None, None
        self._rows = rows.roll(self._noises, 1) if self._noises else rows
        return self

    @property
    def done(self) -> bool:
        return self.evaluation == len(self.plan.timesteps)

    @property
    def columns(self) -> Tensor:
        """The columns [x_T | f_0 .. ] known so far, (1 + evaluation branches, B, ...)."""
        return self._basis[self._noises : self._known]

    @property
    def x(self) -> Tensor:
        """The next network input (B, ...), or after the last evaluation the sample."""
        if self._x is None:
            row, known = self._rows[self.evaluation, : self._known], self._basis[: self._known]
            self._x = (row @ known.flatten(1)).reshape(known.shape[1:])
        return self._x

    def push(self, outputs: Tensor) -> None:
        """Append the raw outputs (branches, B, ...) of the evaluation at `x`."""
        x, self._x = self._x, None
        if self._joins:
            self._basis = torch.cat([self._basis, outputs.to(self._basis)])
        else:
            self._basis[self._known : self._known + len(outputs)] = outputs
        self._known += len(outputs)
        if self._pairs is not None and x is not None:
            rho, b = self._pairs[self.evaluation]
            self._x = rho * x + b * self._basis[self._known - 1]
        self.evaluation += 1

    def ask(self, evaluate: Evaluate) -> Tensor:
        """One evaluation: its raw outputs (branches, B, ...)."""
        i, plan = self.evaluation, self.plan
        time = plan.timesteps[i] if isinstance(plan.timesteps, Tensor) else float(plan.timesteps[i])
        outputs = evaluate(self.x, time, branches=plan.branches, model=int(plan.models[i]))
        self.push(outputs)
        return outputs

    def finish(self, evaluate: Evaluate) -> Loop:
        """Run the remaining evaluations; then `x` is the sample."""
        while not self.done:
            self.ask(evaluate)
        return self

    def fork(self, steps: Steps) -> Loop:
        """A loop of other steps, at most as many as memory was allocated for, from the columns so far. Both share
        memory: finish a fork before this loop, or another fork of it, continues."""
        return copy.copy(self).follow(steps)


def run(
    plan: Plan, evaluate: Evaluate, noise: Tensor, *, dtype: torch.dtype | None = None, step_noise: Tensor | None = None
) -> Tensor:
    """The sample (B, ...) in float64, from unit initial noise (B, ...).

    `dtype` is that of the network's input (default: the noise's), `step_noise` as for `Loop`.
    """
    handed = dtype or noise.dtype
    loop = Loop(plan, noise[None], step_noise=step_noise)
    return loop.finish(lambda x, timestep, **how: evaluate(x.to(handed, copy=True), timestep, **how)).x


def _one_step(steps: Steps) -> list[tuple[float, float]] | None:
    """(rho_i, b_i) with row i+1 = rho_i row i + b_i f_i, or None if the rows look further back.

    Those of DDIM and Euler do not. Their states then read two columns instead of i: over 100 steps the basis is read
    once instead of 50 times.
    """
    if steps.branches != 1 or isinstance(steps.rows, Tensor):
        return None
    found = increments(steps.rows, steps.rows.shape[1])
    rest = found.rows[1:, 1:]
    if not found.anchored or rest[~np.eye(len(rest), dtype=bool)].any():
        return None
    return list(zip(found.rows[1:, 0].tolist(), rest.diagonal().tolist(), strict=True))
