"""Engines: the samples of `olss_fast.sample`, in every way to call them; weights that change."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import GUIDED, SCHEDULE, UNGUIDED, engine_file, folded, noise_for, tiny, tiny_engine
from torch import Tensor, nn

import olss_fast
from olss_fast import Engine, Plan, solvers
from olss_fast.errors import EngineFileError, InputError, MachineError

# The compiled network and its loop round in another order than eager code: a few units in the last place of each of at
# most 5 outputs, which the plan's rows (up to 15) and the guidance (up to 3) weigh.
UNITS = 16
LABELS = torch.tensor([2, 0])
TABLE = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bound = UNITS * torch.finfo(found.dtype).eps * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def sampled(kind: str, plan: Plan, noise: Tensor, labels: Any = None, **options: Any) -> Tensor:
    """By the network that `tiny_engine(kind)` was built from."""
    if labels is not None:
        options = {"conditioning": {"labels": labels}, "unconditional": {"labels": 3}, **options}
    return olss_fast.sample(tiny(kind).network, plan, noise, **options)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def own_engine(kind: str) -> Engine:
    """One whose weights may be changed."""
    return olss_fast.load_engine(engine_file(kind))


# --- the same samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDED)
def test_every_plan_by_its_name(name: str) -> None:
    noise, plan = noise_for("guided"), GUIDED[name]
    found = tiny_engine("guided")(noise, labels=LABELS, plan=name, generator=generator())
    assert_near(found, sampled("guided", plan, noise, LABELS, guidance_scale=1.5, generator=generator()))


def test_plans_by_their_steps_and_others_than_its_own() -> None:
    engine, noise = tiny_engine("guided"), noise_for("guided")
    two, three = (engine(noise, labels=LABELS, plan=name) for name in ("two", "three"))
    assert torch.equal(engine(noise, labels=LABELS), two)
    assert torch.equal(engine(noise, labels=LABELS, steps=3), three)
    for plan in (solvers.heun(SCHEDULE, 6), folded(GUIDED["three"], 3.0)):
        found = engine(noise, labels=LABELS, plan=plan, guidance_scale=3.0)
        assert_near(found, sampled("guided", plan, noise, LABELS, guidance_scale=3.0))


@pytest.mark.parametrize("scale", [None, 1.5, 1.0, 0, 3.0, -0.5])
def test_guidance(scale: float | None) -> None:
    noise = noise_for("guided")
    found = tiny_engine("guided")(noise, labels=LABELS, guidance_scale=scale)
    expected = sampled("guided", GUIDED["two"], noise, LABELS, guidance_scale=1.5 if scale is None else scale)
    assert_near(found, expected)


@pytest.mark.parametrize("without", [1, torch.tensor([1]), torch.tensor([1, 0])])
def test_unconditional_arguments_of_the_call(without: Any) -> None:
    noise = noise_for("guided")
    found = tiny_engine("guided")(noise, labels=LABELS, unconditional={"labels": without})
    given = {"unconditional": {"labels": without}, "guidance_scale": 1.5}
    assert_near(found, sampled("guided", GUIDED["two"], noise, LABELS, **given))
    assert not torch.equal(found, tiny_engine("guided")(noise, labels=LABELS))


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (12, 24), (16, 20)])
def test_all_shapes_of_the_profile(samples: int, size: tuple[int, int]) -> None:
    noise, labels = noise_for("guided", samples, *size), torch.arange(samples) % 4
    found = tiny_engine("guided")(noise, labels=labels)
    assert_near(found, sampled("guided", GUIDED["two"], noise, labels, guidance_scale=1.5))


def test_numbers_stand_for_every_sample() -> None:
    engine, noise = tiny_engine("guided"), noise_for("guided")
    assert torch.equal(engine(noise, labels=2), engine(noise, labels=torch.tensor([2, 2])))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_nested_conditioning(samples: int) -> None:
    noise = noise_for("nested", samples)
    added = {"text": torch.ones(samples, 3).cumsum(0), "strength": torch.arange(samples) * 1.0, "table": TABLE}
    without = {"text": torch.zeros(samples, 3), "strength": torch.ones(samples), "table": TABLE}
    expected = olss_fast.sample(
        tiny("nested").network,
        GUIDED["three"],
        noise,
        conditioning={"added": added, "gain": 0.5},
        unconditional={"added": without, "gain": 0.5},
        guidance_scale=2.0,
    )
    assert_near(tiny_engine("nested")(noise, added=added, plan="three"), expected)
    assert tiny_engine("nested").manifest.facts["fixed"] == {"gain": "0.5"}


@pytest.mark.parametrize("kind", ["plain", "float64"])
@pytest.mark.parametrize("name", UNGUIDED)
def test_networks_without_conditioning(kind: str, name: str) -> None:
    noise = noise_for(kind)
    found = tiny_engine(kind)(noise, plan=name, generator=generator())
    assert_near(found, sampled(kind, UNGUIDED[name], noise, generator=generator()))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_keeps_to_the_error_budget(kind: str) -> None:
    """Eager half precision errs by its rounding; the engine's loop rounds as often, in other places."""
    noise, plan = noise_for(kind), UNGUIDED["three"]
    exact = olss_fast.sample(tiny(kind).network.double(), plan, noise.double())
    eager = (sampled(kind, plan, noise).double() - exact).square().mean().sqrt()
    found = tiny_engine(kind)(noise, plan="three")
    assert found.dtype == noise.dtype
    assert (found.double() - exact).square().mean().sqrt() <= 2 * eager


