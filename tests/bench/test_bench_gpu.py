"""bench/gpu.py's dry run: every section has its rows, its checks find what is wrong, and what is missing is named."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"
MODULES = SCRIPT.with_suffix("")
DTYPES = {"float16", "bfloat16", "float32"}
PEERS = ("DPM++ 2M", "DDIM", "UniPC")


class Result(NamedTuple):
    code: int
    output: str
    data: dict[str, Any]
    markdown: str

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in self.data["rows"] if all(row[key] == value for key, value in wanted.items())]


def run(folder: Path, *options: str, before: str = "") -> Result:
    """The dry run in a process of its own, after the statements `before`."""
    arguments = [str(SCRIPT), "--dry", "--out", str(folder), *options]
    code = f"import runpy, sys\n{before}\nsys.argv = {arguments}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert (folder / "gpu-dry.json").exists(), done.stdout + done.stderr
    data = json.loads((folder / "gpu-dry.json").read_text())
    return Result(done.returncode, done.stdout + done.stderr, data, (folder / "gpu-dry.md").read_text())


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_gpu_{name}", MODULES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look for the annotations
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    pytest.importorskip("diffusers")
    return run(tmp_path_factory.mktemp("gpu"))


@pytest.mark.slow
def test_everything_runs_and_nothing_fails(whole: Result) -> None:
    assert whole.code == 0, whole.output
    assert whole.data["failed"] == 0
    assert [each["section"] for each in whole.data["sections"]] == [
        *("correctness", "counts", "engines", "step kernel", "loops", "compiled")
    ]
    assert [each["name"] for each in whole.data["skipped"]] == ["compute-sanitizer"]


def test_rows_are_complete(whole: Result) -> None:
    columns = {
        "section",
        "name",
        "case",
        "value",
        "unit",
        "ratio",
        "reference",
        "n",
        "p99",
        "dtype",
        "shape",
        "k",
        "nfe",
    }
    for row in whole.data["rows"]:
        assert columns | {"nfe", "device", "versions", "commit", "batch", "ok"} <= set(row)
        assert isinstance(row["value"], (int, float))
        assert row["unit"]
        assert row["commit"]
        assert "torch" in row["versions"]
        if row["ratio"] is not None:
            assert row["reference"]
            assert row["p99"] >= row["value"] > 0
            assert row["n"] >= 1


def test_correctness_covers_kernels_and_executors(whole: Result) -> None:
    steps = whole.rows(section="correctness", name="step")
    assert {row["dtype"] for row in steps} == DTYPES | {"float64"}
    assert {1, 3, 40, 130} <= {row["k"] for row in whole.rows(section="correctness", name="lincomb")}
    for backend in ("reference", "fused", "graph", "unrolled"):
        rows = whole.rows(name=f"executor {backend}", unit="of eager's error")
        assert {row["dtype"] for row in rows} == DTYPES
        assert len({row["case"] for row in rows}) == 5
        assert all(0 < row["value"] <= 2 for row in rows)
    for backend in ("graph", "unrolled"):
        assert [row["value"] for row in whole.rows(name=f"executor {backend}", unit="differing elements")] == [0] * 15


@pytest.mark.parametrize(("factor", "hidden"), [(1.1, {("DPM++ 2M 20", "bfloat16")}), (1.2, set())])
def test_a_wrong_kernel_is_found(factor: float, hidden: set[tuple[str, str]], tmp_path: Path) -> None:
    """Ten per cent too much in every sum: no check of a kernel or of an executor that uses it may pass, but for the
    case whose own rounding is nearly as large; twenty per cent: none at all."""
    wrong = """
import importlib, sys
sys.modules["olss_fast._C"] = None  # whose step would not be wrong
for name in ("step", "lincomb"):
    module = importlib.import_module(f"olss_fast.kernels.{name}")
    module.weighted_sum = lambda columns, weights, right=module.weighted_sum: FACTOR * right(columns, weights)
