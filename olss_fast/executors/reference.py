"""The reference executor: rows . basis in float64. The specification that every other executor is measured against.

Row i of the plan times the basis [x_T | f_0 .. | z_1 ..] is the network input at evaluation i, row S the sample.
Raw outputs are kept exactly as the network wrote them and each row is formed afresh from them, so no rounding error
is carried from step to step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olss_fast.plan import Plan

Evaluate = Callable[..., Tensor]
"""`evaluate(x, timestep, branches=, model=)` -> raw outputs (branches, B, ...)."""

OnStep = Callable[[int, Tensor], None]
"""`on_step(i, x)`: after evaluation i, with row i + 1 of the plan: the next network input, in the end the sample."""


def combine(row: Tensor, columns: Tensor) -> Tensor:
    """sum_j row[j] columns[j] for columns (C, B, ...), in float64."""
    shape = columns.shape[1:]
    return (row @ columns.reshape(columns.shape[0], -1)).reshape(shape)


def run(
    plan: Plan,
    evaluate: Evaluate,
    noise: Tensor,
    *,
    dtype: torch.dtype | None = None,
    step_noise: Tensor | None = None,
    on_output: Callable[[int, Tensor], None] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The sample (B, ...) in float64, from unit initial noise (B, ...).

    `dtype` is what the network is handed (default: the noise's), `step_noise` (Z, B, ...) the fresh unit noises of a
    stochastic plan. `on_output(i, outputs)` sees the raw outputs (branches, B, ...) of each evaluation, `on_step(i, x)`
    row i + 1: what comes of it.
    """
    dtype = dtype or noise.dtype
    rows = torch.tensor(plan.rows, device=noise.device)
    basis = torch.zeros((plan.columns, *noise.shape), dtype=torch.float64, device=noise.device)
    basis[0] = noise
    if step_noise is not None:
        basis[plan.noise_slice] = step_noise.to(basis)
    for i in range(plan.nfe):
        x = combine(_used(rows[i], plan, i), _available(basis, plan, i)).to(dtype)
        if on_step is not None and i > 0:
            on_step(i - 1, x)
        output = evaluate(x, float(plan.timesteps[i]), branches=plan.branches, model=int(plan.models[i]))
        if on_output is not None:
            on_output(i, output)
        basis[plan.output_slice(i)] = output.to(basis.dtype)
    sample = combine(rows[plan.nfe], basis)
    if on_step is not None:
        on_step(plan.nfe - 1, sample)
    return sample


def _available(basis: Tensor, plan: Plan, evaluation: int) -> Tensor:
    """The columns that exist at `evaluation`: a causal row is zero on all others, and short sums are cheap."""
    known = 1 + evaluation * plan.branches
    return basis[:known] if plan.noises == 0 else torch.cat([basis[:known], basis[plan.noise_slice]])


def _used(row: Tensor, plan: Plan, evaluation: int) -> Tensor:
    known = 1 + evaluation * plan.branches
    return row[:known] if plan.noises == 0 else torch.cat([row[:known], row[plan.noise_slice]])
