"""What `Sampler` refuses, at once and by name; and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule, solvers
from olss_fast.errors import InputError, NetworkError
from olss_fast.sampling.sampler import Sampler

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
PLAN, STOCHASTIC = solvers.ddim(SCHEDULE, 3), solvers.ddim(SCHEDULE, 3, eta=1.0)
SHAPE = (2, 4, 6, 5)


def network(x: Tensor, timestep: Tensor) -> Tensor:
    return 0.5 * x


def never(x: Tensor, timestep: Tensor) -> Tensor:
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "ddim"}, "plan is a str .ddim.; expected a Plan: read plan files"),
        ({"network": 3}, "callable or a list of callables, got 3"),
        ({"network": []}, r"callable or a list of callables, got \[\]"),
        ({"shape": 5}, r"shape is 5; expected the noise's, \(samples, ...\)"),
        ({"shape": (0, 4)}, r"shape is \(0, 4\)"),
        ({"shape": (-1, 4)}, r"shape is \(-1, 4\)"),
        ({"shape": (3,)}, r"shape is \(3,\)"),
        ({"shape": (1.5, 4)}, r"shape is \(1.5, 4\)"),
        ({"shape": (True, 4)}, r"shape is \(True, 4\)"),
        ({"shape": "12"}, "shape is '12'"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected torch.float16"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn"),
        ({"device": "nonsense"}, "device is 'nonsense', which torch cannot use"),
        ({"device": "meta"}, "device is 'meta', which torch cannot use"),
        ({"device": 3.5}, "device is '3.5', which torch cannot use"),
        ({"conditioning": [1]}, "conditioning must be a mapping of argument names to values, got list"),
        ({"conditioning": {1: 2}}, r"conditioning must be .* got the keys \[1\]"),
        ({"unconditional": 0}, "unconditional must be a mapping of argument names to values, got int"),
        ({"guidance_scale": "x"}, "guidance_scale must be a number, got 'x'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite in float32, got nan"),
        ({"guidance_scale": 1e39}, r"guidance_scale must be finite in float32, got 1e\+39"),
        ({"guidance_scale": 2.0, "shape": SHAPE}, "needs the unconditional arguments too"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"backend": "graph", "device": "cpu"}, "needs a CUDA device, got cpu"),
    ],
)
def test_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**{"plan": PLAN, "network": never, **arguments})


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    ("noise", "arguments", "message"),
    [
        (None, {}, "neither noise nor shape came; expected noise, a tensor"),
        ([1.0], {}, "noise must be a tensor of shape .*, got list"),
        (torch.ones(3), {}, r"noise must be .* of \(3,\)"),
        (torch.ones(SHAPE, dtype=torch.int64), {}, "got torch.int64"),
        (torch.ones(SHAPE).to(torch.float8_e4m3fn), {}, "got torch.float8_e4m3fn"),
        (torch.ones(SHAPE).to_sparse(), {}, "noise must be an ordinary tensor .* torch.sparse_coo on cpu"),
        (torch.ones(SHAPE, device="meta"), {}, "noise must be an ordinary tensor that holds its values, .* on meta"),
        (torch.full(SHAPE, torch.nan), {}, r"noise holds NaN or infinity in sample\(s\) \[0, 1\]"),
        (torch.ones(SHAPE), {"generator": 3}, "generator is a int; expected a torch.Generator"),
        (torch.ones(SHAPE), {"unconditional": [1]}, "unconditional must be a mapping"),
    ],
)
def test_refused_when_called(noise: Any, arguments: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(never, PLAN, backend=backend)(noise, **arguments)


def test_refused_when_swapped_and_the_old_one_stays() -> None:
    sampler = Sampler(network, PLAN)
    with pytest.raises(InputError, match="guidance_scale must be a number, got 'x'"):
        sampler.guidance_scale = "x"  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"plan is a str .x.; expected a Plan"):
        sampler.plan = "x"  # type: ignore[assignment]
    assert (sampler.plan, sampler.guidance_scale) == (PLAN, 1.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x, t: x.to_sparse(), r"layout torch\.sparse_coo"),
        (lambda x, t: x.to("meta"), "a tensor on meta for an input on cpu"),
        (lambda x, t: None, "returned NoneType"),
    ],
)
def test_unusable_outputs_are_named(bad: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        Sampler(bad, PLAN, backend="fused")(torch.ones(SHAPE))


def test_values_whose_sum_overflows_are_finite() -> None:
    noise = torch.full(SHAPE, 1e37)
    assert bool(torch.isfinite(Sampler(lambda x, t: torch.zeros_like(x), PLAN)(noise)).all())


@pytest.mark.parametrize("values", [[torch.inf], [torch.inf, -torch.inf], [torch.nan]])
def test_one_value_that_is_not_finite_is_found(values: list[float]) -> None:
    noise = torch.zeros(SHAPE)
    noise[1].view(-1)[: len(values)] = torch.tensor(values)
    with pytest.raises(InputError, match=r"noise holds NaN or infinity in sample\(s\) \[1\]"):
        Sampler(never, PLAN)(noise)


def test_making_ready_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    sampler = Sampler(network, STOCHASTIC, shape=SHAPE)
    assert sampler.stats().bytes > 0
    assert torch.equal(torch.get_rng_state(), before)
    noise = torch.ones(SHAPE)
    got = sampler(noise, generator=torch.Generator().manual_seed(1))
    expected = olss_fast.sample(network, STOCHASTIC, noise, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # float32 rows of ten terms of size 10