# --- files, interpreters, threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["guided", "float64"])
def test_saved_and_loaded_is_bitwise_the_same(kind: str, tmp_path: Path) -> None:
    given = {"labels": LABELS} if kind == "guided" else {}
    built = tiny(kind).build()
    built.save(tmp_path / "first.olss")
    loaded = olss_fast.load_engine(tmp_path / "first.olss")
    loaded.save(tmp_path / "second.olss")
    assert torch.equal(loaded(noise_for(kind), **given), built(noise_for(kind), **given))
    assert (tmp_path / "first.olss").read_bytes() == (tmp_path / "second.olss").read_bytes()


def test_weights_keep_their_memory_order() -> None:
    network = tiny("float64").network
    found = tiny_engine("float64").weights["into.weight"]
    assert found.stride() == network.into.weight.stride() != (18, 9, 3, 1)


FRESH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "engines"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Blocked())
import numpy, torch, olss_fast
engine = olss_fast.load_engine(sys.argv[1])
noise = torch.from_numpy(numpy.load(sys.argv[2]))
numpy.save(sys.argv[3], engine(noise, labels=1, steps=3).numpy())
"""


def test_runs_where_neither_diffusers_nor_the_networks_code_is(tmp_path: Path) -> None:
    import numpy as np

    noise = noise_for("guided")
    np.save(tmp_path / "noise.npy", noise.numpy())
    arguments = [str(engine_file("guided")), str(tmp_path / "noise.npy"), str(tmp_path / "found.npy")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path)
    here = tiny_engine("guided")(noise, labels=1, steps=3)
    assert np.array_equal(np.load(tmp_path / "found.npy"), here.numpy())


def test_threads_share_an_engine() -> None:
    engine = tiny_engine("guided")
    jobs = [(noise_for("guided", 1 + i % 4), ("two", "three", "split")[i % 3]) for i in range(48)]
    serial = [engine(noise, labels=1, plan=plan) for noise, plan in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: engine(job[0], labels=1, plan=job[1]), jobs))
    assert all(torch.equal(*pair) for pair in zip(found, serial, strict=True))


def test_stats() -> None:
    engine = own_engine("plain")
    assert engine.stats().bytes == 0
    engine(noise_for("plain"))
    stats = engine.stats()
    assert (stats.backend, stats.captures, stats.replays, stats.reason) == ("fused", 0, 0, "")
    # History of 16 evaluations and x_T at least, and the network's input.
    assert stats.bytes >= 18 * noise_for("plain").nbytes
    engine(noise_for("plain"), plan="three")
    assert engine.stats().bytes == stats.bytes


def test_results_are_the_callers_own() -> None:
    engine, noise = tiny_engine("plain"), noise_for("plain")
    first = engine(noise)
    before, given = first.clone(), noise.clone()
    engine(noise + 1)
    assert torch.equal(first, before)
    assert torch.equal(noise, given)


def test_the_digest_that_a_file_ought_to_have() -> None:
    """What sha256sum prints, in either case of letters; the checksum inside the file covers all of it as well."""
    path, inner = engine_file("plain"), tiny_engine("plain").manifest.facts["sha256"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest.upper(), inner):
        olss_fast.load_engine(path, sha256=right)
    with pytest.raises(EngineFileError, match=f"its sha256 is {digest}; expected 0000.*another file than you mean"):
        olss_fast.load_engine(path, sha256="0" * 64)
    with pytest.raises(InputError, match="sha256 is 'abc'; expected 64 hexadecimal digits, as sha256sum prints them"):
        olss_fast.load_engine(path, sha256="abc")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "nonsense"])
def test_another_device_than_it_was_built_for(device: str) -> None:
    with pytest.raises(MachineError, match=f"built for cpu and is to run on {device}: build one for {device}"):
        olss_fast.load_engine(engine_file("plain"), device=device)


# --- weights -------------------------------------------------------------------------------------------------------


def changed(network: nn.Module, seed: int = 3) -> nn.Module:
    """The same network with other weights."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=draws, dtype=torch.float64).to(weight.dtype))
    return network