""".replace("FACTOR", str(factor))
    result = run(tmp_path, "--only", "correctness", before=wrong)
    assert result.code == 1
    for row in result.rows(unit="of eager's error"):
        if (row["case"], row["dtype"]) not in hidden:
            assert row["ok"] is (row["name"] == "executor reference"), row
    failed = {row["name"].split()[0] for row in result.data["rows"] if row["ok"] is False}
    assert {"step", "lincomb", "64-bit"} <= failed
    assert not any(row["ok"] for row in result.rows(name="step") if row["shape"] != [1, 0])
    assert result.data["figures"][0]["measured"] == result.data["failed"]
    assert result.data["figures"][0]["least reached"] is False
    assert "**no**" in result.markdown


def test_kernels_are_timed_at_every_size(whole: Result) -> None:
    for case in ("4×64×64", "4×128×128", "16×128×128", "1 GiB"):
        rows = [row for row in whole.rows(section="step kernel", name="step", case=case) if row["ok"]]
        assert {(row["dtype"], row["k"]) for row in rows} == {
            (dtype, k) for dtype in DTYPES for k in (3, 4, 10, 20, 40)
        }
    rivals = {row["reference"] for row in whole.rows(section="step kernel", name="step", case="1 GiB", k=40)}
    assert rivals == {None, "torch.compile", "axpy chain", "torch.mv"}
    assert whole.rows(section="step kernel", name="copy", unit="GB/s")


@pytest.mark.parametrize("case", ["SD 1.5 UNet 512²", "SDXL UNet 1024²", "DiT-XL/2 512²"])
def test_loops_have_every_contender(whole: Result, case: str) -> None:
    rows = whole.rows(section="loops", case=case, nfe=20, batch=1)
    others = {f"graphed network + {peer}" for peer in PEERS} | {"diffusers eager"}
    assert {row["name"] for row in rows} == {"graphed network alone", "Sampler graph", "Sampler fused", *others}
    against = {row["reference"] for row in rows if row["name"] == "Sampler graph"}
    assert against == {"graphed network alone", *others}
    assert [row["ok"] for row in whole.rows(section="loops", case=case, name="Sampler graph against fused", batch=1)]
    assert whole.rows(section="loops", case=case, name="host time a step", batch=1)


def test_counts(whole: Result) -> None:
    """With operators for kernels: one of ours a step, and more of every scheduler."""
    ours = whole.rows(section="counts", name="Sampler graph", unit="kernels a step")
    assert [row["value"] for row in ours] == [1.0]
    for peer in PEERS:
        (row,) = whole.rows(section="counts", name=f"graphed network + {peer}", unit="kernels a step")
        assert row["value"] > 5


def test_the_table_holds_every_figure(whole: Result) -> None:
    figures = module("figures")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in whole.markdown.splitlines() if line[:2] == "| "}
    assert len(whole.data["figures"]) == len(figures.FIGURES)
    for line, figure in zip(whole.data["figures"], figures.FIGURES, strict=True):
        assert line["measured"] != "not measured", figure.what
        assert line["rows"] > 0
        assert figure.what in lines
    for title in ("correctness", "counts", "engines", "step kernel", "loops", "compiled", "Device"):
        assert f"## {title}" in whole.markdown
    assert "these figures mean nothing" in whole.markdown


def test_nothing_of_the_machine_is_in_the_files(whole: Result) -> None:
    assert str(Path(sys.prefix)) not in whole.markdown
    assert str(SCRIPT.parents[1]) not in json.dumps(whole.data)


def test_without_diffusers_and_extension(tmp_path: Path) -> None:
    missing = "sys.modules['diffusers'] = sys.modules['olss_fast._C'] = None"
    result = run(tmp_path, "--only", "loops", "--only", "counts", before=missing)
    assert result.code == 0, result.output
    assert {row["case"] for row in result.rows(section="loops")} == {"DiT-XL/2 512²"}
    assert result.rows(name="Sampler graph", reference="graphed network alone", nfe=20)
    skipped = " ".join(each["name"] for each in result.data["skipped"])
    for name in ("SD 1.5 UNet 512²", "SDXL UNet 1024²", "Flux", "diffusers eager", *PEERS):
        assert name in skipped
    by_name = {each["what"]: each for each in result.data["figures"]}
    assert by_name["times as fast as diffusers eager"]["measured"] == "not measured"
    assert by_name["kernels a step"]["least reached"] is True


def test_when_time_is_up_what_is_left_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "--minutes", "0.2")
    assert result.code == 0, result.output
    assert len(result.data["sections"]) == 6
    assert any("time" in each["reason"] for each in result.data["skipped"])
    assert {each["section"] for each in result.data["skipped"]} >= {"loops", "compiled"}


def test_a_wheel_is_unpacked_and_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "olss_probe-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("olss_probe_package/__init__.py", "value = 7")
    monkeypatch.setattr(sys, "path", list(sys.path))
    module("source_tree").unpack_wheels(tmp_path)
    assert importlib.import_module("olss_probe_package").value == 7


def test_figures_take_the_worst_row() -> None:
    figures = module("figures")
    facts = {"section": "loops", "name": "Sampler graph", "case": figures.SD15, "batch": 1, "k": None, "ok": None}
    rows = [
        {**facts, "dtype": dtype, "nfe": 20, "value": 1.0, "reference": figures.LIMIT, "ratio": ratio}
        for dtype, ratio in (("float16", 0.999), ("bfloat16", 0.8))
    ]
    found = {each["what"]: each for each in figures.judge(rows)}
    line = found["loop / (NFE × network), SD 1.5, batch 1, NFE 20"]
    assert line["measured"] == pytest.approx(1.25)
    assert line["least reached"] is line["aim reached"] is False
    assert "bfloat16" in line["worst row"]
    assert figures.judge(rows[:1])[1]["aim reached"] is True
    assert found["kernels a step"]["measured"] == "not measured"
