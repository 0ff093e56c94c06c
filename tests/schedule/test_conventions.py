"""Networks that count time or name their output otherwise, clamped tables, and tables that are looked up."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import olss_fast
from olss_fast import NoiseSchedule, solvers
from olss_fast.errors import InputError, ScheduleError
from olss_fast.schedule.noise_schedule import SPACINGS, beta_schedule
from olss_fast.solvers.table import candidates
from olss_fast.testing import ExactMixture

SD = {"beta_start": 0.00085, "beta_end": 0.012}
COSINE = np.cumprod(1.0 - beta_schedule("squaredcos_cap_v2"))  # ends at 2.4e-9
FLOWS = {
    "unit": (NoiseSchedule.flow(3.0, 1), lambda t: t / 1000),
    "reversed": (NoiseSchedule.flow(3.0, reversed_time=True), lambda t: 1000 - t),
    "unit, reversed": (NoiseSchedule.flow(3.0, 1, reversed_time=True), lambda t: 1 - t / 1000),
}


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_flows_with_another_clock_have_the_same_plans(name: str) -> None:
    schedule, clock = FLOWS[name]
    usual = NoiseSchedule.flow(3.0)
    for spacing in SPACINGS:
        plan, expected = (solvers.unipc(each, 6, spacing=spacing) for each in (schedule, usual))
        np.testing.assert_allclose(plan.timesteps, clock(expected.timesteps), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(plan.rows, expected.rows, rtol=1e-9, atol=1e-9)  # times are rounded on the way
    assert np.abs(plan.point_mass_residual()).max() < 1e-9
    np.testing.assert_allclose(schedule.timestep_of_lam(schedule.lam(clock(300.0))), clock(300.0), rtol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_plans_for_another_clock_are_told_apart(name: str) -> None:
    from olss_fast.schedule.fits import mismatch

    schedule, clock = FLOWS[name]
    usual = NoiseSchedule.flow(3.0)
    assert mismatch(solvers.ddim(schedule, 4), schedule) is None
    assert mismatch(solvers.ddim(schedule, 4), usual)
    begun = schedule.begun_at(clock(600.0))
    assert begun.first == pytest.approx(clock(600.0))
    np.testing.assert_allclose(solvers.ddim(begun, 4).rows, solvers.ddim(usual.begun_at(600.0), 4).rows, atol=1e-12)
    with pytest.raises(ScheduleError):
        schedule.begun_at(clock(1100.0))
    with pytest.raises(ScheduleError, match=rf"timestep {clock(1500.0)!r} is outside the schedule's range"):
        schedule.alpha(clock(1500.0))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reversed_time", "name", "expected"),
    [
        (False, "x0", "sample"),
        (False, "velocity", "flow"),
        (False, "x1 - x0", "flow"),
        (False, "x0 - x1", "-flow"),
        (True, "x1", "sample"),
        (True, "velocity", "-flow"),
        (True, "x1 - x0", "-flow"),
        (True, "x0 - x1", "flow"),
        (False, "-velocity", "-flow"),
        (True, "-velocity", "flow"),
        (True, "-x1", "-sample"),
    ],
)
def test_names_of_flows_follow_the_direction_of_time(reversed_time: bool, name: str, expected: str) -> None:
    schedule = NoiseSchedule.flow(prediction_type=name, reversed_time=reversed_time)
    assert schedule.prediction_type == expected
    assert schedule.metadata()["prediction_type"] == expected


def test_names_on_a_table() -> None:
    names = {"eps": "epsilon", "x1": "epsilon", "x0": "sample", "velocity": "v_prediction"}
    assert {name: NoiseSchedule.named("linear", prediction_type=name).prediction_type for name in names} == names
    for name in ("x2", "--epsilon", "-x1 - x0"):
        with pytest.raises(ScheduleError, match=rf"'{name}' is unknown.*velocity.*or - before it"):
            NoiseSchedule.named("linear", prediction_type=name)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_a_minus_is_the_negative_output(kind: str) -> None:
    schedule = NoiseSchedule.named("linear", prediction_type=kind)
    negative = replace(schedule, prediction_type=f"-{kind}")
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan, other = solvers.unipc(schedule, 5), solvers.unipc(negative, 5)
    wanted = olss_fast.sample(lambda x, t: torch.sin(x), plan, x)
    assert torch.allclose(olss_fast.sample(lambda x, t: -torch.sin(x), other, x), wanted, rtol=1e-12)
    assert np.abs(other.point_mass_residual()).max() < 1e-9
    with pytest.raises(InputError, match=f"'-{kind}'"):
        olss_fast.tune(lambda x, t: x, noise=x, schedule=schedule, steps=2, teacher=other, progress=False)


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_clamped_table_begins_where_it_falls() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(np.maximum(COSINE, 4e-5), prediction_type="eps")
    least = int(np.argmax(COSINE < 4e-5))
    assert schedule.first == least < 999
    times = np.arange(least)
    np.testing.assert_allclose(schedule.alpha(times) ** 2, COSINE[:least], rtol=1e-9)
    assert schedule.alpha(least) ** 2 == pytest.approx(4e-5)
    for plan in candidates(schedule, 6):
        assert np.abs(plan.point_mass_residual()).max() < 1e-6  # one over the square root of 4e-5, in float64


def test_equal_entries_and_ones_are_taken() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([1.0, 1.0, 0.9, 0.6, 0.6, 0.2, 0.2])
    assert schedule.first == 5
    assert np.all(np.diff(schedule.lam(np.linspace(0, 5, 101))) < 0)
    np.testing.assert_allclose(schedule.alpha([0, 2, 3, 5]) ** 2, [1, 0.9, 0.6, 0.2], rtol=1e-7)
    none_left = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0, 0.0], prediction_type="v_prediction")
    assert (none_left.first, float(none_left.alpha(2))) == (2.0, 0.0)


# --- whole timesteps -----------------------------------------------------------------------------------------------


class LookedUp(torch.nn.Module):
    """A network that finds its noise levels in a table by the timestep, and is wrong between its entries."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        means = torch.randn((6, 2, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.exact = ExactMixture(schedule, means, 0.2)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert torch.equal(timestep, timestep.round()), f"asked at {timestep[0]}"
        return self.exact(x, timestep)


