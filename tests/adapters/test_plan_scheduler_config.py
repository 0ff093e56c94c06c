"""PlanScheduler's configuration, wrong use, and which pipelines take it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from plan_runs import BETAS, DDIM, DPM, NOISE, SCHEDULE, SHAPE, learned, network, sampled
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule, PlanScheduler, capture, solvers
from olss_fast.errors import InputError, NetworkError
from olss_fast.schedule.fits import mismatch

pytestmark = pytest.mark.filterwarnings("ignore")


# --- configuration ----------------------------------------------------------------------------------------------------


def test_round_trip_through_json(tmp_path: Any) -> None:
    scheduler = PlanScheduler([capture(DPM, 5), solvers.heun(SCHEDULE, 7), learned(solvers.ddim(SCHEDULE, 3))])
    scheduler.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["scheduler_config.json"]
    for again in (PlanScheduler.from_pretrained(tmp_path), PlanScheduler.from_config(scheduler.config)):
        assert again.plans == scheduler.plans
        assert [plan.metadata for plan in again.plans] == [plan.metadata for plan in scheduler.plans]
        assert torch.equal(sampled(again, 5), sampled(scheduler, 5))


def test_configs_of_other_schedulers() -> None:
    """Theirs become ours and ours theirs, as diffusers' own do; the plans come along."""
    scheduler = PlanScheduler(capture(DPM, 5), DPM)
    euler = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    direct = diffusers.EulerDiscreteScheduler.from_config(DPM.config)
    names = set(euler.config) - {"_plans", "_scheduler", "_class_name", "_diffusers_version"}
    assert {name: euler.config[name] for name in names} == {name: direct.config[name] for name in names}
    assert PlanScheduler.from_config(euler.config).plans == scheduler.plans
    made = PlanScheduler.from_config(DPM.config, plans=solvers.ddim(SCHEDULE, 5))
    made.set_timesteps(5)
    made.set_begin_index(2)  # it knows the schedule
    assert diffusers.DPMSolverMultistepScheduler in scheduler.compatibles
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.prediction_type == "epsilon"
    torch.testing.assert_close(scheduler.alphas_cumprod, DPM.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert not hasattr(PlanScheduler(solvers.ddim(SCHEDULE, 5)), "alphas_cumprod")


def test_one_name_for_every_error() -> None:
    with pytest.raises(olss_fast.OlssError, match="no plan was given"):
        PlanScheduler([])


def test_printed_it_is_a_summary() -> None:
    scheduler = PlanScheduler([capture(DPM, steps) for steps in range(1, 21)])
    assert len(repr(scheduler)) < 1000
    assert "20 plans" in repr(scheduler)
    assert "1 steps: DPMSolverMultistepScheduler (linspace) of 1 evaluations" in repr(scheduler)
    assert "VP scaled_linear" in repr(scheduler)
    assert len(scheduler.config["_plans"]) == 20
    assert "not known" in repr(PlanScheduler(learned(solvers.ddim(SCHEDULE, 3), title="x" * 999)))


@pytest.mark.parametrize("name", ["scales", "noised"])
@pytest.mark.parametrize("value", ["text", [1.0], [[1.0]], [float("nan")] * 2, [-1.0, 1.0]])
def test_states_that_cannot_be(name: str, value: Any) -> None:
    plan = capture(diffusers.EulerDiscreteScheduler(**BETAS), 2)
    facts = json.loads(plan.metadata["scheduler"]) | {name: value}
    scheduler = PlanScheduler(plan.replace(metadata={**plan.metadata, "scheduler": json.dumps(facts)}))
    with pytest.raises(InputError, match=name):
        scheduler.set_timesteps(2)


def hostile_configs() -> dict[str, Any]:
    good = json.loads(json.dumps(dict(PlanScheduler(capture(DPM, 2)).config)))
    plan = good["_plans"][0]
    return {
        "no plans": {key: value for key, value in good.items() if key != "_plans"},
        "no list": {**good, "_plans": "text"},
        "empty": {**good, "_plans": []},
        "a number": {**good, "_plans": [3]},
        "no rows": {**good, "_plans": [{key: value for key, value in plan.items() if key != "rows"}]},
        "ragged rows": {**good, "_plans": [{**plan, "rows": [[1.0], [2.0, 3.0]]}]},
        "NaN": {**good, "_plans": [{**plan, "alphas": [float("nan")] * 3}]},
        "acausal": {**good, "_plans": [{**plan, "rows": [[1.0, 1.0, 1.0]] * 3}]},
        "metadata": {**good, "_plans": [{**plan, "metadata": 5}]},
        "captured from nothing": {**good, "_plans": [{**plan, "metadata": {"method": "captured", "scheduler": "{"}}]},
        "steps": {**good, "_plans": [{**plan, "metadata": {"num_inference_steps": "many"}}]},
        "begin": {**good, "_plans": [{**plan, "metadata": {"num_inference_steps": "9", "begin": "3"}}]},
        "branches": {**good, "_plans": [{**plan, "branches": 2, "rows": [[1.0] + [0.0] * 4] * 3}]},
    }


@pytest.mark.parametrize("name", hostile_configs())
def test_hostile_configs(name: str, tmp_path: Any) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(hostile_configs()[name]))
    with pytest.raises(InputError, match=r"\w"):
        PlanScheduler.from_pretrained(tmp_path)


