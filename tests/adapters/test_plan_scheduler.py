"""PlanScheduler runs a plan exactly, picks the right one, and costs little, compiled or not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from kernel_counts import count
from plan_runs import ANCESTRAL, BETAS, DDIM, DPM, NOISE, SCHEDULE, learned, network, reference, run, sampled
from torch import Tensor

from olss_fast import Plan, PlanScheduler, capture, solvers
from olss_fast.errors import InputError
from olss_fast.executors.stepwise import noises_of_steps

pytestmark = pytest.mark.filterwarnings("ignore")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [solvers.unipc(SCHEDULE, 7), solvers.heun(SCHEDULE, 7), capture(DPM, 7)])
def test_a_run_is_rows_times_basis(plan: Plan) -> None:
    scheduler = PlanScheduler(plan)
    torch.testing.assert_close(sampled(scheduler, 7), reference(plan, NOISE), rtol=1e-12, atol=1e-12)
    single = sampled(scheduler, 7, NOISE.float())  # one float32 accumulation a row: a few roundings of values up to 20
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), reference(plan, NOISE), rtol=1e-5, atol=2e-5)


def test_outputs_are_new_tensors_and_protocol_values() -> None:
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 3))
    scheduler.set_timesteps(3)
    assert (scheduler.num_inference_steps, scheduler.order, scheduler.step_index) == (3, 1, None)
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.sigmas.shape == (4,)
    assert scheduler.sigmas[-1] == 0
    sample = NOISE.float()
    first = scheduler.step(network(sample, 1), scheduler.timesteps[0], sample).prev_sample
    kept = first.clone()
    assert scheduler.step_index == 1
    second = scheduler.step(network(first, 1), scheduler.timesteps[1], first)["prev_sample"]
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, kept)


def test_reuse_with_other_shapes_dtypes_and_interleaved() -> None:
    one, other = PlanScheduler(solvers.ddim(SCHEDULE, 4)), PlanScheduler(capture(DPM, 4))
    alone = sampled(one, 4), sampled(other, 4)
    sampled(one, 4, NOISE[:1, :, :3].half())
    one.set_timesteps(4)
    other.set_timesteps(4)
    a, b = NOISE * one.init_noise_sigma, NOISE * other.init_noise_sigma
    for s, t in zip(one.timesteps, other.timesteps, strict=True):
        a = one.step(network(a, s), s, a).prev_sample
        b = other.step(network(b, t), t, b).prev_sample
    assert torch.equal(a, alone[0])
    assert torch.equal(b, alone[1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_copies_go_on_from_where_they_are(duplicate: Callable[[PlanScheduler], PlanScheduler]) -> None:
    scheduler = PlanScheduler([capture(DPM, 5), solvers.ddim(SCHEDULE, 3)])
    whole = sampled(scheduler, 5)
    scheduler.set_timesteps(5)
    sample = NOISE * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps[:2]:
        sample = scheduler.step(network(sample, timestep), timestep, sample).prev_sample
    again = duplicate(scheduler)
    for timestep in again.timesteps[2:]:
        sample = again.step(network(sample, timestep), timestep, sample).prev_sample
    assert torch.equal(sample, whole)
    assert again.plans == scheduler.plans


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_rows_not_the_history(dtype: torch.dtype) -> None:
    """Each row is within half a unit in the last place of what comes to the sample from the unrounded history."""
    plan = solvers.unipc(SCHEDULE, 6)
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(6)
    sample = NOISE.to(dtype)
    basis = [sample.double()]
    for k, timestep in enumerate(scheduler.timesteps):
        output = network(sample, timestep)
        basis.append(output.double())
        rho = plan.rows[k + 1, 0] / plan.rows[k, 0]
        weights = plan.rows[k + 1] - rho * plan.rows[k]
        exact = rho * sample.double() + sum(float(w) * column for w, column in zip(weights, basis, strict=False))
        sample = scheduler.step(output, timestep, sample).prev_sample
        assert sample.dtype == dtype
        torch.testing.assert_close(sample.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


def test_inference_mode_and_autocast() -> None:
    scheduler = PlanScheduler(solvers.unipc(SCHEDULE, 5))
    plain = sampled(scheduler, 5, NOISE.float())
    with torch.inference_mode():
        assert torch.equal(sampled(scheduler, 5, NOISE.float()), plain)
    with torch.autocast("cpu", torch.bfloat16):  # the rows stay float32 under it
        assert torch.equal(sampled(scheduler, 5, NOISE.float()), plain)
    assert torch.equal(sampled(scheduler, 5, NOISE.float()), plain)


def test_gradients_flow_through_a_run() -> None:
    plan = solvers.dpm_solver_pp(SCHEDULE, 3)
    scheduler = PlanScheduler(plan)
    start = NOISE.clone().requires_grad_()
    sampled(scheduler, 3, start).sum().backward()
    expected = NOISE.clone().requires_grad_()
    reference(plan, expected).sum().backward()
    torch.testing.assert_close(start.grad, expected.grad)


def test_outputs_with_a_predicted_variance() -> None:
    """Twice the channels: the second half is the variance, which a plan does not use."""
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 3))
    expected = sampled(scheduler, 3)
    scheduler.set_timesteps(3)
    sample = NOISE
    for timestep in scheduler.timesteps:
        output = torch.cat([network(sample, timestep), torch.full_like(sample, 9.0)], dim=1)
        sample = scheduler.step(output, timestep, sample).prev_sample
    assert torch.equal(sample, expected)


# --- noises -----------------------------------------------------------------------------------------------------------


def test_noises_are_drawn_in_the_order_and_at_the_step_of_the_original() -> None:
    original = copy.deepcopy(ANCESTRAL)
    original.set_timesteps(5)
    scheduler = PlanScheduler(capture(ANCESTRAL, 5))
    scheduler.set_timesteps(5)
    streams = [torch.Generator().manual_seed(3) for _ in range(2)]
    x, y = NOISE.float() * original.init_noise_sigma, NOISE.float() * scheduler.init_noise_sigma
    for k, timestep in enumerate(original.timesteps):
        scaled = original.scale_model_input(x, timestep)
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scheduler.scale_model_input(y, timestep), scaled, rtol=1e-5, atol=1e-5)
        x = original.step(network(scaled, timestep), timestep, x, generator=streams[0]).prev_sample
        y = scheduler.step(network(scaled, timestep), scheduler.timesteps[k], y, generator=streams[1]).prev_sample
        if k < 4:  # the original draws once more at the end, and multiplies by 0
            assert torch.equal(streams[0].get_state(), streams[1].get_state())
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_noises_of_steps() -> None:
    """A column is drawn where the first row needs it, or any later column."""
    rows = np.zeros((4, 1 + 3 + 4))
    rows[:, 0] = 1.0
    rows[2, 6] = 1.0  # z_3 at step 1: then z_1 and z_2 have been drawn too
    rows[3, 4] = rows[3, 7] = 1.0
    plan = Plan(timesteps=[3, 2, 1], rows=rows, alphas=[0, 0, 0, 1], sigmas=[1, 1, 1, 0])
    assert noises_of_steps(plan) == [[], [4, 5, 6], [7]]


def test_one_generator_a_sample() -> None:
    scheduler = PlanScheduler(capture(ANCESTRAL, 4))

    def stream(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    scheduler.set_timesteps(4)
    both = run(scheduler, NOISE, generator=stream(1, 2))
    scheduler.set_timesteps(4)
    second = run(scheduler, NOISE[1:], generator=stream(2))
    torch.testing.assert_close(both[1:], second, rtol=1e-12, atol=1e-12)


# --- which plan -------------------------------------------------------------------------------------------------------


def test_the_number_of_steps_picks() -> None:
    heun = capture(diffusers.HeunDiscreteScheduler(**BETAS), 5)
    plans = [heun, solvers.ddim(SCHEDULE, 4), learned(solvers.unipc(SCHEDULE, 6), num_inference_steps="8")]
    scheduler = PlanScheduler({plan.nfe: plan for plan in plans}.values())
    for steps, plan, order in [(5, heun, 2), (4, plans[1], 1), (8, plans[2], 1)]:
        torch.testing.assert_close(sampled(scheduler, steps), reference(plan, NOISE), rtol=1e-10, atol=1e-10)
        assert (scheduler.order, len(scheduler.timesteps)) == (order, plan.nfe)
    with pytest.raises(InputError, match=r"num_inference_steps=6.* has 4: ddim.*5: Heun.*8: olss"):
        scheduler.set_timesteps(6)
    with pytest.raises(InputError, match="num_inference_steps=None"):
        scheduler.set_timesteps()


def test_two_plans_for_one_number_of_steps() -> None:
    with pytest.raises(InputError, match="two plans answer to 4 steps"):
        PlanScheduler([solvers.ddim(SCHEDULE, 4), solvers.unipc(SCHEDULE, 4)])


def test_init_noise_sigma_before_set_timesteps() -> None:
    ddim, euler = solvers.ddim(SCHEDULE, 4), solvers.euler(SCHEDULE, 5, start=2.0)
    assert PlanScheduler([ddim, solvers.ddim(SCHEDULE, 3)]).init_noise_sigma == pytest.approx(1.0, abs=1e-12)
    scheduler = PlanScheduler([ddim, euler])
    with pytest.raises(InputError, match="set_timesteps"):
        _ = scheduler.init_noise_sigma
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma == pytest.approx(2.0)


def test_custom_grids() -> None:
    """Captured plans are captured again, analytic ones derived again, learned ones refuse."""
    times = [900, 500, 300, 20]
    captured, analytic = PlanScheduler(capture(DPM, 4)), PlanScheduler(solvers.dpm_solver_pp(SCHEDULE, 4), DPM)
    captured.set_timesteps(timesteps=times)
    original = copy.deepcopy(DPM)
    original.set_timesteps(timesteps=times)
    x = NOISE.float()
    for timestep in original.timesteps:
        x = original.step(network(x, timestep), timestep, x).prev_sample
    torch.testing.assert_close(run(captured, NOISE.float()), x, rtol=1e-5, atol=1e-5)
    analytic.set_timesteps(timesteps=times)
    expected = solvers.dpm_solver_pp(SCHEDULE, timesteps=times)
    torch.testing.assert_close(run(analytic, NOISE), reference(expected, NOISE), rtol=1e-10, atol=1e-10)
    fitted = PlanScheduler(learned(expected), DPM)
    fitted.set_timesteps(timesteps=times)  # its own
    with pytest.raises(InputError, match=r"fitted to its timesteps 900, 500, 300, 20, but 901"):
        fitted.set_timesteps(timesteps=[901, 500, 300, 20])
    with pytest.raises(InputError, match="use_magic"):
        fitted.set_timesteps(4, use_magic=True)


def test_flow_grids() -> None:
    """mu and sigmas: captured again where they differ, kept where the plan was captured on a grid of its own."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plain = np.linspace(1.0, 0.25, 4)
    scheduler = PlanScheduler(capture(flow, sigmas=plain.tolist(), mu=0.5))
    for mu in (0.5, 1.5):
        scheduler.set_timesteps(sigmas=plain, mu=mu)
        flow.set_timesteps(sigmas=plain.tolist(), mu=mu)
        torch.testing.assert_close(scheduler.timesteps, flow.timesteps)
        torch.testing.assert_close(scheduler.sigmas, flow.sigmas)
    own = [1.0, 0.9, 0.6, 0.1]
    scheduler = PlanScheduler(capture(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas=own))
    scheduler.set_timesteps(sigmas=plain)
    np.testing.assert_allclose(scheduler.sigmas, [*own, 0.0], atol=1e-6)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.3, 0.2])
    np.testing.assert_allclose(scheduler.sigmas, [1.0, 0.5, 0.3, 0.2, 0.0], atol=1e-6)


