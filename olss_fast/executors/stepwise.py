"""One run of a plan, one step at a time: its history and its position.

Costs per step, for any plan: one copy of the new columns into the history, one matrix-vector product over the columns
that the row needs, and one cast if the sum is wider than the sample. Fresh noise is drawn besides, and a plan that is
not anchored (`Layout`) forms the previous row again to detect changes of the sample from outside.
Nothing is read back by the host. Only operators that work on fake tensors of an absent device are used (no [], no
copy_).

Columns are stored in order of arrival. At step k (0 <= k < S) the output f_k arrives, then the noises that row k+1
needs are drawn, then row k+1 is formed. If the plan is anchored (`increments`) the order is [f_0 z.. | f_1 z.. | …],
with the sample x_k after the columns of step k, where f_{k+1} will be. So row k+1 is one product of the last few
columns: a solver of order p needs p outputs. Otherwise the order is [x_0 | f_0 z.. | …], with x_0 the initial sample,
row 0 itself: the coefficients of x_0 are rows[:, 0] / rows[0, 0].

Noises are drawn in the order of their columns, each at the step that forms the first row needing it or a later one.
A sampler that draws in this order must have drawn it by then, so both use a generator's stream alike.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.errors import InputError, NetworkError
from olss_fast.executors.draws import unit_noise
from olss_fast.executors.increments import increments
from olss_fast.network import FLOATS
from olss_fast.plan.plan import Floats, Plan
from olss_fast.support.device import Moved

CANCELLING = 1.5
"""Ratio of terms to sum above which rows of float32 samples are formed in float64. From a ratio of 2 on, rounding costs
up to 2.6 times the error of the scheduler's own recurrence. Plans for noise prediction reach it (DDIM 4, UniPC 6,
SASolver 58); flow matching, with the largest latents, and most plans for v stay below."""


@dataclass
class Layout:
    """All lists have one entry per step; steps count from 0 at the first evaluation of the plan.

    scales: network input / state. scaled: some are not 1.
    slots: column of f_k. noise_slots: columns of the noises drawn at step k. sample_slots: column of x_k, or of x_0.
    begins: the first column that row k+1 needs; weights: of the columns from there on. corrections: for a plan that is
    not anchored, 1 / (share of x in row k), which turns a change of that row into a change of x; 0 if row k and all
    later rows do not use x, None if only row k does not. cancels: some row is a small sum of large terms.
    """

    plan: Plan
    scales: Floats
    scaled: bool
    slots: list[int]
    noise_slots: list[range]
    sample_slots: list[int]
    begins: list[int]
    weights: list[Floats]
    anchored: bool
    corrections: list[float | None]
    cancels: bool
    _on_device: Moved = field(default_factory=Moved)

    def ready_on(self, device: torch.device) -> Layout:
        """Itself, with its weights on `device` for samples of 16 or 32 bits: a step then moves nothing."""
        for dtype in (torch.float16, torch.float32):
            self.weights_on(device, self.dtype_of_sums(dtype, device))
        return self

    @property
    def columns(self) -> int:
        """Number of columns of a history."""
        return self.begins[-1] + len(self.weights[-1])

    def dtype_of_sums(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype in which rows are summed: float64 for float64 samples, and for float32 ones if the plan cancels."""
        wide = self.cancels and dtype == torch.float32 and device.type != "mps"  # which has no float64
        return torch.float64 if wide or dtype == torch.float64 else torch.float32

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`weights` in one transfer; kept for the next run."""
        return self._on_device.of((device, dtype), lambda: self._moved(device, dtype))

    def _moved(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        with torch.inference_mode(False):  # usable in every later mode
            flat = torch.tensor(np.concatenate(self.weights).tolist(), dtype=dtype, device=device)
            return torch.split(flat, [len(each) for each in self.weights])


def lay_out(plan: Plan, scales: Floats | None = None) -> Layout:
    """The layout of the scheduler's states, row k / scales[k], k < S. InputError for a plan no scheduler can run."""
    check_runnable(plan)
    scales = np.ones(plan.nfe) if scales is None else scales
    states = plan.rows.copy()
    states[:-1] /= scales[:, None]
    shares = states[:, 0] / states[0, 0]
    rows, anchored = increments(states, plan.noise_slice.start)
    if not anchored:
        rows[1:, 0] = shares[1:]
    cancels = _cancellation(plan, scales, rows, anchored) > CANCELLING
    scaled = bool((scales != 1.0).any())
    found = Layout(plan, scales, scaled, [], [], [], [], [], anchored, _corrections(shares), cancels)
    order = [] if anchored else [0]
    for k, noises in enumerate(noises_of_steps(plan)):
        found.slots.append(len(order))
        order += [1 + k, *noises]
        found.noise_slots.append(range(found.slots[-1] + 1, len(order)))
        found.sample_slots.append(len(order) if anchored else 0)
        weights = rows[k + 1, [*order, 0] if anchored else order]
        found.begins.append(int((weights != 0.0).argmax()) if anchored else 0)
        found.weights.append(weights[found.begins[-1] :])
    return found


