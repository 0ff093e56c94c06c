"""The executors behind `Sampler`: all of them give what the reference gives, and swap in place what may be swapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_graphs import FakeGraph, use_fake_graphs
from kernel_counts import Counts, count_sampler
from torch import Tensor
from torch.utils import _pytree as pytree

import olss_fast
from olss_fast import NoiseSchedule, Plan, solvers
from olss_fast.errors import InputError, NetworkError
from olss_fast.executors import graph
from olss_fast.executors.loop_cache import KEPT
from olss_fast.sampling.sampler import Sampler
from olss_fast.support.tree import flat

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 4, 6, 5)
PLANS = {
    "ddim": solvers.ddim(SCHEDULE, 6),
    "unipc": solvers.unipc(SCHEDULE, 5, order=3),
    "heun": solvers.heun(SCHEDULE, 7),
    "ddim eta": solvers.ddim(SCHEDULE, 6, eta=1.0),
    "ancestral": solvers.euler_ancestral(SCHEDULE, 4),
}


class Net(torch.nn.Module):
    """Something that is not linear in x and feels the timestep and its condition."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(4, 4, 1, dtype=dtype)
        torch.nn.init.eye_(self.mix.weight[:, :, 0, 0])

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        t = (timestep / 1000).view(-1, 1, 1, 1).to(x.dtype)
        shift = 0.0 if y is None else (y.to(x.dtype) / 10).view(-1, 1, 1, 1)
        return scale * torch.tanh(self.mix(x) * (0.5 + t) + shift)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_graphs(monkeypatch)


GUIDED = {"conditioning": {"y": torch.tensor([3, 7])}, "unconditional": {"y": 0}, "guidance_scale": 2.5}


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("backend", ["fused", "graph", "unrolled"])
@pytest.mark.parametrize("name", PLANS)
def test_every_backend_is_the_reference(
    name: str, backend: str, guided: bool, net: Net, noise: Tensor, fake_graphs: None
) -> None:
    how = GUIDED if guided else {"conditioning": {"y": torch.tensor([3, 7])}}
    seeded = [torch.Generator().manual_seed(4) for _ in range(2)]
    expected = olss_fast.sample(net, PLANS[name], noise, generator=seeded[0], **how)
    sampler = Sampler(
        net, PLANS[name], backend="graph" if backend == "unrolled" else backend, unroll=backend == "unrolled", **how
    )
    calls: list[object] = []
    net.register_forward_pre_hook(lambda *call: calls.append(call))
    got = sampler(noise, generator=seeded[1])
    warm_up = {"fused": 0, "graph": 1, "unrolled": PLANS[name].nfe}[backend]
    assert len(calls) == PLANS[name].nfe + warm_up  # one call an evaluation, guided or not
    # float32 rows of about ten terms of size 10 against float64 ones
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.dtype == noise.dtype
    assert sampler.stats().backend == ("fused" if backend == "fused" else "graph")


def test_graph_is_bitwise_fused(net: Net, noise: Tensor, fake_graphs: None) -> None:
    results = [Sampler(net, PLANS["unipc"], backend=backend, **GUIDED)(noise) for backend in ("fused", "graph")]
    assert torch.equal(*results)