# --- wrong use --------------------------------------------------------------------------------------------------------


def started(steps: int = 4, taken: int = 1) -> tuple[PlanScheduler, Tensor]:
    scheduler = PlanScheduler(solvers.ddim(SCHEDULE, steps))
    scheduler.set_timesteps(steps)
    sample = NOISE.float()
    for timestep in scheduler.timesteps[:taken]:
        sample = scheduler.step(network(sample, timestep), timestep, sample).prev_sample
    return scheduler, sample


def test_steps_that_are_not_planned() -> None:
    with pytest.raises(InputError, match="before set_timesteps"):
        PlanScheduler(solvers.ddim(SCHEDULE, 4)).step(NOISE, 999, NOISE)
    scheduler, sample = started(4, 4)
    with pytest.raises(InputError, match="all 4 of this run"):
        scheduler.step(sample, 0, sample)


@pytest.mark.parametrize("bad", [NOISE[:1], NOISE[:, :1], NOISE.to("meta"), NOISE.long(), None, NOISE[0]])
def test_unusable_outputs_and_samples(bad: Any) -> None:
    scheduler, sample = started()
    bad = bad.float() if isinstance(bad, Tensor) and bad.is_floating_point() else bad
    with pytest.raises(NetworkError, match="model_output of step 1"):
        scheduler.step(bad, scheduler.timesteps[1], sample)
    with pytest.raises(InputError, match="sample of step 1"):
        scheduler.step(sample, scheduler.timesteps[1], bad)
    scheduler.step(sample, scheduler.timesteps[1], sample)  # and nothing was spoilt


@pytest.mark.parametrize("bad", [NOISE.long(), "noise", torch.empty(0)])
def test_unusable_first_samples(bad: Any) -> None:
    scheduler, _ = started(4, 0)
    with pytest.raises(InputError, match="floating-point tensor"):
        scheduler.step(NOISE, scheduler.timesteps[0], bad)


def test_plans_that_no_slot_can_run() -> None:
    plan = solvers.ddim(SCHEDULE, 2)
    split = {"rows": [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], "branches": 2}
    for changes, words in [(split, "branches"), ({"models": [0, 1]}, "networks"), ({"rows": plan.rows * 0}, "row 0")]:
        with pytest.raises(InputError, match=words):
            PlanScheduler(plan.replace(**changes))
    with pytest.raises(InputError, match=r"Plan\.load"):
        PlanScheduler("plan.safetensors")


