"""Students of another network's samples: of a full network, and of one with another prediction type or schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from small_tunings import LEAST, LITTLE, SCHEDULE, mixture, problem

import olss_fast
from olss_fast import NoiseSchedule, Plan, demo, solvers
from olss_fast.errors import InputError, NetworkError, StoreError
from olss_fast.network import Denoiser
from olss_fast.testing import ExactMixture, rounded
from olss_fast.tuning.clock import Clock
from olss_fast.tuning.compare import compare
from olss_fast.tuning.judge import own_run, recorded
from olss_fast.tuning.recording import Split
from olss_fast.tuning.scoring import score
from olss_fast.tuning.study import Study
from olss_fast.tuning.teacher import Source

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
NOISIEST = float(np.exp(-SCHEDULE.lam(SCHEDULE.first)))
OTHERS = {
    "v_prediction": NoiseSchedule.named("scaled_linear", prediction_type="v_prediction", **BETAS),  # type: ignore[arg-type]
    "exploding": NoiseSchedule.ve(0.01, NOISIEST),
    "flow": NoiseSchedule.flow(),  # begins earlier, without any signal
}
EASY: dict[str, Any] = problem(24) | {"steps": 4, "effort": LITTLE}


def weak(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The network with an error of its own, as rounding makes one."""
    return 0.9 * mixture()(x, timestep, y)


@cache
def usual() -> olss_fast.Report:
    """Of students of the network's own samples."""
    return olss_fast.tune(mixture(), **EASY).report


@pytest.mark.parametrize("kind", OTHERS)
def test_the_same_network_said_otherwise_teaches_the_same(kind: str) -> None:
    """Within what the start of the samples, and with it the teacher's plan, makes of it."""
    other = OTHERS[kind]
    report = olss_fast.tune(mixture(), **EASY, teacher_network=mixture(other), teacher_schedule=other).report
    assert report.best(4).mean < 1.1 * usual().best(4).mean
    assert report.teacher.metadata["prediction_type"] == other.prediction_type
    assert report.own_run is not None
    share = 0.6 if kind == "flow" else 0.2  # of a flow without signal at the start samples are a little different
    assert report.own_run[1] < share * report.best(4, "analytic").mean


def test_a_weak_network_comes_nearer_to_the_full_one_than_its_own_long_run() -> None:
    result = olss_fast.tune(weak, **EASY, teacher_network=mixture())
    report = result.report
    assert report.own_run is not None
    steps, own = report.own_run
    assert steps == report.teacher.nfe
    assert report.best(4).mean < 0.7 * own
    exact = olss_fast.sample(mixture(), report.teacher, EASY["noise"], **asked())
    made = olss_fast.sample(weak, report.teacher, EASY["noise"], **asked())
    held_out = (made - exact)[-report.held_out :].flatten(1).square().mean(1).sqrt().mean()
    assert own == pytest.approx(float(held_out), rel=1e-3)
    assert report.evaluations["own run"] == steps * report.held_out
    again = olss_fast.Report.from_dict(report.to_dict())
    assert again.own_run == report.own_run
    words = " ".join(again.table(width=120).split())
    assert f"{steps}-step teacher of another network (its own error" in words
    assert f"The network's own {steps} steps have {own:.4f}" in words
    assert usual().own_run is None


def asked() -> dict[str, Any]:
    return {key: EASY[key] for key in ("conditioning", "unconditional", "guidance_scale", "progress")}


def test_plans_are_compared_with_another_networks_samples() -> None:
    teacher = solvers.dpm_solver_pp(SCHEDULE, 12, order=3, spacing="logsnr")
    given: dict[str, Any] = problem(6) | {"steps": [3], "plans": [teacher], "teacher": teacher}
    own, others = compare(weak, **given), compare(weak, **given, teacher_network=mixture())
    (at_home,), (away,) = ([each for each in report.at(12) if each.plan == teacher] for report in (own, others))
    assert own.own_run is None
    assert at_home.mean < 1e-6
    assert others.own_run == (12, pytest.approx(away.mean))
    assert away.mean > 0.01


