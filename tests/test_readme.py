"""The README's Python runs as it is written, and its two commands are there for `.ci/run` to find."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import olss_fast
from olss_fast.noise_schedule import NoiseSchedule

README = Path(__file__).parent.parent / "README.md"
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SCHEDULE = NoiseSchedule.from_betas(BETAS)


def network(x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
    """The noise that the posterior mean expects in x for data N(y / 10, 1/4), and something that is not linear."""
    alpha, sigma, _ = (torch.from_numpy(v).float().view(-1, 1, 1, 1) for v in SCHEDULE.levels(timestep.numpy()))
    mean = (y / 10.0).view(-1, 1, 1, 1)
    return sigma * (x - alpha * mean) / (alpha**2 / 4.0 + sigma**2) + 0.05 * torch.sin(3.0 * x)


def test_calls_work_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "tune(" in block)
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 10
    names = {"network": network, "betas": BETAS, "noise": noise, "y": y, "null": torch.full_like(y, 10)}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert names["plan"].nfe == 5
    (code,) = (block for block in blocks if "Sampler(" in block)
    exec(code, {**names, "other": y.flip(0)})
    assert names["images"].shape == noise.shape
    assert set(names["result"].plans) == {5, 8}


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        output: Tensor = torch.tanh(self.mix(x) + (y / 10.0 + timestep / 1000.0).view(-1, 1, 1, 1))
        return output


def test_engine_calls_work_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "build(" in block)
    y = torch.arange(16) % 10
    names = {"olss_fast": olss_fast, "network": Network().eval(), "y": y, "null": torch.full_like(y, 10)}
    names["result"] = SimpleNamespace(plans={n: olss_fast.solvers.unipc(SCHEDULE, n) for n in (5, 8)})
    names["noise"] = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLSS_FAST_CACHE", str(tmp_path / "cache"))
    exec(code, names)
    assert names["images"].shape == (8, 1, 32, 32)


@pytest.mark.filterwarnings("ignore")  # diffusers' deprecations
def test_the_pipeline_calls_work_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import tiny_pipelines

    from olss_fast.tuning import Effort

    least = Effort(
        polish_iterations=1, jacobian_samples=1, jacobian_evaluations=1, path_samples=1, node_moves=(), split_up_to=0
    )
    quick = functools.partial(olss_fast.tune_pipeline, teacher_steps=8, effort=least, progress=False)
    monkeypatch.setattr(olss_fast, "tune_pipeline", quick)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "tune_pipeline(" in block)
    names = {"olss_fast": olss_fast, "pipe": tiny_pipelines.stable_diffusion(), "prompts": list("abcd")}
    exec(code, names)
    assert set(names["result"].plans) == {5, 8}
    assert names["image"].size == (16, 16)


def test_the_two_commands() -> None:
    lines = [line.split() for line in README.read_text().splitlines() if line.strip().startswith("pip install -c")]
    assert [" ".join(line) for line in lines] == [
        "pip install -c constraints.txt -e . && olss-fast demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
