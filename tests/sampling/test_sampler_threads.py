"""One Sampler in several threads, and inside its own network: every call gives what it gives alone."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from fake_graphs import use_fake_graphs
from many_threads import hasty, in_threads  # noqa: F401
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule, solvers
from olss_fast.errors import InputError, NetworkError
from olss_fast.sampling.sampler import Sampler

SCHEDULE = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
PLANS = [solvers.euler(SCHEDULE, 5), solvers.unipc(SCHEDULE, 7), solvers.ddim(SCHEDULE, 5, eta=1.0)]


@pytest.fixture(params=["fused", "graph"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_fake_graphs(monkeypatch)
    return request.param


def network(x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
    bent = torch.tanh(x.roll(1, -1) + timestep[:, None] / 300)
    return bent if y is None else bent + y[:, None]


def noise_of(i: int, samples: int = 3) -> Tensor:
    return torch.randn(samples, 16, generator=torch.Generator().manual_seed(i))


def test_every_call_is_as_it_is_alone(backend: str) -> None:
    """With shapes, conditions and noises of their own."""

    def call(sampler: Sampler, i: int) -> Tensor:
        samples = 1 + i % 3
        given = {"y": torch.arange(samples) / 10 + i % 5} if i % 2 else {}
        return sampler(noise_of(i, samples), generator=torch.Generator().manual_seed(i), **given)

    for plan in PLANS[1:]:
        sampler = Sampler(network, plan, backend=backend)
        alone = [call(sampler, i) for i in range(12)]
        found = in_threads(lambda i, sampler=sampler: call(sampler, i % 12), 120)
        assert sum(not torch.equal(each, alone[i % 12]) for i, each in enumerate(found)) == 0
        assert sampler.stats().backend == backend


def test_a_plan_is_swapped_between_calls_never_within(backend: str) -> None:
    sampler = Sampler(network, PLANS[0], backend=backend)
    noise = noise_of(0)
    right = [sampler(noise)]
    sampler.plan = PLANS[1]
    right.append(sampler(noise))

    def call(i: int) -> bool:
        sampler.plan = PLANS[i % 2]
        result = sampler(noise)
        return any(torch.equal(result, each) for each in right)

    assert all(in_threads(call, 200))


def test_a_sampler_inside_its_own_network() -> None:
    """As a network does that asks for a draft."""
    inner = True

    def recursive(x: Tensor, timestep: Tensor) -> Tensor:
        nonlocal inner
        draft = torch.zeros_like(x)
        if inner:
            inner = False
            draft = sampler(noise_of(1))
            inner = True
        return network(x, timestep) + draft

    sampler = Sampler(recursive, PLANS[1])
    draft = olss_fast.sample(network, PLANS[1], noise_of(1))
    expected = olss_fast.sample(lambda x, t: network(x, t) + draft, PLANS[1], noise_of(0))
    torch.testing.assert_close(sampler(noise_of(0)), expected, rtol=1e-4, atol=1e-5)


def test_graphs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture serves all threads, and no two of them are in it at once."""
    use_fake_graphs(monkeypatch)
    inside, most = 0, 0

    def counting(x: Tensor, timestep: Tensor) -> Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        output = network(x, timestep)
        inside -= 1
        return output

    sampler = Sampler(counting, PLANS[0], backend="graph")
    in_threads(lambda i: sampler(noise_of(i)), 40)
    assert most == 1
    assert sampler.stats().captures == 1
    assert sampler.stats().replays == 40 * 5


def test_buffers_are_as_many_as_there_were_calls_at_once() -> None:
    together = threading.Barrier(3, timeout=60)

    def waiting(x: Tensor, timestep: Tensor) -> Tensor:
        together.wait()
        return network(x, timestep)

    sampler = Sampler(waiting, PLANS[0])
    in_threads(lambda i: sampler(noise_of(i)), 6, threads=3)
    single = Sampler(network, PLANS[0])
    single(noise_of(0))
    assert sampler.stats().bytes == 3 * single.stats().bytes


def test_what_is_not_finite_is_named_in_the_thread_that_had_it() -> None:
    def bad(x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return torch.where(timestep[:, None] <= y[:, None], torch.nan, x)

    sampler = Sampler(bad, PLANS[0])
    times = PLANS[0].timesteps

    def call(i: int) -> str:
        try:
            sampler(noise_of(i), y=torch.full((3,), float(times[i % 5]) if i % 2 else -1.0))
        except NetworkError as error:
            return str(error)
        return ""

    for i, message in enumerate(in_threads(call, 100)):
        assert (f"at evaluation {i % 5};" in message) if i % 2 else not message


def test_the_last_run_is_that_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its buffers went to another thread, there is nothing to look at any more."""
    use_fake_graphs(monkeypatch)
    sampler = Sampler(network, PLANS[0], backend="graph")
    sampler(noise_of(0))
    in_threads(lambda i: sampler(noise_of(i)), 1)
    with pytest.raises(InputError, match="another thread"):
        sampler.require_finite()
    sampler(noise_of(0))
    sampler.require_finite()


def test_a_copy_makes_buffers_of_its_own() -> None:
    sampler = Sampler(network, PLANS[0])
    expected = sampler(noise_of(0))
    again = copy.deepcopy(sampler)
    assert again.stats().bytes == 0
    assert torch.equal(again(noise_of(0)), expected)