def test_the_usual_arguments_are_not_walked(net: Net, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's walk through a tree costs more Python calls than a step."""
    sampler = Sampler(net, PLANS["ddim"], backend="fused", **GUIDED)
    expected = sampler(noise)
    for walk in ("tree_flatten", "tree_flatten_with_path", "tree_map"):
        monkeypatch.setattr(pytree, walk, None)
    assert torch.equal(sampler(noise), expected)
    assert torch.equal(sampler(noise, y=torch.tensor([3, 7])), expected)


def test_a_dict_of_leaves_has_the_form_that_torch_gives_it() -> None:
    y = torch.ones(2)
    trees: list[dict[str, Any]] = [{}, {"y": y}, {"b": None, "a": 1.5}, {"y": torch.nn.Parameter(y)}]
    for tree in trees:
        leaves, form = flat(tree)
        assert form == pytree.tree_flatten(tree)[1]
        assert [*map(id, leaves)] == [*map(id, tree.values())]


def test_split_guidance(net: Net, noise: Tensor) -> None:
    plan = PLANS["ddim"]
    g = 2.5
    rows = np.concatenate(
        [plan.rows[:, :1], np.stack([(1 - g) * plan.rows[:, 1:], g * plan.rows[:, 1:]], axis=2).reshape(7, -1)], axis=1
    )
    split = plan.replace(rows=rows, branches=2)
    expected = olss_fast.sample(net, plan, noise, **GUIDED)
    torch.testing.assert_close(Sampler(net, split, backend="fused", **GUIDED)(noise), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="keeps the unconditional and the conditional output apart"):
        Sampler(net, split, backend="fused", conditioning={"y": torch.tensor([1, 2])})(noise)


def test_everything_is_swapped_in_place(net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend="graph", **GUIDED)
    sampler(noise)
    for plan, scale, y in [(PLANS["unipc"], 2.5, [1, 2]), (PLANS["heun"], 4.0, [5, 5]), (PLANS["ddim"], 4.0, [3, 7])]:
        sampler.plan, sampler.guidance_scale = plan, scale
        got = sampler(noise, y=torch.tensor(y))
        expected = olss_fast.sample(
            net, plan, noise, **{**GUIDED, "conditioning": {"y": torch.tensor(y)}, "guidance_scale": scale}
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert sampler.stats().captures == 1
    assert sampler.stats().replays == 6 + 5 + 7 + 6


def test_a_network_that_cannot_be_captured_falls_back(net: Net, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], None], pool: Any, device: Any) -> FakeGraph:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture", refuse)
    monkeypatch.setattr("olss_fast.sampling.sampler.require_cuda", lambda device: None)
    sampler = Sampler(net, PLANS["ddim"], backend="graph")
    torch.testing.assert_close(sampler(noise), olss_fast.sample(net, PLANS["ddim"], noise), rtol=1e-4, atol=1e-5)
    assert sampler.stats().backend == "fused"
    assert "RuntimeError: operation not permitted" in sampler.stats().reason


def test_errors_of_the_network_are_no_reason_to_fall_back(noise: Tensor, fake_graphs: None) -> None:
    with pytest.raises(NetworkError, match="returned shape"):
        Sampler(lambda x, t: x[:, :1], PLANS["ddim"], backend="graph")(noise)


def test_shapes_are_kept_and_the_oldest_goes(net: Net, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend="graph")
    for size in range(1, KEPT + 2):
        sampler(torch.randn(size, 4, 3, 3))
    assert sampler.stats().captures == KEPT + 1
    sampler(torch.randn(KEPT + 1, 4, 3, 3))
    assert sampler.stats().captures == KEPT + 1
    sampler(torch.randn(1, 4, 3, 3))
    assert sampler.stats().captures == KEPT + 2
    assert sampler.stats().replays == (KEPT + 3) * 6


