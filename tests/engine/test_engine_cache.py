"""The cache of compiled code, and that a build killed at any time leaves no half file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import GUIDED, Compiled, TinyNetwork, code_of, compiles, engine_file, noise_for, tiny, tiny_engine
from torch import Tensor, nn

import olss_fast
from olss_fast import Profile
from olss_fast.compiling.request import checked_request
from olss_fast.engine import building
from olss_fast.engine import cache as code_cache
from olss_fast.engine.manifest import FORMAT
from olss_fast.engine.weights import LAYOUT
from olss_fast.support import container

PLAN = GUIDED["two"]
SHAPES = Profile((1, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds "plain", "guided" and "nested", and nothing else."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    for kind in ("plain", "guided", "nested"):
        code = code_of(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "compile_code", lambda *_, code=code: code)
            tiny(kind).build(cache=folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, filled: Path) -> Path:
    """A copy of it, to do things to."""
    shutil.copytree(filled, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_second_build_compiles_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(building, "compile_code", compiles)
    engine, noise = tiny("guided").build(cache=folder), noise_for("guided")
    assert torch.equal(engine(noise, labels=1), tiny_engine("guided")(noise, labels=1))
    monkeypatch.setenv("OLSS_FAST_CACHE", str(folder))
    tiny("guided").build(cache=True)
    with pytest.raises(Compiled):
        tiny("guided").build(cache=False)


def test_a_build_of_the_same_structure_traces_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tiny("plain").build(cache=folder)
    monkeypatch.setattr(building, "export", compiles)
    engine, noise = tiny("plain").build(cache=folder), noise_for("plain")
    assert torch.equal(engine(noise), tiny_engine("plain")(noise))
    assert engine.manifest.facts["unused"] == tiny_engine("plain").manifest.facts["unused"]


def test_other_values_of_the_weights_share_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(building, "compile_code", compiles)
    network, noise = tiny("plain").network, noise_for("plain")
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.5)
        network.frequencies.mul_(2)
    engine = tiny("plain").build(network=network, cache=folder)
    expected = olss_fast.sample(network, PLAN, noise)
    bound = 16 * torch.finfo(torch.float32).eps * float(expected.abs().max())  # as in test_engine.py
    torch.testing.assert_close(engine(noise), expected, rtol=0, atol=bound)
    assert not torch.allclose(expected, tiny_engine("plain")(noise), atol=0.1)


class Other(TinyNetwork):
    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, timestep, labels)


def untied(network: TinyNetwork) -> TinyNetwork:
    network.out.weight = nn.Parameter(network.out.weight.detach().clone())
    return network


NESTED = {"text": torch.zeros(2, 3), "strength": torch.ones(2), "table": torch.ones(1, 2, 1, 1)}
OTHERS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "graph": ("plain", lambda: {"network": Other().eval()}),
    "width": ("plain", lambda: {"network": TinyNetwork(width=8).eval()}),
    "untied weights": ("plain", lambda: {"network": untied(tiny("plain").network)}),
    "dtype": ("plain", lambda: {"dtype": torch.float64}),
    "shape": ("plain", lambda: {"shapes": (2, 2, 8, 16)}),
    "profile": ("plain", lambda: {"shapes": SHAPES}),
    "memory order": ("plain", lambda: {"network": tiny("plain").network.to(memory_format=torch.channels_last)}),
    "options": ("plain", lambda: {"options": {"max_autotune": True}}),
    "guidance": ("guided", lambda: {"unconditional": None, "guidance_scale": 1.0, "plan": PLAN}),
    "dtype of an input": ("guided", lambda: {"conditioning": {"labels": torch.tensor([0, 1], dtype=torch.int32)}}),
    "fixed argument": (
        "nested",
        lambda: {name: {"added": NESTED, "gain": 0.25} for name in ("conditioning", "unconditional")},
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_network_is_compiled(monkeypatch: pytest.MonkeyPatch, folder: Path, what: str) -> None:
    monkeypatch.setattr(building, "compile_code", compiles)
    kind, changes = OTHERS[what]
    with pytest.raises(Compiled):
        tiny(kind).build(cache=folder, **changes())


def test_damaged_entries_are_compiled_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for entry in folder.iterdir():
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data)
    monkeypatch.setattr(building, "compile_code", compiles)
    with pytest.raises(Compiled):
        tiny("plain").build(cache=folder)
    code = code_of("plain")
    monkeypatch.setattr(building, "compile_code", lambda *_: code)
    tiny("plain").build(cache=folder)
    monkeypatch.setattr(building, "compile_code", compiles)
    tiny("plain").build(cache=folder)


@pytest.mark.parametrize("changes", [{"difference": None}, {"difference": "0"}, {"seconds_to_compile": True}])
def test_an_entry_of_other_members_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    key, entry = "0" * 64, code_cache.Entry({"network.so": b"code"}, 1.5, 0.0)
    facts = {"key": key, "seconds_to_compile": 1.5, "difference": 0.0}
    code_cache.store(tmp_path / "cache", key, entry)
    assert code_cache.load(tmp_path / "cache", key) == entry
    for each in ({**facts, **changes}, {name: value for name, value in facts.items() if name not in changes}):
        container.write(tmp_path / "cache" / f"{key}.safetensors", code_cache.FORMAT, each, {})
        assert code_cache.load(tmp_path / "cache", key) is None


@pytest.mark.parametrize("missing", ["network.so", LAYOUT])
def test_an_entry_without_a_file_is_compiled_again(monkeypatch: pytest.MonkeyPatch, folder: Path, missing: str) -> None:
    for key in [path.stem for path in folder.iterdir()]:
        entry = code_cache.load(folder, key)
        assert entry is not None
        left = {name: content for name, content in entry.code.items() if name != missing}
        code_cache.store(folder, key, entry._replace(code=left))
    monkeypatch.setattr(building, "compile_code", compiles)
    with pytest.raises(Compiled):
        tiny("plain").build(cache=folder)


class Slightly(TinyNetwork):
    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return 1.005 * super().forward(x, timestep, labels)


def test_cached_code_is_not_further_from_the_network_than_new_code_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even if the build that left it there was as far from its own network as it may be."""
    bound, parts, cache = building.TOLERANCE[torch.float32], tiny("plain"), tmp_path / "cache"
    monkeypatch.setattr(building, "_key", lambda *_: "0" * 64)
    monkeypatch.setattr(building, "compile_code", compiles)
    code_cache.store(cache, "0" * 64, code_cache.Entry(tiny_engine("plain")._code, 1.0, bound))
    parts.build(cache=cache)
    network = Slightly().eval()
    network.load_state_dict(parts.network.state_dict())
    with pytest.raises(Compiled):
        parts.build(network=network, cache=cache)


