"""Files of the original OLSS scheduler become plans that do the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from olss_fast.adapters.original_olss import load_original
from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule

STEPS = 5
TIMES = torch.tensor([898, 700, 431, 160, 3], dtype=torch.int32)


def weights(steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """wx and we of a run that could be: random, lower triangular, float64."""
    generator = torch.Generator().manual_seed(0)
    wx = torch.randn(steps, generator=generator, dtype=torch.float64)
    we = torch.randn((steps, steps), generator=generator, dtype=torch.float64).tril()
    return wx, we


def saved(path: Path, times: object = TIMES, wx: object = None, we: object = None) -> Path:
    given = weights()
    torch.save((times, given[0] if wx is None else wx, given[1] if we is None else we), path)
    return path


def network(x: Tensor, timestep: float) -> Tensor:
    """Anything that depends on both, and is not linear."""
    return torch.tanh(1.7 * x + 0.001 * timestep) - 0.3 * x.roll(1)


class Recurrence:
    """The original's scheduler from its description: it keeps x_0 and all outputs, and adds them up term by term."""

    def __init__(self, wx: Tensor, we: Tensor) -> None:
        self.wx, self.we, self.outputs, self.start = wx, we, list[Tensor](), None

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        self.start = sample if self.start is None else self.start
        self.outputs.append(output)
        k = len(self.outputs) - 1
        total = self.wx[k] * self.start
        for j, earlier in enumerate(self.outputs):
            total = total + self.we[k, j] * earlier
        return total


def run_plan(plan: Plan, noise: Tensor, ask: Callable[[Tensor, float], Tensor]) -> list[Tensor]:
    """All network inputs and the sample: rows · basis."""
    basis = [noise]
    states = []
    for row, time in zip(plan.rows, [*plan.timesteps, None], strict=True):
        states.append(sum((float(w) * b for w, b in zip(row, basis, strict=False)), torch.zeros_like(noise)))
        if time is not None:
            basis.append(ask(states[-1], float(time)))
    return states


def test_a_plan_gives_the_samples_of_the_recurrence(tmp_path: Path) -> None:
    wx, we = weights()
    plan = load_original(saved(tmp_path / "olss.bin"))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    original = Recurrence(wx, we)
    expected = [noise]
    for time in TIMES.tolist():
        expected.append(original.step(network(expected[-1], time), expected[-1]))
    found = run_plan(plan, noise, network)
    # Both sum at most six float64 terms in another order; values are of size 10.
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-12)


def test_rows_times_and_levels(tmp_path: Path) -> None:
    wx, we = weights()
    plan = load_original(saved(tmp_path / "olss.bin"))
    assert plan.timesteps.tolist() == TIMES.tolist()
    np.testing.assert_array_equal(plan.rows[0], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(plan.rows[1:, 0], wx.numpy())
    np.testing.assert_array_equal(plan.rows[1:, 1:], we.numpy())
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's
    alphas = np.append(np.sqrt(np.cumprod(1 - betas))[TIMES.numpy()], 1)
    np.testing.assert_allclose(plan.alphas, alphas, rtol=1e-12)
    np.testing.assert_allclose(plan.sigmas, np.sqrt(1 - alphas**2), rtol=1e-9)  # 1 - alpha^2 cancels near the data
    assert (plan.metadata["method"], plan.metadata["variant"]) == ("olss", "original")
    assert plan.metadata["prediction_type"] == "epsilon"


def test_what_the_original_writes_after_use(tmp_path: Path) -> None:
    """Its weights are parameters of a module, and so they are in the file; other versions write lists of times."""
    wx, we = weights()
    parameters = saved(tmp_path / "a.bin", wx=torch.nn.Parameter(wx), we=torch.nn.Parameter(we))
    times = saved(tmp_path / "b.bin", times=TIMES.tolist())
    assert load_original(parameters) == load_original(times) == load_original(saved(tmp_path / "c.bin"))
    single = saved(tmp_path / "d.bin", wx=wx.float(), we=we.float())
    np.testing.assert_array_equal(load_original(single).rows[1:, 0], wx.float().numpy())


def test_another_schedule(tmp_path: Path) -> None:
    schedule = NoiseSchedule.named("linear", prediction_type="v_prediction")
    plan = load_original(saved(tmp_path / "olss.bin"), schedule=schedule)
    np.testing.assert_allclose(plan.alphas[:-1], schedule.alpha(TIMES.numpy()), rtol=1e-15)
    assert plan.metadata["prediction_type"] == "v_prediction"


def test_the_schedule_of_a_diffusers_scheduler(tmp_path: Path) -> None:
    """Or of its config. What is neither is refused before the file is read."""
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"}
    path = saved(tmp_path / "olss.bin")
    for schedule in (config, SimpleNamespace(config=config)):
        plan = load_original(path, schedule=schedule)
        expected = NoiseSchedule.named("linear", prediction_type="v_prediction")
        np.testing.assert_allclose(plan.alphas[:-1], expected.alpha(TIMES.numpy()), rtol=1e-12)
        assert plan.metadata["prediction_type"] == "v_prediction"
    for unusable in ("x", 3, {}, object(), False):
        with pytest.raises(InputError, match=r"schedule is .*; expected a NoiseSchedule or a diffusers scheduler"):
            load_original(tmp_path / "no such file", schedule=unusable)


@pytest.mark.parametrize(("first", "noted"), [(898, True), (998, True), (999, False)])
def test_a_late_start_is_noted(tmp_path: Path, first: int, noted: bool) -> None:
    plan = load_original(saved(tmp_path / "olss.bin", times=torch.tensor([first, 700, 431, 160, 3])))
    assert plan.metadata.get("note", "").startswith(f"begins at timestep {first} with pure noise") is noted
    assert ("the noise end is 999" in plan.describe(width=200)) is noted


def test_one_step(tmp_path: Path) -> None:
    wx, we = weights(1)
    plan = load_original(saved(tmp_path / "olss.bin", times=torch.tensor([999]), wx=wx, we=we))
    np.testing.assert_array_equal(plan.rows, [[1, 0], [wx.item(), we.item()]])


def test_the_plan_is_saved_and_read_again(tmp_path: Path) -> None:
    plan = load_original(saved(tmp_path / "olss.bin"))
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again == plan
    assert again.metadata == plan.metadata
