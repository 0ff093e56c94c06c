"""The compiled step on the CPU: the checks of the kernels, and what only it has to see to."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from kernel_checks import Guarded, check_run, guarded_state
from torch import Tensor

from olss_fast.errors import InputError
from olss_fast.executors.host_step import host_step
from olss_fast.kernels import StepState, start, step

DTYPES = (torch.float32, torch.float64)
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "guided": {"doubled": True}, "split": {"doubled": True, "branches": 2}}


def compiled_start(state: StepState) -> None:
    run = host_step(state)
    assert run is not None
    run(None)


def compiled_step(output: Tensor, state: StepState) -> None:
    run = host_step(state)
    assert run is not None
    run(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3001])
@pytest.mark.parametrize("anchored", [False, True])
def test_against_float64_in_poisoned_buffers(size: int, dtype: torch.dtype, kind: str, anchored: bool) -> None:
    """Blocks are of 1024 elements. Columns that a row may not read hold NaN, and margins must stay as they are."""
    guard = Guarded("cpu")
    state = guarded_state(guard, (1, size), dtype, steps=4, noises=3, anchored=anchored, **KINDS[kind])
    check_run(compiled_start, compiled_step, guard, state, steps=4)


def test_channels_last_and_many_columns() -> None:
    guard = Guarded("cpu")
    state = guarded_state(guard, (2, 8, 9, 7), torch.float32, steps=40, channels_last=True, spare=3, doubled=True)
    check_run(compiled_start, compiled_step, guard, state, steps=40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_agrees_with_the_operator_to_rounding(dtype: torch.dtype) -> None:
    """Two orders of the same sum of 6 terms of size one: a few units in the last place."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(2):
        x = torch.zeros(4, 3, 5, 5, dtype=dtype)
        states.append(StepState.empty(x, torch.zeros(4), steps=5, doubled=True))
    for name in ("rows", "timesteps"):
        drawn = torch.randn(getattr(states[0], name).shape, generator=generator)
        for state in states:
            getattr(state, name).copy_(drawn)
    noise = torch.randn(2, 3, 5, 5, generator=generator, dtype=dtype)
    for state in states:
        state.guidance.fill_(2.5)
        state.column(0).copy_(noise)
    start(states[0])
    compiled_start(states[1])
    for _ in range(5):
        output = torch.randn(4, 3, 5, 5, generator=generator, dtype=dtype)
        step(output, states[0])
        compiled_step(output, states[1])
        torch.testing.assert_close(states[1].x, states[0].x, rtol=0, atol=200 * torch.finfo(dtype).eps)
        assert torch.equal(states[1].time, states[0].time)
    assert torch.equal(states[1].finished, states[0].finished)


def test_an_output_in_the_memory_of_the_input_is_read_before_it_is_written() -> None:
    x = torch.zeros(1, 2000)
    state = StepState.empty(x, torch.zeros(1), steps=1)
    state.rows.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    state.column(0).fill_(1.0)
    compiled_start(state)
    compiled_step(state.x.detach(), state)
    assert torch.equal(state.x, torch.full((1, 2000), 3.0))


def test_beyond_the_last_row_nothing_is_written() -> None:
    state = StepState.empty(torch.zeros(1, 10), torch.zeros(1), steps=1)
    state.column(0).fill_(1.0)
    compiled_start(state)
    compiled_step(torch.ones(1, 10), state)
    before = [each.clone() for each in state if isinstance(each, Tensor)]
    with pytest.raises(InputError, match="beyond the rows of this run, 1; call start"):
        compiled_step(torch.full((1, 10), 7.0), state)
    assert all(torch.equal(*each) for each in zip(before, (t for t in state if isinstance(t, Tensor)), strict=True))


def test_the_memory_of_the_state_lives_as_long_as_the_step() -> None:
    state = StepState.empty(torch.zeros(1, 10), torch.zeros(1), steps=1)
    history = weakref.ref(state.history)
    run = host_step(state)
    del state
    assert history() is not None
    del run
    assert history() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_to_the_operators(dtype: torch.dtype) -> None:
    assert host_step(StepState.empty(torch.zeros(1, 10, dtype=dtype), torch.zeros(1), steps=1)) is None


def test_without_the_compiled_part_the_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "olss_fast._C", None)
    monkeypatch.delattr("olss_fast._C", raising=False)
    assert host_step(StepState.empty(torch.zeros(1, 10), torch.zeros(1), steps=1)) is None