class Gains(TinyNetwork):
    def forward(self, x: Tensor, timestep: Tensor, gains: list[float]) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep) * gains[-1]


def test_baked_in_values_are_told_apart_beyond_what_a_manifest_holds() -> None:
    network = Gains().eval()

    def key(last: float) -> str:
        given = {"gains": [0.125] * 60 + [last]}
        request = checked_request(network, {"two": PLAN}, SHAPES, given, None, None)
        return building._key(request, building._facts(request, {"two": PLAN}), {})

    assert key(1.0) == key(1.0) != key(2.0)


def test_an_entry_under_anothers_name_is_not_used(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    big = [path for path in folder.iterdir() if path.stat().st_size > 10**5]
    for path, other in zip(big, [*big[1:], big[0]], strict=True):
        path.with_suffix(".new").write_bytes(other.read_bytes())
    for path in big:
        path.with_suffix(".new").replace(path)
    monkeypatch.setattr(building, "compile_code", compiles)
    with pytest.raises(Compiled):
        tiny("plain").build(cache=folder)


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, mode: int
) -> None:
    folder.chmod(mode)
    monkeypatch.setattr(building, "compile_code", compiles)
    with pytest.raises(Compiled):
        tiny("plain").build(cache=folder)


def test_a_new_folder_is_the_users_alone_and_keeps_the_entries_last_used(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    entry = code_cache.Entry({"network.so": b"code"}, 1.5, 1e-7)
    code_cache.store(folder, "0" * 64, entry)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert code_cache.load(folder, "0" * 64) == entry
    assert code_cache.load(folder, "1" * 64) is None
    os.utime(folder / f"{'0' * 64}.safetensors", (1, 1))
    for i in range(1, code_cache.KEPT + 1):
        code_cache.store(folder, f"{i:064}", code_cache.Entry({}, 0.0, 0.0))
    assert len(list(folder.iterdir())) == code_cache.KEPT
    assert code_cache.load(folder, "0" * 64) is None


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = code_of("plain")
    monkeypatch.setattr(building, "compile_code", lambda *_: code)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="compiled code could not be kept for the next build"):
        engine = tiny("plain").build(cache=tmp_path / "file")
    assert torch.equal(engine(noise_for("plain")), tiny_engine("plain")(noise_for("plain")))


# --- killed --------------------------------------------------------------------------------------------------------

# A process that builds and saves, and ends itself without warning before the n-th operation on files, for all n until
# one is not reached; then is ended at random times. The compiler's answer is known beforehand.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import torch
from engines import tiny

from olss_fast.support import container
from olss_fast.engine import building
from olss_fast.engine.manifest import FORMAT

torch.set_num_threads(1)
source, place = sys.argv[1:]
_, blobs = container.read(source, FORMAT)
code = {"network.so": bytes(blobs["code/network.so"].data)}
building.compile_code = lambda *_: code
parts = tiny("plain")


def work(folder):
    parts.build(cache=Path(folder, "cache")).save(Path(folder, "x.olss"))


def counted(function, left):
    def call(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


def until(n, folder):
    left = [n]
    for name in ("open", "fsync", "link", "replace", "mkdir", "utime"):
        setattr(os, name, counted(getattr(os, name), left))
    work(folder)


def in_a_child(run, folder, seconds=None):
    os.mkdir(folder)
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


work(os.path.join(place, "warm"))
n = 1
while not in_a_child(lambda: until(n, f"{place}/{n}"), f"{place}/{n}"):
    n += 1
draws = random.Random(0)
for i in range(8):
    in_a_child(lambda: work(f"{place}/random{i}"), f"{place}/random{i}", draws.uniform(0, 0.4))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_a_build_killed_at_any_time_leaves_no_half_file(tmp_path: Path) -> None:
    place, scratch = tmp_path / "place", tmp_path / "scratch"
    for each in (place, scratch, place / "warm"):
        each.mkdir()
    helpers = Path(__file__).parents[1] / "helpers"
    path = os.pathsep.join(map(str, (helpers, helpers / "engine_files")))
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(engine_file("plain")), str(place)]
    subprocess.run(command, check=True, env=environment)
    noise, expected = noise_for("plain"), tiny_engine("plain")(noise_for("plain"))
    engines = list(place.glob("*/x.olss"))
    assert 0 < len(engines) < len(list(place.iterdir()))  # some were killed before there was one, some after
    for path in engines:
        assert torch.equal(olss_fast.load_engine(path)(noise), expected)
    for path in place.glob("*/cache/*"):
        container.read(path, code_cache.FORMAT)
    # Killed between getting a name and getting the right one, a file is whole all the same.
    for path in place.glob("*/.*.tmp"):
        container.read(path, FORMAT)
    assert {each.name for each in place.glob("*/[!.]*")} == {"x.olss", "cache"}
