"""The README's Python runs as it is written, and its two commands are there for `.ci/run` to find."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tunings import LEAST
from torch import Tensor

import olss_fast
from olss_fast import solvers

README = Path(__file__).parents[2] / "README.md"


class Network(torch.nn.Module):
    """Stands for the embedded model where it would be tuned or compiled, which takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        output: Tensor = torch.tanh(self.mix(x) + (class_labels / 10.0 + timestep / 1000.0).view(-1, 1, 1, 1))
        return output


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning takes the least: teachers of 8 steps, three analytic solvers, hardly any effort, and a quick network."""
    every, tune, tune_pipeline = solvers.candidates, olss_fast.tune, olss_fast.tune_pipeline
    least: dict[str, Any] = {"teacher_steps": 8, "effort": LEAST, "progress": False}
    monkeypatch.setattr(solvers, "candidates", lambda schedule, nfe: every(schedule, nfe)[:3])

    def tuned(network: Any, **settings: Any) -> Any:
        assert callable(network)
        return tune(Network(), **{**settings, **least})

    def tuned_pipeline(pipe: Any, calls: Any, steps: Any) -> Any:
        stand_in = Network()
        with monkeypatch.context() as during:
            during.setattr(pipe.unet, "forward", lambda *given, return_dict, **more: (stand_in(*given, **more),))
            return tune_pipeline(pipe, calls, steps, **least)

    monkeypatch.setattr(olss_fast, "tune", tuned)
    monkeypatch.setattr(olss_fast, "tune_pipeline", tuned_pipeline)


@pytest.mark.filterwarnings("ignore")  # diffusers' deprecations
@pytest.mark.slow
def test_the_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """One after the other, as somebody who reads on would run them, on the embedded model; with fewer samples."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    tuning, pipeline, sampler, loading, engine, exporting = blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(tuning.replace("128", "8"), names)
    assert names["plan"].nfe == 5
    assert names["images"].shape == (2, 1, 32, 32)
    assert {path.name for path in tmp_path.rglob("*.*")} == {"five.safetensors", "report.json", "error.png", "path.png"}
    exec(sampler, names)
    assert names["images"].shape == (8, 1, 32, 32)
    kept = dict(names)
    exec(pipeline.replace("range(64)", "range(6)"), names)
    assert set(names["result"].plans) == {5, 8}
    assert names["image"].size == (32, 32)
    exec(loading, names)
    assert (names["model"].classes, names["model"].null_class) == (20, 20)
    monkeypatch.setenv("OLSS_FAST_CACHE", str(tmp_path / "cache"))
    kept |= {"network": Network().eval(), "noise": kept["noise"].cpu(), "y": kept["y"].cpu()}
    exec(engine, kept)
    assert kept["images"].shape == (8, 1, 32, 32)
    pytest.importorskip("onnxscript")
    exec(exporting, kept)
    assert (tmp_path / "loop.onnx").stat().st_size > 0


def test_the_two_commands() -> None:
    lines = [line.split() for line in README.read_text().splitlines() if line.strip().startswith("pip install -c")]
    assert [" ".join(line) for line in lines] == [
        "pip install -c constraints.txt -e . && olss-fast demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


def test_the_page_of_the_runtime_asks_for_plans_that_its_file_has() -> None:
    text = (README.parent / "docs" / "runtime.md").read_text()
    (built,) = re.findall(r"--plan olss-demo/plans/(\S+)\.safetensors", text)
    assert set(re.findall(r"olss-run \S+ --plan (\S+)", text)) == {built}