@pytest.mark.parametrize("kind", ["plain", "float64"])
def test_updated_weights_give_the_samples_of_the_changed_network(kind: str, tmp_path: Path) -> None:
    engine, noise, network = own_engine(kind), noise_for(kind), changed(tiny(kind).network)
    before = engine(noise)
    engine.update_weights(network.state_dict())
    after = engine(noise)
    assert_near(after, olss_fast.sample(network, UNGUIDED["two"], noise))
    assert float((after - before).abs().max()) > 0.1
    engine.save(tmp_path / "changed.olss")
    loaded = olss_fast.load_engine(tmp_path / "changed.olss")
    assert torch.equal(loaded(noise), after)
    old, new = tiny_engine(kind).manifest.facts["hashes"], loaded.manifest.facts["hashes"]
    assert (old["weights"] != new["weights"], old["code"] == new["code"]) == (True, True)
    assert torch.equal(tiny_engine(kind)(noise), before)  # loaded from the same file, and has weights of its own


def test_some_weights_alone_are_updated() -> None:
    engine, network, noise = own_engine("guided"), tiny("guided").network, noise_for("guided")
    other = changed(tiny("guided").network)
    engine.update_weights({"classes.weight": other.classes.weight, "frequencies": torch.tensor([2.0, 0.5])})
    network.classes, network.frequencies = other.classes, torch.tensor([2.0, 0.5])
    given = {"conditioning": {"labels": LABELS}, "unconditional": {"labels": 3}, "guidance_scale": 1.5}
    assert_near(engine(noise, labels=LABELS), olss_fast.sample(network, GUIDED["two"], noise, **given))


def test_lora_merged_in_place() -> None:
    """W + s B A, in another dtype than the engine's: it is rounded once, as a merge in the network would be."""
    engine, network, noise = own_engine("plain"), tiny("plain").network, noise_for("plain")
    draws = torch.Generator().manual_seed(4)
    up, down = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ((4, 2), (2, 18)))
    merged = network.into.weight.double() + 0.7 * (up @ down).reshape(4, 2, 3, 3)
    engine.update_weights({"into.weight": merged})
    with torch.no_grad():
        network.into.weight.copy_(merged)
    assert_near(engine(noise), olss_fast.sample(network, UNGUIDED["two"], noise))