WHOLE = NoiseSchedule.named("scaled_linear", **SD, whole_times=True)


def test_tune_asks_at_whole_timesteps_only() -> None:
    noise = torch.randn((24, 2, 4, 4), generator=torch.Generator().manual_seed(2))
    effort = olss_fast.Effort(polish_iterations=1, jacobian_samples=4, path_samples=4, node_moves=(2,))
    result = olss_fast.tune(
        LookedUp(WHOLE), noise=noise, schedule=WHOLE, steps=3, teacher_steps=20, effort=effort, progress=False
    )
    plans = [each.plan for each in result.report.candidates]
    assert all(np.array_equal(plan.timesteps, plan.timesteps.round()) for plan in plans)
    spacings = {plan.metadata["spacing"] for plan in plans if "spacing" in plan.metadata}
    assert spacings == set(SPACINGS)  # rounded, not left out


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_of_whole_timesteps_are_the_nearest_and_distinct(spacing: str) -> None:
    exact = replace(WHOLE, whole_times=False).timesteps(6, spacing)
    np.testing.assert_array_equal(WHOLE.timesteps(6, spacing), exact.round())
    for steps in (60, 400, 1000):  # log-SNR puts 9 of 60 below timestep 5
        crowded = WHOLE.timesteps(steps, spacing)
        np.testing.assert_array_equal(crowded, crowded.round())
        assert np.all(np.diff(crowded) <= -1)
        assert crowded.min() >= 0
        assert crowded.max() <= 999


def test_fractions_are_refused_where_whole_timesteps_are_wanted() -> None:
    with pytest.raises(InputError, match=r"900\.5.*whole_times"):
        solvers.ddim(WHOLE, timesteps=[900.5, 100.0])
    teacher = solvers.ddim(replace(WHOLE, whole_times=False), 10, spacing="logsnr")
    how = {"noise": torch.randn(24, 2, 4, 4), "schedule": WHOLE, "steps": 2}
    with pytest.raises(InputError, match=r"the teacher's timesteps hold .*whole_times"):
        olss_fast.tune(LookedUp(WHOLE), teacher=teacher, **how)
    with pytest.raises(InputError, match=r"a rival's timesteps hold .*whole_times"):
        olss_fast.tune(LookedUp(WHOLE), rivals=[teacher], **how)
    with pytest.raises(ScheduleError, match="whole_times"):
        NoiseSchedule.flow(1.0, 1, whole_times=True)


# --- conditions ----------------------------------------------------------------------------------------------------


def shifted(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """Knows a condition and what to do without one."""
    return 0.1 * x if y is None else 0.1 * x + y.to(x)[:, None]


def test_none_is_the_networks_own_lack_of_a_condition() -> None:
    plan, noise, y = solvers.ddim(NoiseSchedule.named("linear"), 5), torch.randn(6, 3), torch.arange(6)
    how = {"conditioning": {"y": y}, "guidance_scale": 3.0}
    expected = olss_fast.sample(shifted, plan, noise, unconditional={"y": 0}, **how)
    assert torch.equal(olss_fast.sample(shifted, plan, noise, unconditional={"y": None}, **how), expected)
    sampler = olss_fast.Sampler(shifted, plan, unconditional={"y": None}, **how)
    torch.testing.assert_close(sampler(noise), expected, rtol=1e-4, atol=1e-4)


def test_an_engine_refuses_a_condition_that_is_none() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return shifted(x, t, y)

    how = {"conditioning": {"y": torch.arange(6)}, "unconditional": {"y": None}, "guidance_scale": 3.0}
    with pytest.raises(InputError, match="differ in 'y'"):
        olss_fast.build(Net().eval(), solvers.ddim(NoiseSchedule.named("linear"), 5), shapes=(6, 3), **how)


def test_the_page_on_networks_runs_as_written() -> None:
    text = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "networks.md", "exec"), {})
    made = re.findall(r"`(NoiseSchedule\.(?:flow|edm|ve)\(.*?\))`", text)
    assert len(made) == 5
    assert all(isinstance(eval(each, {"NoiseSchedule": NoiseSchedule}), NoiseSchedule) for each in made)
