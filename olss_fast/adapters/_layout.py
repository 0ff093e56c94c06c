"""A plan laid out for running: its columns in the order in which they come to be, its weights on the device.

At step k (0 <= k < S) the output f_k arrives, then the noises are drawn that row k+1 needs, then row k+1 is formed.
With the columns ordered [x | f_0 z.. | f_1 z.. | …], row k+1 is one product of the first `ends[k]` columns with
`weights[k]`. x is the sample of step k where the plan is anchored (`olss_fast.executors.increments`). Else it is the
sample that the run began with, row 0 itself: column 0 is rows[:, 0] / rows[0, 0].

Noises are drawn in the order of their columns, each at the step where the row that needs it, or any later one, is
formed; that is when a sampler that draws in this order must have drawn it, so a generator's stream falls as it does
there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.executors.increments import increments
from olss_fast.plan import Floats, Plan

CANCELLING = 8.0
"""Ratio of terms to sum from which sums in float32 would lose more than the scheduler itself. At ten steps DDIM and
DPM-Solver++ reach 5, UniPC 6, SASolver and CogVideoXDPMScheduler 10 to 60."""


@dataclass
class Layout:
    """All lists have one entry a step; steps are counted from 0 at the first evaluation of the plan.

    slots: column of f_k. noise_slots: columns of the noises drawn at step k. ends: columns that exist after step k.
    corrections: of a plan that is not anchored, 1 / (share of x in row k), by which a change of that row counts as a
    change of x; 0 where row k and all later rows take nothing of x, None where only row k does. cancels: some row is a
    small sum of large terms.
    """

    plan: Plan
    slots: list[int]
    noise_slots: list[range]
    ends: list[int]
    weights: list[Floats]
    anchored: bool
    corrections: list[float | None]
    cancels: bool
    _on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = field(default_factory=dict)

    def dtype_of_sums(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """In which rows are formed: float64 for such samples, and for float32 ones of a plan that cancels."""
        wide = self.cancels and dtype == torch.float32 and device.type != "mps"  # which has no float64
        return torch.float64 if wide or dtype == torch.float64 else torch.float32

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`weights`, each (ends[k],), in one transfer; kept for the next run."""
        key = device, dtype
        if key not in self._on_device:
            with torch.inference_mode(False):  # so that they serve every later mode
                flat = torch.tensor(np.concatenate(self.weights).tolist(), dtype=dtype, device=device)
                self._on_device[key] = torch.split(flat, self.ends)
        return self._on_device[key]


def lay_out(plan: Plan, scales: Floats | float = 1.0) -> Layout:
    """Of rows in the unit of the states, row k / scales[k], k < S. InputError for a plan that no scheduler can run."""
    check_runnable(plan)
    states = plan.rows.copy()
    states[:-1] /= np.broadcast_to(scales, plan.nfe)[:, None]
    shares = states[:, 0] / states[0, 0]
    rows, anchored = increments(states, plan.noise_slice.start)
    draws = noises_of_steps(plan)
    slots, noise_slots, ends, order = list[int](), list[range](), list[int](), [0]
    for k, noises in enumerate(draws):
        slots.append(len(order))
        order += [1 + k, *noises]
        noise_slots.append(range(slots[-1] + 1, len(order)))
        ends.append(len(order))
    weights = [rows[k + 1, order[:end]] for k, end in enumerate(ends)]
    if not anchored:
        for weight, share in zip(weights, shares[1:], strict=True):
            weight[0] = share
    cancels = _cancellation(plan, scales, weights, anchored) > CANCELLING
    return Layout(plan, slots, noise_slots, ends, weights, anchored, _corrections(shares), cancels)


def _cancellation(plan: Plan, scales: Floats | float, weights: list[Floats], anchored: bool) -> float:
    """The largest ratio of the terms of a state to the state, where outputs and noises have size 1."""
    sizes = np.hypot(plan.alphas, plan.sigmas)
    sizes[:-1] /= scales
    terms = [
        abs(weight[0]) * sizes[k if anchored else 0] + np.abs(weight[1:]).sum() for k, weight in enumerate(weights)
    ]
    return float((terms / sizes[1:]).max())


def noises_of_steps(plan: Plan) -> list[list[int]]:
    """The noise columns drawn at each step."""
    noise_rows = plan.rows[:, plan.noise_slice] != 0
    needed = np.where(noise_rows.any(axis=0), noise_rows.argmax(axis=0), plan.nfe)  # first row that uses each
    drawn = np.minimum.accumulate(needed[::-1])[::-1] - 1
    first = plan.noise_slice.start
    return [[first + int(z) for z in np.flatnonzero(drawn == k)] for k in range(plan.nfe)]


def check_runnable(plan: Plan) -> None:
    """What a scheduler's slot cannot do."""
    if plan.branches != 1:
        raise InputError(
            "this plan weighs the unconditional and the conditional output apart (branches=2), but a pipeline hands "
            "its scheduler the guided output only; give a plan with branches=1"
        )
    if plan.models.any():
        raise InputError(
            f"this plan asks networks 0 to {plan.models.max()}, but a pipeline has one; give a plan of a single network"
        )
    if plan.rows[0, 0] == 0 or plan.rows[0, 1:].any():
        raise InputError(
            f"row 0 of this plan is {plan.rows[0, :4]}…; expected the initial noise times a number that is not 0"
        )


def _corrections(shares: Floats) -> list[float | None]:
    later = np.abs(shares)[::-1].cumsum()[::-1]
    pairs = zip(shares[:-1].tolist(), later.tolist(), strict=False)
    return [1.0 / share if share else (None if rest else 0.0) for share, rest in pairs]