def test_an_engine_shares_no_memory_with_its_network() -> None:
    parts, noise = tiny("plain"), noise_for("plain")
    engine = parts.build()
    before = engine(noise)
    changed(parts.network)
    assert torch.equal(engine(noise), before)
    state = {name: each.clone() for name, each in parts.network.state_dict().items()}
    engine.update_weights(state)
    after = engine(noise)
    for each in state.values():
        each.zero_()
    assert torch.equal(engine(noise), after)


def test_a_tied_weight_is_updated_by_either_name() -> None:
    engine, noise = own_engine("plain"), noise_for("plain")
    before = engine(noise)
    tied = engine.manifest.facts["tied"]
    ((second, first),) = tied.items()
    assert {second, first} >= {"back.weight"}
    weight = engine.weights[first].clone()
    with pytest.raises(InputError, match=f"{second} and {first} are one weight .* different values"):
        engine.update_weights({second: weight, first: 2.0 * weight})
    assert torch.equal(engine(noise), before)
    engine.update_weights({second: 2.0 * weight, first: 2.0 * weight})
    after = engine(noise)
    engine.update_weights({second: weight})
    assert torch.equal(engine(noise), before)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "state_dict is a list; expected a mapping"),
        ({"into.wieght": torch.zeros(1)}, "no weights into.wieght; its weights are back.bias, down.bias"),
        ({3: torch.zeros(1)}, "no weights 3;"),
        ({"time.bias": 3}, "nothing was changed: time.bias is a int, expected a tensor"),
        ({"time.bias": torch.zeros(5)}, r"time.bias has shape \(5,\), expected \(4,\)"),
        ({"time.bias": torch.zeros(())}, r"time.bias has shape \(\), expected \(4,\)"),
        ({"time.bias": torch.zeros(4, dtype=torch.int64)}, "time.bias is torch.int64, expected torch.float32"),
        ({"time.bias": torch.zeros(4, dtype=torch.complex64)}, "time.bias is torch.complex64, expected torch.float32"),
        ({"time.bias": torch.zeros(4, device="meta")}, "time.bias lies on meta .*holds its values"),
        ({"time.bias": torch.zeros(4).to_sparse()}, "time.bias .* layout torch.sparse_coo"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(state: Any, message: str) -> None:
    engine = own_engine("plain")
    before = {name: each.clone() for name, each in engine.weights.items()}
    good = {"last.bias": torch.ones(2), "into.bias": torch.ones(4)}
    with pytest.raises(InputError, match=message):
        engine.update_weights({**good, **state} if isinstance(state, dict) else state)
    assert all(torch.equal(each, before[name]) for name, each in engine.weights.items())


def test_an_engine_says_what_it_is() -> None:
    text = repr(tiny_engine("guided"))
    assert text.startswith("Engine(TinyNetwork(noise, labels), ")
    assert ", float32, plans two, three" in text
    assert text.endswith(", cpu)")


def test_one_sample_of_an_engines_batch_is_made_again_alone() -> None:
    engine, labels = tiny_engine("guided"), torch.tensor([0, 1, 2])
    plan = solvers.euler_ancestral(SCHEDULE, 2)
    whole = engine(seed=[5, 6, 7], plan=plan, labels=labels)
    assert whole.shape == (3, *engine.manifest.profile.opt[1:])
    for i in range(3):
        alone = engine(seed=5 + i, shape=(1, *whole.shape[1:]), plan=plan, labels=labels[i : i + 1])
        assert_near(alone, whole[i : i + 1])
    streams = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    noise = torch.cat([torch.randn(1, *whole.shape[1:], generator=each) for each in streams])
    assert torch.equal(engine(noise, generator=streams, plan=plan, labels=labels), whole)
    with pytest.raises(InputError, match="2 seeds or generators came for 3 samples"):
        engine(seed=[1, 2], shape=whole.shape, labels=labels)