def _cancellation(plan: Plan, scales: Floats, rows: Floats, anchored: bool) -> float:
    """The largest ratio of the terms of a state to the state, where outputs and noises have size 1."""
    sizes = np.hypot(plan.alphas, plan.sigmas)
    sizes[:-1] /= scales
    carried = sizes[:-1] if anchored else sizes[0]
    terms = np.abs(rows[1:, 0]) * carried + np.abs(rows[1:, 1:]).sum(axis=1)
    return float((terms / sizes[1:]).max())


def noises_of_steps(plan: Plan) -> list[list[int]]:
    """The noise columns drawn at each step."""
    noise_rows = plan.rows[:, plan.noise_slice] != 0
    needed = np.where(noise_rows.any(axis=0), noise_rows.argmax(axis=0), plan.nfe)  # first row that uses each
    drawn = np.minimum.accumulate(needed[::-1])[::-1] - 1
    first = plan.noise_slice.start
    return [[first + int(z) for z in np.flatnonzero(drawn == k)] for k in range(plan.nfe)]


def check_runnable(plan: Plan) -> None:
    """InputError for plans that a scheduler's slot cannot run."""
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


Generator = torch.Generator | list[torch.Generator] | None


class Run:
    """`step` counts this plan's evaluations; `history` is (columns, numel) in the order of `Layout`.

    `readable`: values can be read without waiting for a device. noise_dtype: of the noises drawn, by default the model
    output's. InputError unless the sample is a floating-point tensor of at least 16 bits.
    """

    def __init__(self, layout: Layout, sample: Tensor, noise_dtype: torch.dtype | None = None) -> None:
        if not isinstance(sample, Tensor) or sample.dtype not in FLOATS or sample.numel() == 0:
            what = f"{sample.dtype} {tuple(sample.shape)}" if isinstance(sample, Tensor) else type(sample).__name__
            raise InputError(
                f"the sample is {what}; expected a floating-point tensor of latents or pixels, of 16, 32 or 64 bits"
            )
        self.layout, self.noise_dtype = layout, noise_dtype
        self.step = 0
        self.shape, self.device, self.dtype = sample.shape, sample.device, sample.dtype
        self.numel, self.kind = sample.numel(), sample.device.type
        self.readable = self.kind == "cpu" and type(sample) is Tensor
        self.strides = torch.empty(sample.shape, device="meta").stride()
        precision = layout.dtype_of_sums(sample.dtype, sample.device)
        self.exact = sample.dtype == precision
        self.weights = layout.weights_on(sample.device, precision)
        self.history = torch.empty((layout.columns, self.numel), dtype=precision, device=sample.device)
        self.steps = len(self.weights)
        self.begun_with = self.returned = sample
        self.version = _version(sample)

    def advance(self, model_output: Tensor, sample: Tensor, generator: Generator = None) -> Tensor:
        """Row step+1. Errors as in `PlanScheduler.step`."""
        k = self.step
        if k == self.steps:
            raise InputError(f"a step was asked for after all {k} of this run; call set_timesteps before the next run")
        if not self._fits(model_output):
            model_output = self._matching(model_output)
        layout, columns, arrived = self.layout, [self.layout.slots[k]], [model_output]
        if sample is not self.returned:
            self._check("sample", sample, InputError)
        if k == 0 or layout.anchored:
            columns, arrived = [*columns, layout.sample_slots[k]], [model_output, sample]
        else:
            self._take_changes(sample)
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]  # for all samples, as in diffusers
        for column in layout.noise_slots[k]:
            columns.append(column)
            dtype = self.noise_dtype or model_output.dtype
            arrived.append(unit_noise(self.shape, generator, self.device, dtype=dtype))
        if self.history.requires_grad or model_output.requires_grad or sample.requires_grad:
            for column, tensor in zip(columns, arrived, strict=True):
                self._column(column).copy_(tensor)
        else:  # one kernel for all, which has no derivative
            torch._foreach_copy_([self._column(column) for column in columns], arrived)
        row = self._row(k)
        self.step, self.returned, self.version = k + 1, row, _version(row)
        return row

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """An independent run from here on. Gradients flow back through the shared past to the same leaves."""
        again = copy.copy(self)
        again.history = self.history.clone()
        return again

    def first_not_finite(self) -> int | None:
        """The first evaluation whose output has NaN or infinity, -1 for the initial sample, or None."""
        outputs = [self.history.select(0, column) for column in self.layout.slots[: self.step]]
        finite = torch.stack([torch.isfinite(each).all() for each in (self.begun_with, *outputs)])
        bad = (~finite).nonzero().flatten().tolist()
        return bad[0] - 1 if bad else None

    def _row(self, k: int) -> Tensor:
        """Row k+1, a new tensor of the sample's dtype and shape."""
        weights, begin = self.weights[k], self.layout.begins[k]
        columns = self.history.as_strided((self.numel, weights.shape[0]), (1, self.numel), begin * self.numel)
        if torch.is_autocast_enabled(self.kind):
            with torch.autocast(self.kind, enabled=False):  # which would form the row in half precision
                row = torch.mv(columns, weights)
        else:
            row = torch.mv(columns, weights)
        row = row.as_strided(self.shape, self.strides)
        return row if self.exact else row.to(self.dtype)

    def _column(self, column: int) -> Tensor:
        return self.history.as_strided(self.shape, self.strides, column * self.numel)

    def _take_changes(self, sample: Tensor) -> None:
        """Continues from a sample that may differ from row `step`, as if the run had started from another one."""
        correction = self.layout.corrections[self.step]
        if correction is None and self._is_changed(sample):
            raise InputError(
                f"the sample was changed before step {self.step}, and this plan's row there takes nothing of the "
                "initial noise that could carry the change on; leave the sample alone, or use a deterministic plan"
            )
        if correction:
            row = self._row(self.step - 1).to(self.history.dtype)
            self._column(0).add_(sample.to(self.history.dtype) - row, alpha=correction)

    def _is_changed(self, sample: Tensor) -> bool:
        """Compares values; if reading them would wait for a device, checks if it was replaced or written to."""
        if self.readable and not torch.compiler.is_compiling():
            return not torch.equal(sample, self._row(self.step - 1))
        versions = _version(sample), self.version
        return sample is not self.returned or (None not in versions and len({*versions}) == 2)

    def _matching(self, model_output: Any) -> Tensor:
        """The output without its predicted variance, if it has one. NetworkError for any other shape."""
        if isinstance(model_output, Tensor) and model_output.ndim == len(self.shape) > 1:
            channels = self.shape[1]
            if model_output.shape[1] == 2 * channels:
                model_output = model_output.narrow(1, 0, channels)
        self._check("model_output", model_output, NetworkError)
        return model_output  # type: ignore[no-any-return]

    def _fits(self, tensor: Any) -> bool:
        same = isinstance(tensor, Tensor) and tensor.shape == self.shape and tensor.device == self.device
        return same and tensor.dtype in FLOATS

    def _check(self, name: str, tensor: Any, error: type[InputError] | type[NetworkError]) -> None:
        if not isinstance(tensor, Tensor):
            raise error(f"{name} of step {self.step} is a {type(tensor).__name__}; expected a tensor")
        if not self._fits(tensor):
            raise error(
                f"{name} of step {self.step} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; this run "
                f"began with {self.dtype} {tuple(self.shape)} on {self.device}: call set_timesteps before another run"
            )


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None if not tracked."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
