"""`sample`: the network is asked exactly NFE times, with what was promised, and the result is rows . basis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import olss_fast
from olss_fast.errors import InputError, NetworkError
from olss_fast.testing import NULL_CLASS, ExactMixture

SCHEDULE = olss_fast.NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (6, 2, 3, 3)
GUIDED: dict[str, Any] = {
    "conditioning": {"y": torch.arange(6) % 4},
    "unconditional": {"y": NULL_CLASS},
    "guidance_scale": 2.5,
}


class Spy:
    """An exact mixture that remembers how it was called."""

    def __init__(self) -> None:
        means = torch.randn((4, *SHAPE[1:]), generator=torch.Generator().manual_seed(0))
        self.network = ExactMixture(SCHEDULE, means, 0.3)
        self.inputs: list[torch.Tensor] = []
        self.times: list[torch.Tensor] = []
        self.grad: list[bool] = []

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        self.times.append(timestep)
        self.grad.append(torch.is_grad_enabled())
        return self.network(x, timestep, **conditioning)


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def plan() -> olss_fast.Plan:
    return olss_fast.solvers.dpm_solver_pp(SCHEDULE, steps=5, order=2)


def test_network_is_asked_nfe_times_with_a_doubled_batch(plan: olss_fast.Plan) -> None:
    spy = Spy()
    olss_fast.sample(spy, plan, noise(), **GUIDED)
    assert [x.shape for x in spy.inputs] == [(12, *SHAPE[1:])] * 5
    assert [t.shape for t in spy.times] == [(12,)] * 5
    np.testing.assert_allclose([float(t[0]) for t in spy.times], plan.timesteps, rtol=1e-7)  # float32 of float64
    assert not any(spy.grad)


def test_two_calls_give_the_same_as_one_doubled_batch(plan: olss_fast.Plan) -> None:
    spy = Spy()
    apart = olss_fast.sample(spy, plan, noise(torch.float64), doubled=False, **GUIDED)
    assert len(spy.inputs) == 10
    together = olss_fast.sample(Spy(), plan, noise(torch.float64), **GUIDED)
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)  # float64; only batched sums may round apart


def test_guidance_may_be_a_numpy_number(plan: olss_fast.Plan) -> None:
    expected = olss_fast.sample(Spy(), plan, noise(), **GUIDED)
    assert torch.equal(
        olss_fast.sample(Spy(), plan, noise(), **{**GUIDED, "guidance_scale": np.float32(2.5)}), expected
    )


def test_guidance_one_needs_no_unconditional_call(plan: olss_fast.Plan) -> None:
    spy = Spy()
    olss_fast.sample(spy, plan, noise(), conditioning=GUIDED["conditioning"], unconditional=GUIDED["unconditional"])
    assert [len(x) for x in spy.inputs] == [6] * 5


def test_sample_is_rows_times_basis(plan: olss_fast.Plan) -> None:
    x_t, basis = noise(torch.float64), [noise(torch.float64)]
    network = Spy()
    for i, timestep in enumerate(plan.timesteps):
        x = sum(w * column for w, column in zip(plan.rows[i], basis, strict=False))
        basis.append(network(x, torch.full((6,), timestep), y=GUIDED["conditioning"]["y"]))
    expected = sum(w * column for w, column in zip(plan.rows[-1], basis, strict=True))
    actual = olss_fast.sample(Spy(), plan, x_t, conditioning=GUIDED["conditioning"])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # `sample` hands timesteps on as float32


def test_batches_do_not_change_the_result(plan: olss_fast.Plan) -> None:
    whole = olss_fast.sample(Spy(), plan, noise(torch.float64), **GUIDED)
    parts = olss_fast.sample(Spy(), plan, noise(torch.float64), batch_size=4, **GUIDED)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_noise_dtype(plan: olss_fast.Plan, dtype: torch.dtype) -> None:
    spy = Spy()
    assert olss_fast.sample(spy, plan, noise(dtype), **GUIDED).dtype == dtype
    assert {x.dtype for x in spy.inputs} == {dtype}


def test_module_is_handed_its_own_dtype(plan: olss_fast.Plan) -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.bfloat16
            return x * self.weight

    assert olss_fast.sample(Half(), plan, noise()).dtype == torch.float32


def test_split_plan_weighs_both_outputs(plan: olss_fast.Plan) -> None:
    g = GUIDED["guidance_scale"]
    rows = np.zeros((6, 11))
    rows[:, 0] = plan.rows[:, 0]
    rows[:, 1::2], rows[:, 2::2] = (1 - g) * plan.rows[:, 1:], g * plan.rows[:, 1:]
    split = plan.replace(rows=rows, branches=2)
    merged = olss_fast.sample(Spy(), plan, noise(torch.float64), **GUIDED)
    apart = olss_fast.sample(Spy(), split, noise(torch.float64), **GUIDED)
    torch.testing.assert_close(apart, merged, rtol=1e-10, atol=1e-10)  # the same sums in another order


def test_split_plan_refuses_another_guidance(plan: olss_fast.Plan) -> None:
    rows = np.zeros((6, 11))
    rows[:, 0] = plan.rows[:, 0]
    split = plan.replace(rows=rows, branches=2, metadata={**plan.metadata, "guidance_scale": "3.0"})
    with pytest.raises(InputError, match=r"guidance_scale=3\.0.*2\.5"):
        olss_fast.sample(Spy(), split, noise(), **GUIDED)


def test_stochastic_plan_draws_from_the_generator() -> None:
    plan = olss_fast.solvers.euler_ancestral(SCHEDULE, steps=4)
    draws = [olss_fast.sample(Spy(), plan, noise(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_wrong_outputs_are_named(plan: olss_fast.Plan) -> None:
    def late_nan(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        output[2] = torch.nan if float(timestep[0]) <= plan.timesteps[3] else 0.0
        return output

    with pytest.raises(NetworkError, match=r"evaluation 3 for sample\(s\) \[2\]"):
        olss_fast.sample(late_nan, plan, noise())
    with pytest.raises(NetworkError, match=r"\(6, 4, 3, 3\).*\(6, 2, 3, 3\)"):
        olss_fast.sample(lambda x, t: torch.cat([x, x], 1), plan, noise())
    with pytest.raises(NetworkError, match="int64"):
        olss_fast.sample(lambda x, t: x.long(), plan, noise())
    with pytest.raises(NetworkError, match="str"):
        olss_fast.sample(lambda x, t: "no tensor", plan, noise())


def test_diffusers_style_outputs_are_unwrapped(plan: olss_fast.Plan) -> None:
    class Output:
        def __init__(self, sample: torch.Tensor) -> None:
            self.sample = sample

    expected = olss_fast.sample(lambda x, t: 0.1 * x, plan, noise())
    assert torch.equal(olss_fast.sample(lambda x, t: Output(0.1 * x), plan, noise()), expected)
    assert torch.equal(olss_fast.sample(lambda x, t: (0.1 * x,), plan, noise()), expected)


def test_several_networks_by_the_plans_model_schedule(plan: olss_fast.Plan) -> None:
    two = plan.replace(models=[0, 0, 1, 1, 1])
    called: list[int] = []

    def network(number: int) -> Any:
        return lambda x, t: called.append(number) or torch.zeros_like(x)

    olss_fast.sample([network(0), network(1)], two, noise())
    assert called == [0, 0, 1, 1, 1]
    with pytest.raises(InputError, match="network 1"):
        olss_fast.sample(network(0), two, noise())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unconditional": None}, "unconditional"),
        ({"unconditional": {"y": torch.zeros(6, 3)}}, "broadcast"),
        ({"unconditional": {"other": 0}}, "same"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_unusable_arguments(plan: olss_fast.Plan, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        olss_fast.sample(Spy(), plan, noise(), **{**GUIDED, **change})


@pytest.mark.parametrize("bad", [torch.zeros(0, 3), torch.zeros(4), torch.full((2, 3), torch.inf), None])
def test_unusable_noise(plan: olss_fast.Plan, bad: Any) -> None:
    with pytest.raises(InputError, match="noise"):
        olss_fast.sample(Spy(), plan, bad)


def test_shared_arguments_are_not_taken_for_samples(plan: olss_fast.Plan) -> None:
    shapes: list[tuple[int, ...]] = []

    def network(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
        shapes.append((len(x), len(y), len(freq)))
        return 0.1 * x * y.view(-1, 1, 1, 1)

    guided = {
        "conditioning": {"y": torch.ones(6), "freq": torch.ones(2)},
        "unconditional": {"y": 0, "freq": torch.ones(2)},
    }
    olss_fast.sample(network, plan, noise(), batch_size=2, guidance_scale=3.0, **guided)
    assert set(shapes) == {(4, 4, 2)}


def test_network_that_reuses_its_output_buffer_keeps_its_guidance(plan: olss_fast.Plan) -> None:
    buffer = torch.empty(SHAPE)

    def reusing(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return buffer.copy_(0.1 * x * (1 + y.view(-1, 1, 1, 1)))

    def fresh(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0.1 * x * (1 + y.view(-1, 1, 1, 1))

    guided: dict[str, Any] = {
        "conditioning": {"y": torch.arange(6.0)},
        "unconditional": {"y": 0},
        "guidance_scale": 2.0,
    }
    expected = olss_fast.sample(fresh, plan, noise(), doubled=False, **guided)
    assert torch.equal(olss_fast.sample(reusing, plan, noise(), doubled=False, **guided), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"unconditional": {"y": "none"}},
        {"conditioning": torch.zeros(6)},
        {"guidance_scale": "a"},
        {"guidance_scale": None},
    ],
)
def test_wrong_types_are_named(plan: olss_fast.Plan, change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        olss_fast.sample(Spy(), plan, noise(), **{**GUIDED, **change})
    with pytest.raises(InputError, match="callable"):
        olss_fast.sample(5, plan, noise())  # type: ignore[arg-type]
