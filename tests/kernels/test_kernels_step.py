"""`step` and `start` as they are called: the CPU path against the equations, plans, compilers, bad input."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_checks import Guarded, check_run, check_step_too_many, guarded_state, load_plan, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import olss_fast
from olss_fast.errors import InputError
from olss_fast.executors import reference
from olss_fast.kernels import StepState, start, step

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCHEDULE = olss_fast.NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 3, 4, 5)


def small_state(**changes: Any) -> StepState:
    """Two steps of a doubled batch, ready to run."""
    state = StepState.empty(torch.zeros(4, 3), torch.zeros(2), steps=2, doubled=True)
    state.history.copy_(random(*state.history.shape, seed=0))
    state.rows.copy_(random(*state.rows.shape, seed=1))
    return state._replace(**changes)


# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("branches", "doubled"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize(("noises", "anchored"), [(0, True), (3, False), (3, True)])
def test_run_is_the_equations(dtype: torch.dtype, branches: int, doubled: bool, noises: int, anchored: bool) -> None:
    guard = Guarded()
    options = {"branches": branches, "doubled": doubled, "noises": noises, "anchored": anchored}
    state = guarded_state(guard, SHAPE, dtype, steps=4, **options)
    check_run(start, step, guard, state, steps=4)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (1, 1, 1, 1), (3, 65537)])
def test_any_size(shape: tuple[int, ...]) -> None:
    guard = Guarded()
    state = guarded_state(guard, shape, torch.bfloat16, steps=2, doubled=True)
    check_run(start, step, guard, state, steps=2)


@pytest.mark.parametrize("doubled", [False, True])
def test_channels_last_and_spare_room(doubled: bool) -> None:
    guard = Guarded(offset=1)
    state = guarded_state(guard, SHAPE, torch.float16, steps=2, doubled=doubled, channels_last=True, spare=3, noises=2)
    assert not state.x.is_contiguous()
    check_run(start, step, guard, state, steps=2)


def test_two_hundred_columns() -> None:
    guard = Guarded()
    state = guarded_state(guard, (1, 9), torch.float32, steps=200, noises=3)
    check_run(start, step, guard, state, steps=200, begin=197)


def test_a_second_run_is_the_first_again() -> None:
    state = small_state()
    outputs = [random(4, 3, seed=k).float() for k in range(2)]
    samples = []
    for _ in range(2):
        start(state)
        for output in outputs:
            step(output, state)
        samples.append(state.x.clone())
    assert torch.equal(*samples)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_plan_runs_as_in_the_reference_executor(branches: int, stochastic: bool) -> None:
    """float64, so that the only difference is the order of the sums."""
    if stochastic:
        plan = olss_fast.solvers.ddim(SCHEDULE, steps=4, eta=1.0)
    else:
        plan = olss_fast.solvers.dpm_solver_pp(SCHEDULE, steps=4, order=2)
    if branches == 2:
        plan = split(plan)
    noise, fresh = random(*SHAPE, seed=0), random(plan.noises, *SHAPE, seed=1)
    outputs = random(plan.nfe, 2, *SHAPE, seed=2)
    scale = 3.5
    guided = outputs[:, 0] + scale * (outputs[:, 1] - outputs[:, 0])
    given = iter(outputs if branches == 2 else guided[:, None])
    expected = reference.run(plan, lambda *a, **k: next(given), noise, step_noise=fresh if plan.noises else None)

    state = StepState.empty(
        torch.zeros(4, *SHAPE[1:], dtype=torch.float64),
        torch.zeros(4),
        steps=plan.nfe,
        noises=plan.noises,
        branches=branches,
        doubled=True,
    )
    load_plan(state, plan)
    state.guidance.fill_(scale)
    state.column(0).copy_(noise)
    for k in range(plan.noises):
        state.column(len(state.history) - plan.noises + k).copy_(fresh[k])
    start(state)
    for i in range(plan.nfe):
        assert state.time.tolist() == [torch.tensor(plan.timesteps[i]).float()] * 4
        step(outputs[i].reshape(4, *SHAPE[1:]), state)
    torch.testing.assert_close(state.x, torch.cat([expected, expected]), rtol=1e-12, atol=1e-12)


def split(plan: olss_fast.Plan) -> olss_fast.Plan:
    """The same plan on u and c apart, with other weights on the two."""
    rows = torch.tensor(plan.rows)
    outputs = rows[:, 1 : plan.noise_slice.start, None] * torch.tensor([-1.25, 2.25])
    both = torch.cat([rows[:, :1], outputs.flatten(1), rows[:, plan.noise_slice]], dim=1)
    return plan.replace(rows=both.numpy(), branches=2)


@pytest.mark.parametrize("doubled", [False, True])
def test_columns_are_seen_as_the_input_is(doubled: bool) -> None:
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = StepState.empty(x, torch.zeros(1), steps=1, doubled=doubled)
    state.rows.fill_(1)
    values = random(1 if doubled else 2, 3, 4, 5, seed=0).float()
    state.column(0).copy_(values)
    start(state)
    assert torch.equal(x, values.expand_as(x))


def test_bytes_of_a_step() -> None:
    state = StepState.empty(torch.zeros(4, 3).half(), torch.zeros(1), steps=5, noises=2, doubled=True)
    # output twice, x_T and two outputs, one noise; one history column, x twice: 9 columns of 6 elements of 2 bytes
    assert state.bytes_of_step(2, noises=1) == 9 * 6 * 2


# --- compilers --------------------------------------------------------------------------------------------------------


class Loop(torch.nn.Module):
    """A whole run as a module: the state in buffers, the network a product."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        state = StepState.empty(torch.zeros(2, 5), torch.zeros(2), steps=steps)
        state.rows.copy_(random(*state.rows.shape, seed=1))
        state.timesteps.copy_(random(len(state.timesteps), seed=2))
        for name, value in zip(state._fields[:-2], state[:-2], strict=True):
            self.register_buffer(name, value)
        self.steps = steps

    def forward(self, noise: Tensor) -> Tensor:
        state = StepState(*(getattr(self, name) for name in StepState._fields[:-2]), 1, False)
        state.column(0).copy_(noise)
        start(state)
        for _ in range(self.steps):
            step(torch.tanh(state.x) * state.time[0], state)
        return state.x.clone()