# --- what a step costs, and compilers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_of_a_step_on_an_accelerator(dtype: torch.dtype) -> None:
    """No host sync, no upload, 3 kernels: copy, product, cast. Other schedulers' counts show that it counts."""
    steps = count(PlanScheduler(capture(DPM, 20)), 20, dtype)
    assert len(steps) == 20
    for step in steps:
        assert (step.syncs, step.uploads) == (0, 0)
        assert step.kernels == 3
    assert max(step.kernels for step in count(copy.deepcopy(DPM), 20, dtype)) > 3
    assert sum(step.syncs for step in count(copy.deepcopy(DDIM), 20, dtype)) > 0


class Loop(torch.nn.Module):
    """A whole denoising loop with a network of its own."""

    def __init__(self, scheduler: PlanScheduler) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.scheduler = scheduler

    def forward(self, sample: Tensor) -> Tensor:
        for timestep in self.scheduler.timesteps:
            output = self.net(sample) * (1.0 + timestep / 1000.0)
            sample = self.scheduler.step(output, timestep, sample).prev_sample
        return sample


def looped(plan: Plan) -> tuple[Loop, Tensor]:
    loop = Loop(PlanScheduler(plan))
    loop.scheduler.set_timesteps(plan.nfe)
    expected = loop(NOISE.float())
    loop.scheduler.set_timesteps(plan.nfe)
    return loop, expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    """One graph without breaks; set_timesteps stays outside, and a second run compiles nothing anew."""
    torch._dynamo.reset()
    loop, expected = looped(solvers.unipc(SCHEDULE, 4))
    compiled = torch.compile(loop, fullgraph=True, backend=backend)
    for _ in range(2):
        loop.scheduler.set_timesteps(4)
        with torch.compiler.set_stance("default" if _ == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(NOISE.float()), expected)