@pytest.mark.parametrize("backend", ["fused", "graph"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_memory_formats(dtype: torch.dtype, backend: str, noise: Tensor, fake_graphs: None) -> None:
    torch.manual_seed(0)
    net = Net(dtype)
    given = noise.to(dtype).to(memory_format=torch.channels_last)
    got = Sampler(net, PLANS["unipc"], backend=backend, **GUIDED)(given)
    assert got.dtype == dtype
    exact = olss_fast.sample(net.to(torch.float64), PLANS["unipc"], given.double(), **GUIDED)
    # ten roundings of half precision on values of size 10; the reference rounds the network's inputs alone
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float64: 1e-12}[dtype]
    assert float((got.double() - exact).abs().max()) <= tolerance


def test_arguments_that_cannot_be_joined_take_two_calls(net: Net, noise: Tensor) -> None:
    how = {"conditioning": {"scale": 1.0}, "unconditional": {"scale": 0.5}, "guidance_scale": 3.0}
    got = Sampler(net, PLANS["ddim"], backend="fused", **how)(noise)
    torch.testing.assert_close(got, olss_fast.sample(net, PLANS["ddim"], noise, **how), rtol=1e-4, atol=1e-5)


def test_a_schedule_of_several_networks(noise: Tensor, fake_graphs: None) -> None:
    torch.manual_seed(0)
    nets = [Net(), Net()]
    with torch.no_grad():
        nets[1].mix.weight.mul_(0.5)
    plan = PLANS["ddim"].replace(models=[0, 1, 1, 0, 1, 0])
    expected = olss_fast.sample(nets, plan, noise)
    for backend in ("fused", "graph"):
        sampler = Sampler(nets, plan, backend=backend)
        torch.testing.assert_close(sampler(noise), expected, rtol=1e-4, atol=1e-5)
    assert sampler.stats().captures == 2


def test_what_is_not_finite_is_named(noise: Tensor) -> None:
    def bad(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.view(-1, 1, 1, 1) < 400, torch.nan, x)

    plan = PLANS["ddim"]
    first = int(np.flatnonzero(plan.timesteps < 400)[0])
    with pytest.raises(NetworkError, match=f"NaN or infinity at evaluation {first};"):
        Sampler(bad, plan, backend="fused")(noise)


def test_a_graph_needs_a_gpu(net: Net) -> None:
    with pytest.raises(InputError, match="needs a CUDA device, got cpu"):
        Sampler(net, PLANS["ddim"], backend="graph")


def test_a_shape_makes_everything_ready(net: Net, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], shape=SHAPE, backend="graph")
    assert sampler.stats().captures == 1
    assert sampler.stats().bytes > 0
    assert sampler.stats().kernels_per_step == 1


def test_reference(net: Net, noise: Tensor) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend="reference", **GUIDED)
    assert torch.equal(sampler(noise), olss_fast.sample(net, PLANS["ddim"], noise, **GUIDED))
    assert sampler.stats().backend == "reference"


def test_plan_of_another_length_gets_more_room(net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend="graph")
    sampler(noise)
    sampler.plan = solvers.ddim(SCHEDULE, 40)
    expected = olss_fast.sample(net, sampler.plan, noise)
    torch.testing.assert_close(sampler(noise), expected, rtol=1e-4, atol=1e-5)
    assert sampler.stats().captures == 2
    assert isinstance(sampler.plan, Plan)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_kernel_a_step_and_nothing_for_the_host(dtype: torch.dtype, guided: bool) -> None:
    """Counted with fake CUDA tensors, guidance, history, next input and next time included."""
    plan = PLANS["unipc"]
    counts = count_sampler(plan, guided=guided, dtype=dtype)
    assert counts == Counts(kernels=plan.nfe + 1, syncs=0, uploads=0)  # and one to begin with


def test_composes_with_a_compiled_network(net: Net, noise: Tensor, fake_graphs: None) -> None:
    expected = olss_fast.sample(net, PLANS["unipc"], noise, **GUIDED)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for backend in ("fused", "graph"):
        got = Sampler(compiled, PLANS["unipc"], backend=backend, **GUIDED)(noise)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_composes_with_an_ahead_of_time_package(net: Net, noise: Tensor, tmp_path: Path) -> None:
    example = (noise, torch.zeros(2), torch.tensor([3, 7]))
    exported = torch.export.export(net.eval(), example)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    package = torch._inductor.aoti_load_package(path)
    sampler = Sampler(lambda x, t, y: package(x, t, y), PLANS["unipc"], backend="fused", conditioning={"y": example[2]})
    expected = olss_fast.sample(net, PLANS["unipc"], noise, conditioning={"y": example[2]})
    torch.testing.assert_close(sampler(noise), expected, rtol=1e-4, atol=1e-5)


def nested(x: Tensor, t: Tensor, extra: dict[str, Any]) -> Tensor:
    assert len(extra["y"]) == len(x)
    return torch.tanh(x + (extra["y"] / 10).view(-1, 1, 1, 1)) * extra["scale"]


