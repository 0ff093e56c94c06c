"""The C++ runtime: the same bits as the Python engine, and a name for whatever it refuses."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_bytes import EngineBytes
from engines import CACHE, GUIDED, SCHEDULE, TEXT, engine_file, tiny, tiny_engine
from PIL import Image
from runtime_build import olss_run, refusal, user_program
from shared_builds import once
from torch import Tensor

import olss_fast
from olss_fast import Engine, solvers
from olss_fast.errors import EngineFileError
from olss_fast.report.images import tile, to_uint8

INPUT, MACHINE, NETWORK = "3", "2", "4"  # kinds of olss::Error
ORDERS = {
    "order-1": solvers.ddim(SCHEDULE, 7),
    "order-2": solvers.dpm_solver_pp(SCHEDULE, 6, order=2),
    "order-3": solvers.dpm_solver_pp(SCHEDULE, 5, order=3),
    "long": solvers.ddim(SCHEDULE, 40),
    "ancestral": solvers.ddim(SCHEDULE, 9, eta=0.5),
}


@functools.cache
def orders_file() -> Path:
    """The "guided" engine with other plans."""
    return once("orders.olss", lambda path: tiny("guided").build(plan=ORDERS, cache=CACHE).save(path))


def sampled(path: Path, out: Path, *words: object) -> np.ndarray[Any, Any]:
    """What olss-run writes."""
    done = olss_run(path, "--threads", torch.get_num_threads(), *words, "--out", out)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert re.fullmatch(r"(.* runs, .*\n)?.*: \d+ samples of .*; [\d.]+ s to load, [\d.]+ s to sample\n", done.stdout)
    return np.load(out)


def expected(engine: Engine, shape: tuple[int, ...], seed: int, **arguments: Any) -> Tensor:
    """What Python samples from the same seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator).to(getattr(torch, engine.manifest.dtype))
    return engine(noise, generator=generator, **arguments)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", GUIDED)
@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (3, 2, 16, 24)])
@pytest.mark.slow
def test_guided_plans(tmp_path: Path, plan: str, shape: tuple[int, ...]) -> None:
    """One and two branches, stochastic, in a profile that leaves batch, height and width open."""
    engine, labels = tiny_engine("guided"), torch.arange(shape[0]) % 3
    found = sampled(
        engine_file("guided"), tmp_path / "x.npy", "--plan", plan, "--seed", 5, "--count", shape[0],
        "--shape", ",".join(map(str, shape[1:])), "--set", f"labels={','.join(map(str, labels.tolist()))}",
    )  # fmt: skip
    assert np.array_equal(found, expected(engine, shape, 5, plan=plan, labels=labels).numpy())


@pytest.mark.parametrize("plan", ORDERS)
def test_orders(tmp_path: Path, plan: str) -> None:
    engine = olss_fast.load_engine(orders_file())
    found = sampled(
        orders_file(), tmp_path / "x.npy", "--plan", plan, "--count", 2, "--shape", "2,12,12", "--set=labels=1"
    )
    assert np.array_equal(found, expected(engine, (2, 2, 12, 12), 0, plan=plan, labels=torch.tensor([1, 1])).numpy())


def test_steps_guidance_and_unconditional(tmp_path: Path) -> None:
    engine, base = tiny_engine("guided"), ["--shape", "2,8,8", "--count", 2, "--set", "labels=0"]
    labels = torch.zeros(2, dtype=torch.int64)
    found = sampled(
        engine_file("guided"),
        tmp_path / "x.npy",
        *base,
        "--steps",
        3,
        "--guidance-scale",
        4.5,
        "--unconditional",
        "labels=2,1",
    )
    given = {"steps": 3, "guidance_scale": 4.5, "unconditional": {"labels": torch.tensor([2, 1])}}
    assert np.array_equal(found, expected(engine, (2, 2, 8, 8), 0, labels=labels, **given).numpy())
    default = sampled(engine_file("guided"), tmp_path / "x.npy", *base)
    assert np.array_equal(default, expected(engine, (2, 2, 8, 8), 0, labels=labels).numpy())
    assert not np.array_equal(default, found)


