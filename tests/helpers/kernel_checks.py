"""What the kernels must do, checked by an independent twin in float64: on the CPU, in Triton's interpreter, on a GPU.

Every buffer lies between margins of a known value, and every slot that nobody has written holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.kernels import StepState
from olss_fast.plan.plan import Plan

MARGIN = 64  # elements: keeps what lies between as aligned as memory itself
SENTINEL = 77


class Guarded:
    """Buffers between margins that nobody may write to."""

    def __init__(self, device: str = "cpu", offset: int = 0) -> None:
        self.device, self.offset = device, offset
        self.margins: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        """NaN (or the sentinel, for integers), `offset` elements beyond an aligned address."""
        numel, begin = int(np.prod(shape)), MARGIN + self.offset
        memory = torch.full((begin + numel + MARGIN,), SENTINEL, dtype=dtype, device=self.device)
        self.margins += [memory[:begin], memory[begin + numel :]]
        inner = memory[begin : begin + numel]
        if dtype.is_floating_point:
            inner.fill_(float("nan"))
        if channels_last:
            batch, channels, height, width = shape
            return inner.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return inner.view(shape)

    def assert_margins(self) -> None:
        for margin in self.margins:
            assert bool((margin == SENTINEL).all()), "a value outside of the buffers was written"


def guarded_state(
    guard: Guarded,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    steps: int,
    noises: int = 0,
    branches: int = 1,
    doubled: bool = False,
    channels_last: bool = False,
    times: int = 3,
    spare: int = 0,
    anchored: bool = True,
) -> StepState:
    """Random coefficients and noise between margins; `spare` rows and columns are left over, columns `spare` wider."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    batch = (shape[0] * (1 + doubled), *shape[1:])
    columns, height, size = 1 + (steps + spare) * branches + noises, steps + 1 + spare, int(np.prod(shape))
    state = StepState(
        history=guard.empty(columns, size + spare, dtype=dtype)[:, :size],
        rows=guard.empty(height, columns, dtype=sums),
        timesteps=guard.empty(height, dtype=torch.float32),
        guidance=guard.empty(1, dtype=sums).view(()),
        finished=guard.empty(1, dtype=torch.int32).view(()),
        noise_counts=guard.empty(height, dtype=torch.int32),
        noise_start=guard.empty(1, dtype=torch.int32).view(()),
        anchored=guard.empty(1, dtype=torch.int32).view(()),
        x=guard.empty(*batch, dtype=dtype, channels_last=channels_last),
        time=guard.empty(times, dtype=torch.float32),
        branches=branches,
        doubled=doubled,
    )
    state.rows.copy_(random(*state.rows.shape, seed=1))
    state.timesteps.copy_(random(height, seed=2) * 100)
    state.guidance.fill_(2.5)
    state.noise_start.fill_(columns - noises)
    state.anchored.fill_(anchored)
    state.noise_counts.copy_((torch.arange(height) * noises) // max(1, steps))
    state.history[0] = random(size, seed=3)
    state.history[columns - noises :] = random(noises, size, seed=4)
    return state


def load_plan(state: StepState, plan: Plan) -> None:
    """A plan's coefficients and times, each where the step looks for it."""
    state.rows.zero_()
    noise = plan.noise_slice.start
    rows = torch.tensor(plan.rows, dtype=state.rows.dtype)
    begin = state.history.shape[0] - plan.noises
    state.rows[: plan.nfe + 1, :noise] = rows[:, :noise]
    state.rows[: plan.nfe + 1, begin:] = rows[:, noise:]
    state.timesteps[: plan.nfe] = torch.tensor(plan.timesteps, dtype=torch.float32)
    state.noise_counts.fill_(plan.noises)
    state.noise_start.fill_(begin)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_within_budget(*, fast: Tensor, reference: Tensor, eager: Tensor, magnitude: Tensor) -> None:
    """max |fast - reference| <= 2 max |eager - reference|, over all elements.

    Besides, one rounding of the result to the dtype of `fast`, and four of the sum of all magnitudes to that of its
    sums: few elements may be exact by luck in eager torch.
    """
    assert fast.shape == reference.shape == eager.shape
    assert bool(torch.isfinite(fast).all()), "a slot that was never written was read"
    if fast.numel() == 0:
        return
    error, budget = (float((value.double() - reference).abs().max()) for value in (fast, eager))
    sums = torch.float64 if fast.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(fast.dtype).eps * float(reference.abs().max())
    rounding += 4 * torch.finfo(sums).eps * float(magnitude.max())
    assert error <= 2 * budget + rounding, f"error {error:.3g} where eager {fast.dtype} has {budget:.3g}"


def eager_sum(columns: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum as written down in eager torch: one product and one sum after the other, each rounded."""
    total = torch.zeros_like(columns[0])
    for column, weight in zip(columns, weights.to(columns[0].dtype), strict=True):
        total = total + weight * column
    return total


def exact_sum(columns: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum in float64, of sums and products in more (80 bits where the machine has them)."""
    total = np.zeros(columns[0].shape, np.longdouble)
    for column, weight in zip(columns, weights.double().tolist(), strict=True):
        total += np.longdouble(weight) * column.double().cpu().numpy().astype(np.longdouble)
    return torch.from_numpy(total.astype(np.float64)).to(columns[0].device)


Start = Callable[[StepState], None]
Step = Callable[[Tensor, StepState], None]


def check_run(start: Start, step: Step, guard: Guarded, state: StepState, *, steps: int, begin: int = 0) -> None:
    """`start` and `steps` times `step` on random outputs, each against the equations.

    `begin` > 0: the steps before it are taken as done, to come to many columns in little time.
    """
    reference, eager = _Twin(state, torch.float64, exact_sum), _Twin(state, state.x.dtype, eager_sum)
    if begin == 0:
        start(state)
        _check_row(state, reference, eager, 0)
    else:
        state.x.copy_(random(*state.x.shape, seed=5))
    for k in range(steps):
        output = _output(guard, state, seed=10 + k)
        before = state.history.clone()
        reference.take(output)
        eager.take(output)
        if k < begin:
            columns = range(1 + k * state.branches, 1 + (k + 1) * state.branches)
            state.history[columns] = torch.stack([reference.known[j] for j in columns]).to(state.history.dtype)
            state.finished.fill_((k + 1) * state.programs)
            continue
        if state.anchored and state.x.dtype == state.rows.dtype:
            handed = state.halves(state.x)[0].clone()
            for twin in (reference, eager):
                twin.known[0] = handed.to(twin.dtype)
            for history in (state.history, before):
                history[0] = float("nan")  # x_T is not read
        step(output, state)
        _check_history(state, before, reference, output, k)
        _check_row(state, reference, eager, k + 1)
    guard.assert_margins()


def _check_row(state: StepState, reference: _Twin, eager: _Twin, row: int) -> None:
    for half in state.halves(state.x):
        expected, magnitude = reference.row(row), reference.row(row, magnitude=True)
        assert_within_budget(fast=half, reference=expected, eager=eager.row(row), magnitude=magnitude)
    assert bool((state.time == state.timesteps[row]).all())
    assert int(state.finished) == row * state.programs


def check_step_too_many(step: Step, guard: Guarded, state: StepState) -> None:
    """A step beyond the last row changes nothing."""
    state.finished.fill_((len(state.rows) - 1) * state.programs)
    output = _output(guard, state, seed=9)
    before = [value.clone() for value in state[:-2]]
    step(output, state)
    for old, new in zip(before, state[:-2], strict=True):
        assert torch.equal(old.nan_to_num(SENTINEL), new.nan_to_num(SENTINEL))
    guard.assert_margins()


def _output(guard: Guarded, state: StepState, seed: int) -> Tensor:
    channels_last = state.x.ndim == 4 and not state.x.is_contiguous()
    output = guard.empty(*state.x.shape, dtype=state.x.dtype, channels_last=channels_last)
    return output.copy_(random(*state.x.shape, seed=seed))


class _Twin:
    """The equations in one precision, with a dictionary for a history."""

    def __init__(self, state: StepState, dtype: torch.dtype, sum_of: Callable[..., Tensor]) -> None:
        self.state, self.dtype, self.sum_of = state, dtype, sum_of
        self.known = {0: state.history[0].to(dtype)}
        begin = int(state.noise_start)
        self.noises = {j: state.history[j].to(dtype) for j in range(begin, len(state.history))}

    def take(self, output: Tensor) -> None:
        halves = list(self.state.halves(output).to(self.dtype))
        if self.state.doubled and self.state.branches == 1:
            unconditional, conditional = halves
            halves = [unconditional + self.state.guidance.to(self.dtype) * (conditional - unconditional)]
        for half in halves:
            self.known[len(self.known)] = half

    def row(self, k: int, *, magnitude: bool = False) -> Tensor:
        """Row k over the history, or the same of absolute values."""
        noises = list(self.noises)[: int(self.state.noise_counts[k])]
        columns = self.known | {j: self.noises[j] for j in noises}
        weights = self.state.rows[k].to(self.dtype)[list(columns)]
        if magnitude:
            return self.sum_of([column.abs() for column in columns.values()], weights.abs())
        return self.sum_of(list(columns.values()), weights)


def _check_history(state: StepState, before: Tensor, reference: _Twin, output: Tensor, k: int) -> None:
    """The output's columns are written, and no other."""
    columns = range(1 + k * state.branches, 1 + (k + 1) * state.branches)
    for j, half in zip(columns, state.halves(output), strict=False):
        if state.doubled and state.branches == 1:
            rounded = reference.known[j].to(state.x.dtype)
            eps = torch.finfo(state.x.dtype).eps
            torch.testing.assert_close(state.history[j], rounded, rtol=2 * eps, atol=8 * eps)
        else:
            assert torch.equal(state.history[j], half)
    others = [j for j in range(len(before)) if j not in columns]
    assert torch.equal(before[others].nan_to_num(SENTINEL), state.history[others].nan_to_num(SENTINEL))


Lincomb = Callable[[Any, Tensor], Tensor]


def check_lincomb(lincomb: Lincomb, columns: int, size: int, dtype: torch.dtype, *, device: str = "cpu") -> None:
    """Stacked and separate tensors of any count and size, aligned or not, against float64."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    weights = random(columns, seed=columns).to(device, sums)
    for offset in (0, 1):
        guard = Guarded(device, offset)
        stacked = guard.empty(columns, size, dtype=dtype).copy_(random(columns, size, seed=size))
        separate = [guard.empty(size, dtype=dtype).copy_(column) for column in stacked]
        reference = exact_sum(list(stacked), weights)
        magnitude = exact_sum(list(stacked.abs()), weights.abs())
        eager = eager_sum(list(stacked), weights)
        for tensors in (stacked, separate):
            result = lincomb(tensors, weights)
            assert_within_budget(fast=result, reference=reference, eager=eager, magnitude=magnitude)
        guard.assert_margins()


def check_lincomb_leaves_margins(launch: Callable[..., None], columns: int, size: int, dtype: torch.dtype) -> None:
    """What is launched writes all of `out`, and nothing beyond it."""
    guard = Guarded()
    out = guard.empty(size, dtype=dtype)
    launch(out, torch.ones((columns, size), dtype=dtype), torch.ones(columns))
    assert bool((out == columns).all())
    guard.assert_margins()


# --- Triton's interpreter: these run in a process of their own, where TRITON_INTERPRET is set -------------------------


def interpreted_run(
    shape: tuple[int, ...], dtype: str, *, steps: int, begin: int = 0, offset: int = 0, **options: Any
) -> None:
    from olss_fast.kernels._step_triton import launch

    guard = Guarded(offset=offset)
    state = guarded_state(guard, shape, getattr(torch, dtype), steps=steps, **options)
    check_run(lambda s: launch(None, s), launch, guard, state, steps=steps, begin=begin)


def interpreted_step_too_many(shape: tuple[int, ...], dtype: str, *, steps: int) -> None:
    from olss_fast.kernels._step_triton import launch

    guard = Guarded()
    state = guarded_state(guard, shape, getattr(torch, dtype), steps=steps)
    check_step_too_many(launch, guard, state)


def interpreted_lincomb(columns: int, size: int, dtype: str) -> None:
    from olss_fast.kernels import _lincomb_triton

    def run(tensors: Any, weights: Tensor) -> Tensor:
        out = torch.full_like(tensors[0], float("nan"))
        separate = isinstance(tensors, list)
        launch = _lincomb_triton.launch_separate if separate else _lincomb_triton.launch_stacked
        launch(out, tensors, weights)
        return out

    check_lincomb(run, columns, size, getattr(torch, dtype))
    check_lincomb_leaves_margins(_lincomb_triton.launch_stacked, columns, size, getattr(torch, dtype))