def small(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return mixture()(x, timestep, y)[:, :1]


FEWER = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.006)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shapes": ({"teacher_network": small}, NetworkError, r"samples of shape \(2, 4, 4\) with the arguments \['y'\]: "),
    "arguments": ({"teacher_network": lambda x, t: x}, NetworkError, "teacher_network cannot be asked.*TypeError"),
    "no network": ({"teacher_schedule": FEWER}, InputError, "teacher_schedule is that of teacher_network"),
    "no schedule": ({"teacher_network": mixture(), "teacher_schedule": 3}, InputError, "schedule is a int 3"),
    "start": ({"teacher_network": mixture(FEWER), "teacher_schedule": FEWER}, InputError, "begins with less noise"),
    "plan": (
        {"teacher_network": mixture(OTHERS["exploding"]), "teacher_schedule": OTHERS["exploding"]}
        | {"teacher": solvers.heun(OTHERS["exploding"], 21)},
        InputError,
        "the noise must fall from each evaluation",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_teachers_that_do_not_fit_are_named(case: str) -> None:
    given, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        olss_fast.tune(mixture(), **EASY, **given)


def test_a_teacher_of_the_wrong_schedule_is_named() -> None:
    with pytest.raises(NetworkError, match=r"teacher_network: .*prediction type seems wrong: 'v_prediction', not 'eps"):
        olss_fast.tune(mixture(), **EASY, teacher_network=mixture(OTHERS["v_prediction"]))


def test_a_store_belongs_to_both_networks(tmp_path: Path) -> None:
    given = EASY | {"effort": LEAST, "store": tmp_path, "teacher_steps": 20}
    first = olss_fast.tune(weak, **given, teacher_network=mixture())
    again = olss_fast.tune(weak, **given, teacher_network=mixture())
    assert again.plans == first.plans
    assert sum(again.report.evaluations.values()) == 2 * 3 * 4  # the probe: two networks, three questions, four samples
    for other in ({"teacher_network": ExactMixture(SCHEDULE, mixture().means * 1.01, 0.2, classes=6)}, {}):
        with pytest.raises(StoreError, match=r"differs in .*teacher_network"):
            olss_fast.tune(weak, **given, **other)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_learns_from_another_one(tmp_path: Path) -> None:
    """Its samples are those that the other pipeline makes: the report's own run says how far it goes by itself."""
    pipe, full, larger = (tiny_pipelines.unet2d() for _ in range(3))
    pipe.unet = few = rounded(pipe.unet, 3)
    weights = {name: each.clone() for name, each in few.state_dict().items()}

    @contextmanager
    def exact() -> Iterator[None]:
        few.load_state_dict(full.unet.state_dict())
        yield
        few.load_state_dict(weights)

    calls = [{"batch_size": 4}, {"batch_size": 4}]
    given = {"steps": [2], "teacher_steps": 8, "effort": LEAST, "progress": False}
    report = olss_fast.tune_pipeline(pipe, calls, teacher_pipe=full, store=tmp_path, **given).report
    assert report.own_run is not None
    assert report.own_run[0] == 8
    assert report.own_run[1] > 1e-3
    assert report.teacher.nfe == 8
    alone = olss_fast.tune_pipeline(pipe, calls, teacher_pipe=pipe, teacher_context=exact, **given).report
    assert alone.own_run == report.own_run
    assert alone.best(2).errors == report.best(2).errors
    with pytest.raises(StoreError, match="teacher_network"):
        olss_fast.tune_pipeline(pipe, calls, teacher_pipe=tiny_pipelines.unet2d(seed=1), store=tmp_path, **given)
    larger.unet.register_to_config(sample_size=16)
    with pytest.raises(InputError, match=r"teacher_pipe begins otherwise than pipe: latents \(8, .*16\) and \(8, "):
        olss_fast.tune_pipeline(pipe, calls, teacher_pipe=larger, **given)


def test_rounded_weights() -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ConvTranspose2d(4, 5, 3), torch.nn.GroupNorm(1, 5))
    copy = rounded(layers, 4)
    for layer, other, channel in zip(layers[:2], copy[:2], (0, 1), strict=True):
        weights, few = (each.weight.detach().transpose(0, channel).flatten(1) for each in (layer, other))
        step = weights.abs().amax(1, keepdim=True) / 7
        assert (weights - few).abs().le(step * 0.5001).all()
        assert torch.equal((few / step).round() * step, few)
        assert not torch.equal(weights, few)
        assert torch.equal(layer.bias, other.bias)
    with pytest.raises(InputError, match="bits is 1; expected 2 to 16"):
        rounded(layers, 1)


@pytest.mark.parametrize("bits", [6, 4])
@torch.no_grad()
def test_eight_steps_of_a_rounded_network_are_nearer_to_the_full_one_than_its_long_run(bits: int) -> None:
    """Rows alone, on evenly spaced times; paths and polish add to it."""
    model, samples = demo.load("cpu"), 20
    labels = torch.arange(samples)
    denoiser = Denoiser(
        rounded(model.network, bits),  # type: ignore[type-var]
        torch.randn((samples, *model.shape), generator=torch.Generator().manual_seed(0)),
        conditioning={"class_labels": labels},
        unconditional={"class_labels": torch.full_like(labels, model.null_class)},
        guidance_scale=model.guidance_scale,
    )
    plan = solvers.dpm_solver_pp(model.schedule, 16, order=2, spacing="logsnr")
    source = Source(denoiser.also(model.network), model.schedule, plan)
    clock, split = Clock(denoiser, visible=False), Split.of(samples, validation=2, held_out=6)
    with recorded(source, model.schedule, clock=clock, split=split) as task:
        study = Study(task, LEAST, clock, 0, 8)
        ours: Plan = study.plan(study.on_policy(study.uniform, ridges=[1e-5]))
        (errors,) = score([ours], task, split.held_out)
        own = own_run(task, source, clock)["own_run"]
    assert own["steps"] == 16
    assert float(errors.mean()) < {6: 0.9, 4: 0.5}[bits] * own["error"]