@pytest.mark.parametrize("kind", ["plain", "float64", "float16", "bfloat16"])
@pytest.mark.slow
def test_dtypes_and_memory_orders(tmp_path: Path, kind: str) -> None:
    """The weights of "float64" lie in channels_last order."""
    engine = tiny_engine(kind)
    for plan in engine.plans:
        found = sampled(engine_file(kind), tmp_path / "x.npy", "--plan", plan, "--count", 2, "--seed", 2**40)
        wanted = expected(engine, (2, 2, 8, 8), 2**40, plan=plan)
        exact = wanted.float() if kind == "bfloat16" else wanted  # NumPy has no bfloat16
        assert found.dtype == exact.numpy().dtype
        assert np.array_equal(found, exact.numpy())


def test_nested_arguments_from_files(tmp_path: Path) -> None:
    """Float values of one number, one row and all rows; a table that belongs to no sample; a file of another dtype."""
    text = np.concatenate([TEXT.numpy(), TEXT.numpy()[:1]])
    np.save(tmp_path / "text.npy", text.astype(np.float64))
    np.save(tmp_path / "table.npy", np.array([2.0, -0.5], np.float32).reshape(1, 2, 1, 1))
    without = {"added": {"table": torch.tensor([2.0, -0.5]).reshape(1, 2, 1, 1), "strength": torch.tensor([0.25])}}
    arguments = {
        "text": torch.from_numpy(text).float(),
        "strength": torch.full((3,), 1.5),
        "table": without["added"]["table"],
    }
    engine = tiny_engine("nested")
    found = sampled(
        engine_file("nested"), tmp_path / "x.npy", "--count", 3, "--set", f"added.text=@{tmp_path}/text.npy",
        "--set", "added.strength=1.5", "--set", f"added.table=@{tmp_path}/table.npy",
        "--unconditional", "added.table=2,-0.5", "--unconditional", "added.strength=0.25",
    )  # fmt: skip
    assert np.array_equal(found, expected(engine, (3, 2, 8, 8), 0, added=arguments, unconditional=without).numpy())


def test_many_threads_on_one_engine(tmp_path: Path) -> None:
    """olss-run compares each of the 8 x 6 results with the first, bit by bit."""
    words = ["--plan", "stochastic", "--count", 2, "--shape", "2,8,8", "--set", "labels=1"]
    once = sampled(engine_file("guided"), tmp_path / "x.npy", *words)
    often = sampled(engine_file("guided"), tmp_path / "y.npy", *words, "--at-once", 8, "--repeat", 6)
    assert np.array_equal(once, often)


# --- the header -------------------------------------------------------------------------------------------------------


def use_runtime(*words: object) -> str:
    return subprocess.run([str(user_program()), *map(str, words)], capture_output=True, text=True, check=True).stdout


def test_update_weights(tmp_path: Path) -> None:
    said = use_runtime("weights", engine_file("guided"), tmp_path).splitlines()
    engine = olss_fast.load_engine(engine_file("guided"))
    labels = torch.ones(2, dtype=torch.int64)
    before = expected(engine, (2, 2, 12, 8), 1, labels=labels).numpy()
    engine.update_weights({"last.weight": torch.full((2, 4, 3, 3), 0.25), "last.bias": torch.full((2,), 0.5)})
    after = expected(engine, (2, 2, 12, 8), 1, labels=labels).numpy()
    assert not np.array_equal(before, after)
    assert np.array_equal(np.load(tmp_path / "before.npy"), before)
    assert np.array_equal(np.load(tmp_path / "after.npy"), after)
    assert np.array_equal(np.load(tmp_path / "refused.npy"), after)  # a refused update changes nothing
    for i in range(4):
        during = np.load(tmp_path / f"during{i}.npy")
        assert np.array_equal(during, before) or np.array_equal(during, after)
    faults = [
        "into.bias.* is not a defined tensor",
        r"last.bias.* \(3\), expected \(2\)",
        "last.weight.* is int64",
        "nothing.* none of",
    ]
    for fault, line in zip(faults, said, strict=True):
        assert re.search(f"^{INPUT} weights that do not fit, nothing was changed: .*{fault}", line), line