def test_torch_compile_of_a_later_start() -> None:
    torch._dynamo.reset()
    scheduler = PlanScheduler(capture(DPM, 5))
    scheduler.set_timesteps(5)
    expected = run(scheduler, NOISE.float(), begin=3)

    def rest(sample: Tensor) -> Tensor:
        for timestep in scheduler.timesteps[3:]:
            output = torch.sin(sample.roll(1, -1) + timestep / 300.0)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        return sample

    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    found = torch.compile(rest, fullgraph=True, backend="eager")(NOISE.float())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict: bool) -> None:
    loop, expected = looped(solvers.dpm_solver_pp(SCHEDULE, 4))
    program = torch.export.export(loop, (NOISE.float(),), strict=strict)
    torch.testing.assert_close(program.module()(NOISE.float()), expected)


def test_a_changed_sample_is_noticed_in_a_compiled_loop() -> None:
    torch._dynamo.reset()
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, 4))

    def edited(sample: Tensor) -> Tensor:
        for timestep in scheduler.timesteps:
            output = torch.sin(sample)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0] * 0.9
        return sample

    scheduler.set_timesteps(4)
    expected = edited(NOISE.float())
    scheduler.set_timesteps(4)
    found = torch.compile(edited, fullgraph=True, backend="eager")(NOISE.float())
    torch.testing.assert_close(found, expected)
    scheduler.set_timesteps(4)
    assert not torch.allclose(run(scheduler, NOISE.float()), expected, atol=0.1)


def test_step_alone_compiled() -> None:
    """A run may begin before the compiled steps."""
    torch._dynamo.reset()
    scheduler = PlanScheduler(solvers.unipc(SCHEDULE, 4))
    expected = sampled(scheduler, 4, NOISE.float())
    scheduler.set_timesteps(4)
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    sample = NOISE.float()
    for step, timestep in zip((scheduler.step, compiled, compiled, compiled), scheduler.timesteps, strict=True):
        sample = step(network(sample, timestep), timestep, sample).prev_sample
    torch.testing.assert_close(sample, expected)