def test_nested_arguments_belong_to_samples_too(noise: Tensor) -> None:
    """As the added conditions of SDXL do."""
    given = {"extra": {"y": torch.tensor([1.0, 2.0]), "scale": 0.5}}
    without = {"extra": {"y": torch.tensor([0.0, 0.0]), "scale": 0.5}}
    how: dict[str, Any] = {"conditioning": given, "unconditional": without, "guidance_scale": 2.0}
    expected = olss_fast.sample(nested, PLANS["ddim"], noise, **how)
    torch.testing.assert_close(Sampler(nested, PLANS["ddim"], **how)(noise), expected, rtol=1e-4, atol=1e-5)
    one_by_one = olss_fast.sample(nested, PLANS["ddim"], noise, batch_size=1, **how)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-6)


def test_a_bad_call_is_no_reason_to_give_up_graphs(net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend="graph")
    sampler(noise)
    with pytest.raises(TypeError, match="nonsense"):
        sampler(noise, nonsense=1)
    sampler(noise)
    assert sampler.stats().backend == "graph"
    assert sampler.stats().reason == ""


def test_one_shape_that_cannot_be_captured_leaves_the_others(
    net: Net, noise: Tensor, monkeypatch: pytest.MonkeyPatch, fake_graphs: None
) -> None:
    usual = graph.capture

    def picky(function: Callable[[], None], pool: Any, device: Any) -> Any:
        if len(noise) == wanted:
            raise RuntimeError("not this one")
        return usual(function, pool, device)

    monkeypatch.setattr(graph, "capture", picky)
    sampler = Sampler(net, PLANS["ddim"], backend="graph")
    wanted = len(noise)
    sampler(noise)
    assert sampler.stats().backend == "fused"
    wanted = -1
    sampler(noise[:1])
    assert sampler.stats().backend == "graph"
    assert "not this one" in sampler.stats().reason


@pytest.mark.parametrize("backend", ["fused", "graph"])
def test_buffers_outlive_inference_mode(backend: str, net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend=backend)
    with torch.inference_mode():
        first = sampler(noise)
    torch.testing.assert_close(sampler(noise), first)


def test_room_only_grows(net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, solvers.ddim(SCHEDULE, 40), backend="graph")
    for _ in range(3):
        sampler(noise)
        sampler.plan = PLANS["ddim eta"]
        sampler(noise)
        sampler.plan = solvers.ddim(SCHEDULE, 40)
    assert sampler.stats().captures == 2


@pytest.mark.parametrize("result", [lambda x: x, lambda x: x.clone(), lambda x: x.detach().view(x.shape)])
def test_networks_that_work_in_place(noise: Tensor, result: Callable[[Tensor], Tensor]) -> None:
    expected = olss_fast.sample(lambda x, t: 0.5 * x, PLANS["ddim"], noise)
    sampler = Sampler(lambda x, t: result(x.mul_(0.5)), PLANS["ddim"], backend="fused")
    for _ in range(2):
        torch.testing.assert_close(sampler(noise), expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_works_in_place_later_only_is_named(noise: Tensor) -> None:
    def late(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x if t[0] > 500 else x.mul_(0.5)

    with pytest.raises(NetworkError, match=r"wrote to its input, for the first time at evaluation [1-9]"):
        Sampler(late, PLANS["ddim"], backend="fused")(noise)


def test_arguments_are_told_apart_by_type(noise: Tensor) -> None:
    seen: list[Any] = []

    def remember(x: Tensor, t: Tensor, flag: Any) -> Tensor:
        seen.append(flag)
        return x

    sampler = Sampler(remember, solvers.ddim(SCHEDULE, 1), backend="fused")
    for flag in (1, True, [1], (1,)):
        sampler(noise, flag=flag)
    assert [(type(each), each) for each in seen] == [(int, 1), (bool, True), (list, [1]), (tuple, (1,))]


def test_a_reset_captures_again(net: Net, noise: Tensor, fake_graphs: None) -> None:
    sampler = Sampler(net, PLANS["ddim"], backend="graph")
    sampler(noise)
    sampler.reset()
    sampler(noise)
    assert sampler.stats().captures == 2
