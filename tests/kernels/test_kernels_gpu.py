"""The kernels on a GPU: the checks of the interpreter, and what only a GPU has, a graph and programs side by side."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import Guarded, check_lincomb, check_run, check_step_too_many, guarded_state, random

from olss_fast.kernels import StepState, lincomb, start, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("branches", "doubled"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 4 * 64 * 64, 1 << 20])
def test_run_is_the_equations(dtype: torch.dtype, branches: int, doubled: bool, size: int) -> None:
    guard = Guarded("cuda")
    options = {"branches": branches, "doubled": doubled, "noises": 2}
    check_run(start, step, guard, guarded_state(guard, (1, size), dtype, steps=3, **options), steps=3)


@pytest.mark.parametrize(("steps", "begin"), [(17, 0), (40, 38), (127, 126), (199, 198)])
def test_any_number_of_columns(steps: int, begin: int) -> None:
    guard = Guarded("cuda")
    state = guarded_state(guard, (1, 4099), torch.float16, steps=steps, noises=5)
    check_run(start, step, guard, state, steps=steps, begin=begin)


@pytest.mark.parametrize("offset", [0, 1])
def test_channels_last_spare_room_and_unaligned_memory(offset: int) -> None:
    guard = Guarded("cuda", offset)
    options = {"doubled": True, "channels_last": True, "spare": 3}
    check_run(start, step, guard, guarded_state(guard, (2, 4, 9, 8), torch.bfloat16, steps=2, **options), steps=2)


def test_a_step_too_many_changes_nothing() -> None:
    guard = Guarded("cuda")
    check_step_too_many(step, guard, guarded_state(guard, (1, 3000), torch.float16, steps=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "size"), [(1, 1), (5, 0), (17, 257), (200, 1025), (40, 1 << 18)])
def test_lincomb(dtype: torch.dtype, columns: int, size: int) -> None:
    check_lincomb(lincomb, columns, size, dtype, device="cuda")


def test_offsets_beyond_32_bits() -> None:
    """Column 3 of 2^30 + 16 elements begins beyond 2^31: half a GB a column."""
    size = (1 << 30) + 16
    if torch.cuda.mem_get_info()[0] < 12 * size:
        pytest.skip("needs 12 GB")
    state = StepState.empty(torch.zeros(size, dtype=torch.float16, device="cuda"), torch.zeros(1).cuda(), steps=2)
    state.rows.copy_(torch.tensor([[1.0, 0, 0], [1, 2, 0], [1, 2, 3]]))
    state.history[0, -16:] = 1
    output = torch.zeros_like(state.x)
    output[-16:] = 1
    start(state)
    for expected in (3, 6):
        step(output, state)
        assert state.x[-16:].tolist() == [expected] * 16


@pytest.mark.parametrize("size", [4 * 64 * 64, 1 << 22])
def test_a_graph_replayed_is_the_loop_and_takes_another_plan(size: int) -> None:
    """One graph of network and step. Bitwise: the same kernel on the same numbers, however its programs are ordered."""
    state = StepState.empty(torch.zeros(2, size).half().cuda(), torch.zeros(2).cuda(), steps=9, doubled=True)

    def evaluate() -> None:
        step(torch.tanh(state.x) * state.time[0].half(), state)

    start(state)
    evaluate()  # compiles what is to be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        evaluate()
    for seed, steps in ((0, 9), (1, 5)):
        state.rows.copy_(random(*state.rows.shape, seed=seed) / 4)
        state.timesteps.copy_(random(len(state.timesteps), seed=seed))
        state.guidance.fill_(seed + 1.5)
        state.column(0).copy_(random(1, size, seed=seed))
        samples = []
        for once in (evaluate, graph.replay):
            start(state)
            for _ in range(steps):
                once()
            assert int(state.finished) == steps * state.programs
            samples.append(state.x.clone())
        assert torch.equal(*samples)
        assert bool(samples[0].isfinite().all())
