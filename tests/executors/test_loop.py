"""The torch loop: gradients, starts in the middle, the short way of one-step rows, and which network is asked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_plans import split
from torch import Tensor

import olss_fast
from olss_fast import solvers
from olss_fast.executors.reference import LONG, Loop, run
from olss_fast.network import Denoiser
from olss_fast.testing import NULL_CLASS, ExactMixture
from olss_fast.tuning.compare import compare

SCHEDULE = olss_fast.NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 3, 3)
NOISE = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TWO_STEP = solvers.dpm_solver_pp(SCHEDULE, 4, order=2)
ANCESTRAL = solvers.euler_ancestral(SCHEDULE, 4)
GUIDED = {"conditioning": {"y": torch.arange(6) % 4}, "unconditional": {"y": NULL_CLASS}, "guidance_scale": 2.5}


SPLIT = split(TWO_STEP, 2.5)


def evaluate(x: Tensor, timestep: float | Tensor, *, branches: int = 1, model: int = 0) -> Tensor:
    """Smooth in both arguments, another one for each model and branch."""
    return torch.stack([torch.sin(x + (1 + model) * timestep / 1000) + branch for branch in range(branches)])


def with_models(plan: olss_fast.Plan, *models: int) -> olss_fast.Plan:
    return plan.replace(models=models)


@pytest.mark.parametrize("plan", [with_models(TWO_STEP, 0, 1, 1, 0), SPLIT], ids=["models", "split"])
def test_gradients_by_rows_and_timesteps_are_those_of_finite_differences(plan: olss_fast.Plan) -> None:
    def sample(rows: Tensor, timesteps: Tensor) -> Tensor:
        steps = SimpleNamespace(rows=rows, timesteps=timesteps, models=plan.models, branches=plan.branches)
        return Loop(steps, NOISE[:1, :1, :1][None]).finish(evaluate).x

    arrays = [torch.tensor(each).requires_grad_() for each in (plan.rows, plan.timesteps)]
    assert torch.autograd.gradcheck(sample, arrays, eps=1e-6, atol=1e-6, rtol=1e-6)
    rows, timesteps = torch.autograd.grad(sample(*arrays).sum(), arrays)
    assert rows[1:, 0].all()
    assert timesteps.all()
    torch.testing.assert_close(sample(*arrays), run(plan, evaluate, NOISE[:1, :1, :1]), rtol=0, atol=1e-14)


def test_gradients_go_through_networks_with_guidance() -> None:
    def network(x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return torch.sin(x + ((1 + y) * timestep / 1000).view(-1, 1, 1, 1))

    def sample(plan: olss_fast.Plan, timesteps: Tensor) -> Tensor:
        rows = torch.tensor(plan.rows)
        steps = SimpleNamespace(rows=rows, timesteps=timesteps, models=plan.models, branches=plan.branches)
        return Loop(steps, NOISE[None]).finish(Denoiser(network, NOISE, **GUIDED).asking(slice(None))).x.sum()

    timesteps = torch.tensor(SPLIT.timesteps).requires_grad_()
    inside, apart = (torch.autograd.grad(sample(plan, timesteps), timesteps)[0] for plan in (TWO_STEP, SPLIT))
    torch.testing.assert_close(inside, apart, rtol=1e-5, atol=1e-7)  # networks are handed their times in float32
    step = torch.tensor([0.0, 1.0, 0.0, 0.0])
    slope = (sample(TWO_STEP, timesteps + step) - sample(TWO_STEP, timesteps - step)) / 2
    assert inside[1].item() == pytest.approx(slope.item(), rel=1e-2)  # slopes of elements cancel in the sum


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("plan", [TWO_STEP, SPLIT, ANCESTRAL], ids=["one branch", "two", "stochastic"])
def test_a_loop_begun_in_the_middle_goes_on_as_the_whole_one(plan: olss_fast.Plan, gradients: bool) -> None:
    fresh = torch.randn((plan.noises, *NOISE.shape), generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(gradients):
        whole = Loop(plan, NOISE[None], step_noise=fresh)
        outputs = [whole.ask(evaluate) for _ in range(plan.nfe)]
        for i in range(plan.nfe + 1):
            begun = Loop(plan, whole.columns[: 1 + i * plan.branches], step_noise=fresh)
            assert begun.evaluation == i
            assert torch.equal(begun.finish(evaluate).x, whole.x)
    told = Loop(plan, NOISE[None], step_noise=fresh)
    for each in outputs:
        told.push(each)
    assert torch.equal(told.x, whole.x)
    basis = torch.cat([whole.columns, fresh.double()])
    torch.testing.assert_close(whole.x, torch.tensordot(torch.tensor(plan.rows[-1]), basis, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("begin", [0, 7])
def test_rows_that_look_back_one_step_take_the_short_way_to_the_same_states(begin: int) -> None:
    plan = solvers.ddim(SCHEDULE, 5 * LONG)
    whole = Loop(plan, NOISE[None])
    whole.finish(evaluate)
    loop = Loop(plan, whole.columns[: 1 + begin])
    assert loop._pairs is not None
    while not loop.done:
        loop.ask(evaluate)
        known = len(loop.columns)
        expected = torch.tensordot(torch.tensor(plan.rows[loop.evaluation, :known]), loop.columns, 1)
        torch.testing.assert_close(loop.x, expected, rtol=0, atol=1e-12)
    assert Loop(solvers.dpm_solver_pp(SCHEDULE, 5 * LONG, order=2), NOISE[None])._pairs is None
    assert Loop(solvers.euler_ancestral(SCHEDULE, 5 * LONG), NOISE[None])._pairs is None


def test_a_fork_shares_what_came_before_and_leaves_it_alone() -> None:
    with torch.no_grad():
        loop = Loop(TWO_STEP, NOISE[None])
        loop.ask(evaluate)
        before = loop.columns.clone()
        other = with_models(TWO_STEP, 0, 1, 1, 1)
        assert torch.equal(loop.fork(other).finish(evaluate).x, run(other, evaluate, NOISE))
        assert torch.equal(loop.columns, before)
        assert torch.equal(loop.finish(evaluate).x, run(TWO_STEP, evaluate, NOISE))


def mixture(seed: int) -> ExactMixture:
    return ExactMixture(SCHEDULE, torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(seed)), 0.2)


def test_plans_over_two_networks_are_compared_as_they_sample() -> None:
    networks = [mixture(1), mixture(2)]
    schedules = [(0, 0, 0, 0), (0, 1, 1, 0), (1, 1, 1, 1), (0, 1, 1, 1)]
    plans = [with_models(plan, *models) for plan in (TWO_STEP, SPLIT) for models in schedules]
    truth = olss_fast.sample(networks[0], solvers.ddim(SCHEDULE, 20), NOISE, **GUIDED)
    report = compare(
        networks, noise=NOISE, schedule=SCHEDULE, steps=[4], plans=plans, teacher_steps=20, progress=False, **GUIDED
    )
    found = {each.plan: each.errors for each in report.candidates}
    for plan in plans:
        expected = (olss_fast.sample(networks, plan, NOISE, **GUIDED) - truth).flatten(1).square().mean(1).sqrt()
        np.testing.assert_allclose(found[plan], expected, rtol=1e-6)  # the teacher's samples are kept in float32
    assert len({found[plan] for plan in plans[:4]}) == 4