@pytest.mark.parametrize(
    "asked", [{"eta": 0.5}, {"s_churn": 1.0}, {"use_clipped_model_output": True}, {"s_noise": 2.0}]
)
def test_step_arguments_that_ask_for_something_else(asked: dict[str, Any]) -> None:
    scheduler, sample = started()
    neutral = {"eta": 0.0, "s_churn": 0.0, "s_tmax": float("inf"), "s_noise": 1.0, "use_clipped_model_output": None}
    sample = scheduler.step(sample, scheduler.timesteps[1], sample, **neutral).prev_sample
    with pytest.raises(InputError, match=next(iter(asked))):
        scheduler.step(sample, scheduler.timesteps[2], sample, **asked)


def test_a_network_that_returns_nan() -> None:
    scheduler, sample = started(5, 2)
    bad = torch.where(torch.arange(sample.numel()).view(SHAPE) == 7, torch.nan, sample)
    for k in range(2, 4):
        sample = scheduler.step(bad if k == 3 else sample, scheduler.timesteps[k], sample).prev_sample
    with pytest.raises(NetworkError, match=r"step 3 \(timestep \d+\)"):
        scheduler.require_finite()
    with pytest.raises(NetworkError, match="step 3"):
        scheduler.step(sample, scheduler.timesteps[4], sample)
    scheduler, _ = started(1, 0)
    with pytest.raises(NetworkError, match="began with"):
        scheduler.step(NOISE, scheduler.timesteps[0], NOISE * torch.nan)
    PlanScheduler(solvers.ddim(SCHEDULE, 1)).require_finite()


# --- which pipelines --------------------------------------------------------------------------------------------------


def test_slots() -> None:
    plan = solvers.ddim(SCHEDULE, 4)
    for pipe in (SimpleNamespace(scheduler=None), SimpleNamespace(), SimpleNamespace(scheduler=3)):
        with pytest.raises(InputError, match="SimpleNamespace"):
            PlanScheduler.from_pipe(pipe, plan)
    schedulers = diffusers.schedulers
    for name in ("ScoreSdeVeScheduler", "RePaintScheduler", "KarrasVeScheduler", "CogVideoXDPMScheduler"):
        with pytest.raises(InputError, match=name):
            PlanScheduler.from_pipe(SimpleNamespace(scheduler=getattr(schedulers, name)()), plan)
    pipe = SimpleNamespace(scheduler=PlanScheduler.from_pipe(SimpleNamespace(scheduler=DDIM), plan))
    again = PlanScheduler.from_pipe(pipe, capture(DPM, 3))  # in place of one of ours: the network is the same
    assert again.config["_scheduler"] == pipe.scheduler.config["_scheduler"]


def test_plans_for_another_network() -> None:
    def slot(**changes: Any) -> SimpleNamespace:
        return SimpleNamespace(scheduler=diffusers.DDIMScheduler(**{**BETAS, "clip_sample": False, **changes}))

    for plan in (solvers.ddim(SCHEDULE, 4), capture(DPM, 4), learned(solvers.ddim(SCHEDULE, 4))):
        PlanScheduler.from_pipe(slot(), plan)
        wrong = slot(prediction_type="v_prediction")
        with pytest.raises(InputError, match=r"'epsilon', the network has 'v_prediction'.*check=False"):
            PlanScheduler.from_pipe(wrong, plan)
        assert PlanScheduler.from_pipe(wrong, plan, check=False).plans == (plan,)
    with pytest.raises(InputError, match=r"schedule 'VP.*1000 timesteps"):
        PlanScheduler.from_pipe(slot(num_train_timesteps=500), solvers.ddim(SCHEDULE, 4))


def test_mismatch_looks_at_levels_not_at_labels() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert mismatch(solvers.ddim(NoiseSchedule.from_betas(betas), 3), SCHEDULE) is None
    assert mismatch(solvers.ddim(NoiseSchedule.flow(3.0), 3), NoiseSchedule.flow(1.0)) is None
    assert "schedule" in str(
        mismatch(solvers.ddim(NoiseSchedule.flow(num_train_timesteps=900), 3), NoiseSchedule.flow())
    )
    assert "sigma_data" in str(mismatch(solvers.ddim(NoiseSchedule.edm(), 3), NoiseSchedule.edm(sigma_data=1.0)))