def test_torch_compile_sees_through() -> None:
    noise = random(2, 5, seed=0).float()
    expected = Loop()(noise)
    compiled = torch.compile(Loop(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(noise), expected, rtol=0, atol=0)


def test_torch_export_sees_through() -> None:
    noise = random(2, 5, seed=0).float()
    program = torch.export.export(Loop(), (noise,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("olss_fast.step" in target for target in targets) == 3
    torch.testing.assert_close(program.module()(noise), Loop()(noise), rtol=0, atol=0)


def test_triton_is_loaded_by_the_first_launch_alone() -> None:
    code = "import sys, olss_fast.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fake_tensors_of_a_gpu_pass() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 4, 8, 8, device="cuda", dtype=torch.float16)
        state = StepState.empty(x, torch.empty(2, device="cuda"), steps=3, doubled=True)
        start(state)
        step(torch.empty_like(x), state)
        assert state.x.device.type == "cuda"


def test_the_operators_are_what_their_schemas_say() -> None:
    state = small_state()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.olss_fast.start.default, tuple(state), test_utils=tests)
    torch.library.opcheck(torch.ops.olss_fast.step.default, (torch.ones(4, 3), *state), test_utils=tests)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_step_too_many_is_named_and_changes_nothing() -> None:
    def named(output: Tensor, state: StepState) -> None:
        with pytest.raises(InputError, match=r"step 2 was asked for, .* call start"):
            step(output, state)

    guard = Guarded()
    check_step_too_many(named, guard, guarded_state(guard, (1, 9), torch.float32, steps=2))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(4, 3).double(), "output is torch.float64 .*x is torch.float32"),
        (torch.zeros(4, 4), r"output is .*\(4, 4\)"),
        (torch.zeros(3, 4).t(), r"strides \(1, 4\)"),
        (torch.zeros(4, 3, device="meta"), "on meta"),
        ("image", "output is a str"),
        (torch.zeros(4, 3).requires_grad_(), "has no gradient, .* torch.no_grad"),
    ],
)
def test_unusable_outputs_are_named(output: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        step(output, small_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": torch.zeros(3, 5)}, r"history is .*\(3, 5\).* expected \(columns, 6\)"),
        ({"history": torch.zeros(6, 3).t()}, "each column contiguous"),
        ({"history": torch.zeros(1, 6).expand(3, 6)}, "each column contiguous"),
        ({"history": torch.zeros(3, 6).half()}, "history is torch.float16"),
        ({"rows": torch.zeros(3, 4)}, r"rows is .*\(3, 4\).* expected contiguous torch.float32 \(3, 3\)"),
        ({"rows": torch.zeros(3, 3).double()}, "rows is torch.float64"),
        ({"rows": torch.zeros(3)}, "expected 2 to 3 rows"),
        ({"rows": torch.zeros(4, 3)}, "expected 2 to 3 rows, for which the history of 3 columns has room"),
        ({"timesteps": torch.zeros(4)}, r"timesteps is .*\(4,\)"),
        ({"guidance": torch.ones(1)}, r"guidance is .*\(1,\)"),
        ({"finished": torch.zeros((), dtype=torch.int64)}, "finished is torch.int64"),
        ({"noise_counts": torch.zeros(3)}, "noise_counts is torch.float32"),
        ({"noise_start": torch.zeros(())}, "noise_start is torch.float32"),
        ({"anchored": torch.zeros(())}, "anchored is torch.float32"),
        ({"time": torch.zeros(2).double()}, "time is torch.float64"),
        ({"time": torch.zeros(4)[::2]}, r"time is .*strides \(2,\)"),
        ({"x": torch.zeros(8, 3)[::2]}, "x is .*gaps"),
        ({"x": torch.zeros(1, 3).expand(4, 3)}, "x is .*overlaps itself"),
        ({"x": torch.zeros(4, 3, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(3, 4)}, "even first dimension"),
        ({"x": torch.zeros(3, 4).t()}, "outermost in memory"),
        ({"doubled": False, "branches": 2}, "branches is 2 and doubled False"),
        ({"branches": 3}, "branches is 3"),
        ({"branches": 1.0}, "branches is 1.0"),
        ({"branches": []}, r"branches is \[\]"),
        ({"doubled": 1}, "doubled 1; expected"),
        ({"history": None}, "history is a NoneType"),
        ({"rows": 3}, "rows is a int"),
        ({"time": None}, r"time is a NoneType; expected \(T,\)"),
        ({"finished": 0}, "finished is a int"),
    ],
)
def test_unusable_states_are_named(changes: dict[str, Any], message: str) -> None:
    for call in (start, lambda state: step(state.x.clone(), state)):
        with pytest.raises(InputError, match=message):
            call(small_state(**changes))


@pytest.mark.parametrize("state", [None, (1, 2), torch.zeros(3)], ids=str)
def test_what_is_no_state_is_named(state: Any) -> None:
    for call in (start, lambda state: step(torch.zeros(4, 3), state)):
        with pytest.raises(InputError, match=f"state is a {type(state).__name__}; expected a StepState"):
            call(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps is -1; expected a whole number of at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"noises": -1}, "noises is -1; expected a whole number of at least 0"),
        ({"branches": 3}, "branches is 3 and doubled True"),
        ({"branches": 2, "doubled": False}, "branches is 2 and doubled False"),
        ({"x": None}, "x is a NoneType"),
        ({"x": torch.zeros(4, 3, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(3, 3)}, "even first dimension"),
        ({"time": None}, "time is a NoneType"),
        ({"time": torch.zeros(2).double()}, "time is torch.float64"),
    ],
)
def test_room_for_nothing_usable_is_named(changes: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"x": torch.zeros(4, 3), "time": torch.zeros(2), "steps": 2, "doubled": True}
    with pytest.raises(InputError, match=message):
        StepState.empty(**{**usual, **changes})


def test_shared_memory_is_named() -> None:
    state = small_state()
    with pytest.raises(InputError, match="output and x share memory"):
        step(state.x, state)
    with pytest.raises(InputError, match="history and x share memory"):
        start(state._replace(x=state.history.flatten()[6:18].view(4, 3)))
    with pytest.raises(InputError, match="time and timesteps share memory"):
        start(state._replace(time=state.timesteps[:2]))


def test_noises_beyond_the_history_are_named() -> None:
    state = small_state(noise_counts=torch.ones(3, dtype=torch.int32))
    with pytest.raises(InputError, match="row 0 may read 1 noises from column 3 on; expected columns 1 to 2"):
        start(state)
