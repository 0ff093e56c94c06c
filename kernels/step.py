"""One step of a plan between two network calls, in one pass: guidance, history, next network input.

Symbols: N elements of one sample batch, S evaluations, b branches (`olss_fast.plan`), R >= S + 1 rows, T network times.
With the raw output f of evaluation k (doubled batch: the unconditional half u first, then the conditional half c):

    history[1 + k]                        = f                    not doubled
    history[1 + k]                        = u + g (c - u)        doubled, b = 1; formed in float32 and rounded once
    history[1 + 2k], history[2 + 2k]      = u, c                 doubled, b = 2
    x = sum over known columns j of rows[k+1, j] history[j]      in float32, rounded once; both halves where doubled
    time = timesteps[k+1]
    k = k + 1

Known are column 0 (x_T), the outputs of evaluations 0 … k, and noise_counts[k+1] columns from noise_start on. No other
column is read: it may hold anything, including NaN. float64 data has float64 sums. If float32 or float64 data is
`anchored`, rows[k+1, 0] is the coefficient of the previous x, not of x_T (`olss_fast.executors.increments`): the
network must not modify x.

Everything that differs between runs is in device memory: plan, number of steps, guidance scale and the step itself. So
one CUDA graph of network and step, replayed S times, is a sampler, and another plan needs neither a compilation nor a
capture. Nothing is read back by the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.kernels._checks import (
    DTYPES,
    accumulator,
    define,
    describe,
    expect,
    expect_dense,
    expect_like,
    refuse_gradients,
    refuse_overlaps,
)
from olss_fast.kernels._grid import grid
from olss_fast.kernels.lincomb import weighted_sum
from olss_fast.support.arguments import checked_count


class StepState(NamedTuple):
    """Device memory of a run. A named tuple: torch.compile and torch.export see its tensors.

    history: (columns, N) of the network's dtype; each column contiguous, in the memory order of `x`. Column 0 is x_T,
        then come the outputs, then from `noise_start` on the fresh noises, filled in by the caller.
    rows: (R, columns) float32 (float64 for float64 data): the plan's, with each weight in its history column.
    timesteps: (R,) float32: the value of `time` with each row. The network never uses the last one.
    guidance: () of the dtype of `rows`: the scale g.
    finished: () int32: programs that have finished since `start`; evaluations so far = finished // `programs`.
    noise_counts: (R,) int32: how many noises each row may read. noise_start: () int32: the column of the first.
    anchored: () int32: 0, or 1 if column 0 of `rows`, except in row 0, is for x itself; ignored in half precision.
    x: the network's input, N elements or 2N if doubled, dense, batch outermost. time: (T,) float32, its timestep.
    branches, doubled: 1 or 2 history columns per evaluation; True if the batch holds both halves of a guided pair.
    """

    history: Tensor
    rows: Tensor
    timesteps: Tensor
    guidance: Tensor
    finished: Tensor
    noise_counts: Tensor
    noise_start: Tensor
    anchored: Tensor
    x: Tensor
    time: Tensor
    branches: int
    doubled: bool

    @classmethod
    def empty(
        cls, x: Tensor, time: Tensor, *, steps: int, noises: int = 0, branches: int = 1, doubled: bool = False
    ) -> StepState:
        """Buffers for plans of up to `steps` evaluations and `noises` noises, around a network's two inputs.

        Raises InputError for steps < 1 or noises < 0, else as `step` does.
        """
        _check_branches(branches, doubled)
        checked_count("steps", steps)
        checked_count("noises", noises, least=0)
        expect_dense("x", x)
        columns, height = 1 + steps * branches + noises, steps + 1
        sums = accumulator(x.dtype)
        state = cls(
            history=x.new_empty((columns, x.numel() // (1 + doubled))),
            rows=x.new_zeros((height, columns), dtype=sums),
            timesteps=x.new_zeros(height, dtype=torch.float32),
            guidance=x.new_ones((), dtype=sums),
            finished=x.new_zeros((), dtype=torch.int32),
            noise_counts=x.new_zeros(height, dtype=torch.int32),
            noise_start=x.new_full((), columns - noises, dtype=torch.int32),
            anchored=x.new_zeros((), dtype=torch.int32),
            x=x,
            time=time,
            branches=branches,
            doubled=doubled,
        )
        _check_state(state)
        return state

    @property
    def programs(self) -> int:
        """The amount that one step adds to `finished`."""
        return grid(self.history.shape[1], self.history.element_size()).programs

    def column(self, j: int) -> Tensor:
        """History column j as a view in the shape and memory order of one half of `x`, to write x_T and noises."""
        shape = (self.x.shape[0] // 2, *self.x.shape[1:]) if self.doubled else self.x.shape
        outer_first = sorted(range(self.x.ndim), key=lambda axis: -self.x.stride(axis))
        inverse = sorted(range(self.x.ndim), key=outer_first.__getitem__)
        return self.history[j].view([shape[axis] for axis in outer_first]).permute(inverse)

    def halves(self, batch: Tensor) -> Tensor:
        """The memory of `x` or of an output as (2, N) if doubled, else (1, N), in the order of a history column."""
        size = self.history.shape[1]
        return batch.as_strided((1 + self.doubled, size), (size, 1))

    def bytes_of_step(self, k: int, noises: int = 0) -> int:
        """Bytes that step k moves between memory and the GPU: output, history, x; the few scalars are not counted."""
        halves = 1 + self.doubled
        read = halves + (1 + k * self.branches) + noises
        written = self.branches + halves
        return (read + written) * self.history.shape[1] * self.history.element_size()


def start(state: StepState) -> None:
    """Forms the first network input, rows[0] over x_T and the noises that row 0 may read, and resets the step counter.

    Raises InputError as `step` does.
    """
    _check_state(state)
    refuse_gradients("start", state[:-2])
    torch.ops.olss_fast.start(*state)


def step(output: Tensor, state: StepState) -> None:
    """Takes the raw network output in and writes the next network input, or the sample after the last evaluation.

    `output` has the shape and memory order of `state.x`. All state except `rows`, `timesteps`, `guidance`, `anchored`,
    `noise_counts` and `noise_start` is written to. A step beyond the last row does nothing on a GPU, whose step the
    host does not know, and raises on the CPU.

    Raises:
        InputError: a tensor of the wrong dtype, shape, device or strides, tensors that share memory, or that require a
            gradient.
    """
    _check_state(state)
    expect_like("output", output, "x", state.x)
    refuse_gradients("step", (output, *state[:-2]))
    torch.ops.olss_fast.step(output, *state)


# --- reference, and CPU path -----------------------------------------------------------------------------------------


def step_reference(output: Tensor, state: StepState) -> None:
    """The equations above in plain torch."""
    history, rows, programs = state.history, state.rows, state.programs
    row = int(state.finished) // programs + 1
    if not 1 <= row < rows.shape[0]:
        raise InputError(f"step {row - 1} was asked for, and the rows of this run are for {len(rows) - 1}; call start")
    outputs = state.halves(output)
    if state.doubled and state.branches == 1:
        unconditional, conditional = outputs.to(rows.dtype)
        outputs = torch.addcmul(unconditional, state.guidance, conditional - unconditional)
    known = 1 + row * state.branches
    history[known - state.branches : known].copy_(outputs)
    _write_row(state, row, known)
    state.finished.add_(programs)


def start_reference(state: StepState) -> None:
    """Row 0, which no output enters."""
    _write_row(state, 0, known=1)
    state.finished.zero_()


def _write_row(state: StepState, row: int, known: int) -> None:
    history, weights = state.history, state.rows[row]
    first = int(row > 0 and history.dtype == weights.dtype and bool(state.anchored))
    total = weighted_sum(history[first:known], weights[first:known])
    if first:
        total += weights[0] * state.halves(state.x)[0]
    noises = int(state.noise_counts[row])
    if noises:
        begin = int(state.noise_start)
        if not known <= begin <= len(history) - noises:
            raise InputError(
                f"row {row} may read {noises} noises from column {begin} on; expected columns {known} to "
                f"{len(history) - 1}, those beyond the outputs"
            )
        total += weighted_sum(history[begin : begin + noises], weights[begin : begin + noises])
    state.halves(state.x).copy_(total)
    state.time.copy_(state.timesteps[row])


# --- operators -------------------------------------------------------------------------------------------------------


def _run_start(*arguments: Any) -> None:
    state = StepState(*arguments)
    tensors = {name: each for name, each in state._asdict().items() if isinstance(each, Tensor)}
    refuse_overlaps({name: tensors.pop(name) for name in ("history", "finished", "x", "time")}, tensors)
    if state.history.is_cuda:
        _launch(None, state)
    else:
        start_reference(state)


def _run_step(output: Tensor, *arguments: Any) -> None:
    state = StepState(*arguments)
    refuse_overlaps({"output": output}, {"history": state.history, "x": state.x})  # `start` has checked the others
    if state.history.is_cuda:
        _launch(output, state)
    else:
        step_reference(output, state)


def _launch(output: Tensor | None, state: StepState) -> None:
    from olss_fast.kernels._step_triton import launch

    with torch.cuda.device(state.history.device):
        launch(output, state)


_STATE = (
    "Tensor rows, Tensor timesteps, Tensor guidance, Tensor(f!) finished, Tensor noise_counts, Tensor noise_start, "
    "Tensor anchored, Tensor(x!) x, Tensor(t!) time, int branches, bool doubled) -> ()"
)
define("start", f"(Tensor history, {_STATE}", _run_start, fake=lambda *arguments: None)
define("step", f"(Tensor output, Tensor(h!) history, {_STATE}", _run_step, fake=lambda output, *arguments: None)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_state(state: StepState) -> None:
    if not isinstance(state, StepState):
        raise InputError(f"state is a {type(state).__name__}; expected a StepState, such as StepState.empty makes")
    history, rows, x, time = state.history, state.rows, state.x, state.time
    _check_branches(state.branches, state.doubled)
    expect_dense("x", x)
    _check_batch(x, state.doubled)
    _check_history(history, x, 1 + state.doubled)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not 2 <= rows.shape[0] <= _most_rows(state):
        raise InputError(
            f"rows is {describe(rows)}; expected 2 to {_most_rows(state)} rows, for which the history of "
            f"{history.shape[0]} columns has room"
        )
    height, device = rows.shape[0], history.device
    sums = accumulator(history.dtype)
    expect("rows", rows, sums, (height, history.shape[0]), device)
    expect("timesteps", state.timesteps, torch.float32, (height,), device)
    expect("guidance", state.guidance, sums, (), device)
    expect("finished", state.finished, torch.int32, (), device)
    expect("noise_counts", state.noise_counts, torch.int32, (height,), device)
    expect("noise_start", state.noise_start, torch.int32, (), device)
    expect("anchored", state.anchored, torch.int32, (), device)
    if not isinstance(time, Tensor) or time.ndim != 1:
        raise InputError(f"time is {describe(time)}; expected (T,) {torch.float32}: as many as the network is handed")
    expect("time", time, torch.float32, (time.numel(),), device)


def _check_branches(branches: int, doubled: bool) -> None:
    if not isinstance(doubled, bool) or type(branches) is not int or not 1 <= branches <= 1 + doubled:
        raise InputError(
            f"branches is {branches!r} and doubled {doubled!r}; expected one branch, or two of a doubled batch, which "
            "holds the unconditional and the conditional half"
        )


def _check_history(history: Tensor, x: Tensor, halves: int) -> None:
    size = x.numel() // halves
    if (
        not isinstance(history, Tensor)
        or history.dtype not in DTYPES
        or history.dtype != x.dtype
        or history.device != x.device
        or history.ndim != 2
        or history.shape[1] * halves != x.numel()
        or (size > 1 and history.stride(1) != 1)
        or (history.shape[0] > 1 and history.stride(0) < size)
    ):
        raise InputError(
            f"history is {describe(history)}, x is {describe(x)}; expected (columns, {size}) of x's dtype and device, "
            "each column contiguous"
        )


def _check_batch(x: Tensor, doubled: bool) -> None:
    """The halves of a doubled batch must be the halves of its memory."""
    if not doubled or x.numel() == 0:
        return
    if x.ndim == 0 or x.shape[0] % 2 or x.stride(0) * x.shape[0] != x.numel():
        raise InputError(f"x is {describe(x)}; a doubled batch has an even first dimension, outermost in memory")


def _most_rows(state: StepState) -> int:
    by_columns = 1 + (state.history.shape[0] - 1) // state.branches
    return min(by_columns, (2**31 - 1) // state.programs)