def test_every_bad_request_is_named() -> None:
    said = {}
    for line in use_runtime("misuse", engine_file("guided")).splitlines():
        name, kind, message = line.split("|")
        said[name] = f"{kind} {message}"
    wanted = {
        "no noise": f"{INPUT} noise is not a defined tensor",
        "rank": f"{INPUT} noise has shape (2, 12, 8); this engine takes 4 axes",
        "batch": f"{INPUT} noise has shape (5, 2, 12, 8), and axis 0 does not fit the engine's profile: expected 1…4",
        "empty batch": f"{INPUT} noise has shape (0, 2, 12, 8), and axis 0",
        "multiple": f"{INPUT} noise has shape (2, 2, 12, 10), and axis 3 does not fit the engine's profile: ",
        "dtype": f"{INPUT} noise is float64 on cpu; this engine takes a dense float32",
        "strides": f"{INPUT} noise has the strides (192, 96, 1, 12), it is not contiguous",
        "NaN": f"{INPUT} the noise holds NaN or infinity",
        "missing": f"{INPUT} conditioning: 'labels' missing; this engine takes the arguments: 'labels'",
        "unknown": f"{INPUT} conditioning: 'more' unknown",
        "labels dtype": f"{INPUT} conditioning 'labels' is int32",
        "labels shape": f"{INPUT} conditioning 'labels' has shape (1); expected (2)",
        "labels range": f"{NETWORK} the network failed (is an index, such as a class, beyond its table?)",
        "labels undefined": f"{INPUT} conditioning 'labels' is not a defined tensor",
        "unconditional unknown": f"{INPUT} unconditional: 'more' unknown",
        "unconditional shape": f"{INPUT} unconditional 'labels' has shape (3); expected (2)",
        "steps": f"{INPUT} the engine has no plan of 99 steps; it has 'two' (2 steps), 'three' (3 steps), 'stochastic'",
        "plan": f"{INPUT} the engine has no plan 'none'",
        "both": f"{INPUT} steps and plan were both given",
        "guidance": f"{INPUT} guidance_scale is inf",
        "overflow": f"{NETWORK} the sample is beyond the range of float32",
    }
    assert {name: each for name, each in said.items() if not each.startswith(wanted[name])} == {}
    assert set(said) == set(wanted)
    assert not any("Exception raised from" in each for each in said.values())  # torch's stack stays away


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 7, 9), (4, 1, 32, 32), (2, 3, 200, 150)])
def test_pictures_equal_those_of_python(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Pixel for pixel, values outside [-1, 1], halves between two grey levels and NaN included."""
    images = np.random.default_rng(0).normal(size=shape) * 0.7
    images.flat[0] = np.nan
    images.flat[1::7] = (np.round(images.flat[1::7] * 127.5) + 0.5 - 0.5) / 127.5
    np.save(tmp_path / "x.npy", images)
    use_runtime("picture", tmp_path / "x.npy", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert np.array_equal(np.asarray(picture), tile(to_uint8(images)))


# --- the command line -------------------------------------------------------------------------------------------------

GOOD = ["--set", "labels=1", "--shape", "2,8,8", "--out", "x.npy"]


def test_bad_command_lines_are_named(tmp_path: Path) -> None:
    file = engine_file("guided")
    np.save(tmp_path / "three.npy", np.arange(3))
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "link.npy").symlink_to("x.npy")
    cases: list[tuple[list[object], str]] = [
        ([], "no engine was given"),
        ([file], "--out is missing"),
        ([file, *GOOD, "--nonsense"], "there is no option '--nonsense'"),
        ([file, *GOOD, "--steps"], "--steps needs a value"),
        ([file, *GOOD, "--seed", 1, "--seed", 2], "--seed was given twice"),
        ([file, *GOOD, "--steps", "2.5"], "expected whole numbers"),
        ([file, *GOOD, "--steps", 0], "at least 1"),
        ([file, *GOOD, "--steps", 77], "no plan of 77 steps; it has 'two' (2 steps)"),
        ([file, *GOOD, "--count", 5], "axis 0 does not fit the engine's profile: expected 1…4"),
        ([file, *GOOD, "--count", 2**62], "axis 0 does not fit"),
        ([file, *GOOD, "--guidance-scale", "nan"], "expected numbers"),
        ([file, *GOOD, file], "two engines came"),
        ([file, "--set", "labels=1", "--out", "x.npy"], "choose with --shape, as in --shape 2,12,8"),
        ([file, "--set", "labels=1", "--shape", "2,8", "--out", "x.npy"], "this engine takes 4 axes"),
        ([file, "--shape", "2,8,8", "--out", "x.npy"], "--set: 'labels' missing"),
        ([file, *GOOD, "--set", "more=1"], "--set: 'more' unknown"),
        ([file, *GOOD, "--set", "labels=2"], "--set was given twice for 'labels'"),
        ([file, *GOOD, "--unconditional", "more=1"], "--unconditional: 'more' unknown"),
        ([file, *GOOD[2:], "--set", "labels"], "expected NAME=VALUE"),
        ([file, *GOOD[2:], "--set", "labels=3.5"], "expected whole numbers"),
        ([file, *GOOD[2:], "--set", "labels=99999999999999999999"], "expected whole numbers"),
        ([file, *GOOD[2:], "--set", "labels=1,2,3"], "has 3 numbers; expected one number, or (1)"),
        ([file, *GOOD[2:], "--set", "labels=@three.npy"], "has the shape (3)"),
        ([file, *GOOD[2:], "--set", "labels=@missing.npy"], "no such file"),
        ([file, *GOOD[2:], "--set", "labels=77"], "is an index, such as a class, beyond its table?"),
        ([file, *GOOD[:-1], "folder.npy"], "it is a folder"),
        ([file, *GOOD[:-1], "link.npy"], "it is a symbolic link"),
        ([file, *GOOD[:-1], "nowhere/x.npy"], "there is no folder 'nowhere/'"),
        ([file, *GOOD[:-1], "x.jpg"], "ends in .npy or .png"),
        ([file, *GOOD[:-1], "x.png"], "this engine's samples are 1…4 × 2 × "),
        ([engine_file("plain"), "--count", 2, "--out", "x.npy", "--guidance-scale", 2], "without guidance: expected 1"),
        ([engine_file("plain"), "--count", 2, "--out", "x.npy", "--set", "a=1"], "takes the arguments: none"),
        (["missing.olss", *GOOD], "no such file"),
    ]  # fmt: skip
    said = [refusal(*words, cwd=tmp_path) for words, _ in cases]
    assert [(words, line) for (words, text), line in zip(cases, said, strict=True) if text not in line] == []
    assert sorted(os.listdir(tmp_path)) == ["folder.npy", "link.npy", "three.npy"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array([0.0, 1.5]), "do not fit int64"),
        (np.array([0.0, 1e19]), "do not fit int64"),
        (np.array([0.0, np.nan]), "do not fit int64"),
    ],
)
def test_values_are_cast_exactly_or_not_at_all(tmp_path: Path, values: np.ndarray[Any, Any], text: str) -> None:
    np.save(tmp_path / "x.npy", values)
    words = ["--count", 2, "--shape", "2,8,8", "--out", tmp_path / "y.npy", "--set", f"labels=@{tmp_path}/x.npy"]
    assert text in refusal(engine_file("guided"), *words)
    np.save(tmp_path / "x.npy", np.array([0, 1], np.uint8))
    assert olss_run(engine_file("guided"), *words).returncode == 0


def test_float_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    arguments = ["--set", "added.text=1", "--set", "added.table=1", "--set", "added.strength=1e60"]
    assert "do not fit float32" in refusal(engine_file("nested"), *arguments, "--out", tmp_path / "x.npy")


def test_describe_help_and_version() -> None:
    said = olss_run(engine_file("guided"), "--describe").stdout
    for text in (
        "machine code",
        "scale 1.5",
        "'labels' int64 (batch)",
        "'split': 5 network evaluations, two branches",
        "fits here       yes",
    ):
        assert text in said
    assert f"'stochastic': 4 network evaluations, {GUIDED['stochastic'].noises} fresh noises" in said
    assert "--unconditional" in olss_run("--help").stdout
    assert olss_run("--version").stdout == f"olss-run {olss_fast.__version__}\n"


def test_the_page_names_every_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--[a-z-]+", olss_run("--help").stdout)) - {"--help", "--version"}
    assert options <= set(re.findall(r"--[a-z-]+", page))


# --- the machine, and what is left behind -----------------------------------------------------------------------------


def altered(path: Path, out: Path, **changes: Any) -> Path:
    """The engine with another manifest, its checksum right again."""
    engine = EngineBytes.of(path)
    assert isinstance(engine.manifest, dict)
    for member, change in changes.items():
        engine.manifest[member].update(change)
    out.write_bytes(engine.bound().file())
    return out


def test_other_machines_are_refused(tmp_path: Path) -> None:
    instructions = tiny_engine("plain").manifest.facts["machine"]["instructions"]
    cases: dict[str, dict[str, Any]] = {
        "torch is '2.13' and the engine was built for '2.1'": {"built_with": {"torch": "2.1.3"}},
        "the system is 'Linux' and the engine was built for 'Darwin'": {"machine": {"system": "Darwin"}},
        "and the engine was built for 'pdp11'": {"machine": {"architecture": "pdp11"}},
        "lacks the instructions 'avx9000'": {"machine": {"instructions": [*instructions, "avx9000"]}},
        "the device of this runtime is 'cpu'": {"machine": {"device": "cuda", "capability": [9, 0]}},
    }
    for text, change in cases.items():
        path = altered(engine_file("plain"), tmp_path / "x.olss", **change)
        said = refusal(path, "--count", 2, "--out", tmp_path / "x.npy")
        assert "does not fit this machine" in said
        assert text.replace("2.13", ".".join(torch.__version__.split(".")[:2])) in said
        described = olss_run(path, "--describe")
        assert (described.returncode, "fits here       no" in described.stdout) == (0, True)
    assert not (tmp_path / "x.npy").exists()


def test_code_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    engine = EngineBytes.of(engine_file("plain"))
    sound = engine.tensors
    faults = {
        "the engine's code cannot be loaded": {**sound, "code/network.so": ("U8", [4], b"\x7fELF")},
        "weight 'into.weight' is none and its code was compiled for 'F32' of shape (4, 2, 3, 3)": {
            name: each for name, each in sound.items() if "into.weight" not in name
        },
        "weight 'into.bias' is 'F64'": {**sound, "weights/into.bias": ("F64", [4], bytes(32))},
        "weight 'into.bias' is 'F32' of shape (1)": {**sound, "weights/into.bias": ("F32", [1], bytes(4))},
    }
    for text, tensors in faults.items():
        engine.tensors = tensors
        (tmp_path / "x.olss").write_bytes(engine.hashed().file())
        assert text in refusal(tmp_path / "x.olss", "--count", 2, "--out", tmp_path / "x.npy")
        with pytest.raises(EngineFileError):
            olss_fast.load_engine(tmp_path / "x.olss")


def test_the_digest_that_sha256sum_prints(tmp_path: Path) -> None:
    path = engine_file("plain")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest.upper()):
        sampled(path, tmp_path / "x.npy", "--count", 2, "--sha256", right)
    words = ["--count", 2, "--out", tmp_path / "x.npy", "--sha256"]
    assert f"its sha256 is {digest}; expected 0000" in refusal(path, *words, "0" * 64)
    for wrong in ("", digest[:-1], "x" * 64):
        assert "expected 64 hexadecimal digits, as sha256sum prints them" in refusal(path, *words, wrong)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code lies in a private folder only while it is mapped."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    sampled(engine_file("plain"), tmp_path / "x.npy", "--count", 2)
    assert list((tmp_path / "temporary").iterdir()) == []
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert "TMPDIR chooses another place" in refusal(engine_file("plain"), "--count", 2, "--out", tmp_path / "x.npy")
