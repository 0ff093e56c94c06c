"""Networks with tensors that they never registered as parameters or buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import GUIDED, TinyNetwork, compiles, noise_for
from torch import Tensor

from olss_fast import build, load_engine, sample
from olss_fast.engine import building
from olss_fast.engine.compiled import compile_code
from olss_fast.errors import BuildError

PLAN = GUIDED["two"]


class WithConstants(TinyNetwork):
    """With tensors that are no parameters and no buffers: an attribute, one in a list, a literal in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.shifts = torch.tensor([0.5, 2.0])[None, :, None, None], [torch.tensor([0.1, -0.1])]

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        seen = super().forward(x * self.factor, timestep)
        return seen * torch.tensor([1.5, 3.0])[:, None, None] + self.shifts[0][:, None, None]


def test_tensors_that_are_no_buffers_come_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    network, noise = WithConstants().eval(), noise_for("plain")
    build(network, PLAN, shapes=noise.shape, cache=tmp_path / "cache", progress=False).save(tmp_path / "engine")
    expected = sample(network, PLAN, noise)
    torch.testing.assert_close(load_engine(tmp_path / "engine")(noise), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(building, "compile_code", compiles)
    again = WithConstants().eval()
    engine = build(again, PLAN, shapes=noise.shape, cache=tmp_path / "cache", progress=False)
    torch.testing.assert_close(engine(noise), sample(again, PLAN, noise), rtol=1e-4, atol=1e-4)


def test_a_tensor_that_no_file_can_hold_is_named() -> None:
    """Which `.to(device)` of a module leaves where it is, unlike a buffer; and numbers that are not real."""
    program = torch.export.export(WithConstants().eval(), (noise_for("plain"), torch.ones(2)), strict=False)
    program.constants["factor"] = torch.empty(2, device="meta")
    with pytest.raises(BuildError, match=r"tensor factor lies on meta .* runs on cpu: .*self.register_buffer\("):
        compile_code(program, {})
    program.constants["factor"] = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(BuildError, match=r"tensor factor is torch\.complex64; expected one of torch\.float64, "):
        compile_code(program, {})
