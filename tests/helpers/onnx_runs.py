"""Small networks for ONNX models, and runs of such models in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from olss_fast import NoiseSchedule, solvers

onnxruntime = pytest.importorskip("onnxruntime")

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 3, 4, 4)
PLAN = solvers.dpm_solver_pp(SCHEDULE, 4, order=2)
# Of the largest value. Two independent float32 networks: rounding of 2^-24 a product, some steps of amplification.
TOLERANCE = 1e-5
# float16: sums are float32 in both, what is rounded to 2^-11 is x and each output; a few of these add up.
HALF_TOLERANCE = 8 * 2.0**-11
Y = torch.tensor([3, 7])


class Net(torch.nn.Module):
    """Not linear in x, feels the time and what it is given; mixes pixels, so that a wrong layout shows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=dtype)
        self.y = torch.nn.Embedding(11, 3, dtype=dtype)  # also the name of an argument

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        table: Tensor | None = None,
        residuals: tuple[Tensor, ...] = (),
        gain: float = 1.0,
    ) -> Tensor:
        shift = (timestep / 1000).to(x.dtype)[:, None]
        shift = shift if y is None else shift + self.y(y)
        if added is not None:
            shift = shift + added["text"].mean(1)[:, :3] + added["size"][:, None]
        if table is not None:
            shift = shift + table.sum()
        for each in residuals:
            x = x + each
        return gain * torch.tanh(self.mix(x) + shift[..., None, None])


class Wide(torch.nn.Module):
    """Weights of more than `SMALL` bytes, of sizes that are no multiples of each other."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 301, dtype=dtype), torch.nn.Linear(301, 5, dtype=dtype)

    def forward(self, x: Tensor, timestep: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.second(torch.tanh(self.first(x + shift))) + (timestep / 1000).to(x.dtype)[:, None]


def noise_of(batch: int, shape: tuple[int, ...] = SHAPE[1:], seed: int = 0) -> Tensor:
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(seed))


def session_of(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about inputs that may be left out
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, **inputs: Any) -> NDArray[Any]:
    (sample,) = session_of(path).run(["sample"], {name: np.asarray(each) for name, each in inputs.items()})
    return sample


def assert_close(found: NDArray[Any], expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == tuple(expected.shape)
    largest = float(expected.abs().max())
    assert np.abs(found.astype(np.float64) - expected.double().numpy()).max() <= tolerance * largest


def table_of(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    (found,) = (each for each in model.graph.initializer if each.name == name)
    return onnx.numpy_helper.to_array(found)
