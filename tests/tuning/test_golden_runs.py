"""Whole runs, pinned: a change that is not meant to move a plan, a sample or a report leaves all of these as they are.

tests/golden/runs.{json,safetensors} hold what `tune`, `compare`, `sample`, `Sampler`, `PlanScheduler` and
`tune_pipeline` gave. After a change that is meant to move something, write them anew and look at what moved:

    PYTHONPATH=tests/helpers:tests/helpers/pipelines python tests/tuning/test_golden_runs.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import plan_runs
import pytest
import torch
from made_plans import split
from safetensors.numpy import load_file, save_file
from small_tunings import LEAST, SOME

import olss_fast
from olss_fast import NoiseSchedule, Plan, Report, solvers
from olss_fast.testing import NULL_CLASS, ExactMixture
from olss_fast.tuning.compare import compare
from olss_fast.tuning.tuning import Effort

GOLDEN = Path(__file__).parents[1] / "golden" / "runs.json"
ARRAYS = GOLDEN.with_suffix(".safetensors")
SHAPE, SAMPLES = (2, 4, 4), 40
EPSILON = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
VELOCITY = NoiseSchedule.named("squaredcos_cap_v2", prediction_type="v_prediction")
Facts = dict[str, Any]
Arrays = dict[str, np.ndarray]


def mixture(schedule: NoiseSchedule, seed: int = 1) -> ExactMixture:
    means = torch.randn((12, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.5
    return ExactMixture(schedule, means, 0.2, classes=6)


def noise(samples: int = SAMPLES) -> torch.Tensor:
    return torch.randn((samples, *SHAPE), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def guided(samples: int = SAMPLES) -> dict[str, Any]:
    labels = torch.arange(samples) % 6
    return {"conditioning": {"y": labels}, "unconditional": {"y": NULL_CLASS}, "guidance_scale": 2.0}


def pinned_report(report: Report) -> tuple[Facts, Arrays]:
    facts, arrays = {"candidates": [], "held_out": report.held_out}, {}
    for i, each in enumerate(report.candidates):
        path, accepted = "" if each.path is None else f"path {[*each.path]}", "accepted" if each.accepted else ""
        facts["candidates"].append(
            f"{each.name} | {each.kind} | {each.spacing} | {each.nfe} NFE, {each.samples} samples {path} {accepted}"
        )
        arrays |= {f"{i:03d}/errors": np.array(each.errors), **pinned_plan(f"{i:03d}", each.plan)}
    return facts, arrays


def pinned_plan(name: str, plan: Plan) -> Arrays:
    return {f"{name}/rows": np.array(plan.rows), f"{name}/timesteps": np.array(plan.timesteps)}


@cache
def tuned() -> olss_fast.TuneResult:
    return olss_fast.tune(
        mixture(EPSILON),
        noise=noise(),
        schedule=EPSILON,
        steps=[3, 4],
        teacher_steps=30,
        effort=SOME,
        progress=False,
        **guided(),
    )


def tune_guided() -> tuple[Facts, Arrays]:
    return pinned_report(tuned().report)


def tune_with_a_teacher_that_looks_back() -> tuple[Facts, Arrays]:
    """v-prediction, a multistep teacher, a rival of its own, several chunks, least squares."""
    result = olss_fast.tune(
        mixture(VELOCITY),
        noise=noise(),
        schedule=VELOCITY,
        steps=4,
        teacher=solvers.dpm_solver_pp(VELOCITY, 24, order=2, spacing="logsnr"),
        rivals=[solvers.ddim(VELOCITY, timesteps=[990.0, 700.0, 300.0, 40.0])],
        effort=Effort(polish_iterations=1, jacobian_samples=6, path_samples=6, node_moves=(), robust=False),
        batch_size=9,
        progress=False,
    )
    return pinned_report(result.report)


def compare_plans_of_ours() -> tuple[Facts, Arrays]:
    plans = [tuned().plans[3], tuned().plans[4], solvers.euler(EPSILON, 6, spacing="leading")]
    how = {"noise": noise(12), "schedule": EPSILON, "teacher_steps": 20, "progress": False, **guided(12)}
    return pinned_report(compare(mixture(EPSILON), steps=[3], plans=plans, **how))


def tune_a_pipeline() -> tuple[Facts, Arrays]:
    """One that hands its own noise to the network, so that the first row is not the student's."""
    import tiny_pipelines

    calls = [{"generator": torch.Generator().manual_seed(i)} for i in range(8)]
    result = olss_fast.tune_pipeline(
        tiny_pipelines.unet2d(), calls, steps=[2], teacher_steps=8, effort=LEAST, progress=False
    )
    return pinned_report(result.report)


def samples() -> tuple[Facts, Arrays]:
    """Of the torch loop in float64, of the fused executor in float32, of a scheduler in a pipeline's slot."""
    unipc = solvers.unipc(EPSILON, 5, order=3)
    two = [mixture(EPSILON), mixture(EPSILON, seed=5)]
    start, generator = noise(5), torch.Generator().manual_seed
    plans = {
        "heun": solvers.heun(EPSILON, 5),
        "ancestral": solvers.euler_ancestral(EPSILON, 4),
        "apart": split(unipc, 2.0),
        "tuned": tuned().plans[3],
    }
    arrays = {}
    for name, plan in plans.items():
        seen: list[torch.Tensor] = []
        watch = {"callback": lambda i, t, x, seen=seen: seen.append(x)}
        arrays[f"sample/{name}"] = olss_fast.sample(
            two[0], plan, start, generator=generator(3), **guided(5), **watch
        ).numpy()
        arrays[f"sample/{name}/states"] = torch.stack(seen).numpy()
        sampler = olss_fast.Sampler(two[0], plan, **guided(5))
        arrays[f"Sampler/{name}"] = sampler(start.float(), generator=generator(3)).numpy()
        if plan.branches == 1:
            drawn = {"generator": generator(3)} if plan.noises else {}
            scheduler = olss_fast.PlanScheduler(plan)
            scheduler.set_timesteps(plan.nfe)
            begun = plan_runs.NOISE * scheduler.init_noise_sigma
            arrays[f"PlanScheduler/{name}"] = plan_runs.run(scheduler, begun, **drawn).numpy()
    cheap = unipc.replace(models=[0, 1, 1, 0, 1])
    arrays["sample/models"] = olss_fast.sample(two, cheap, start, **guided(5)).numpy()
    arrays["sample/batches"] = olss_fast.sample(two[0], unipc, start, batch_size=2, **guided(5)).numpy()
    later = {"init_image": start * 0.3, "strength": 0.6}
    arrays["sample/later"] = olss_fast.sample(two[0], solvers.ddim(EPSILON, 5), start, **later, **guided(5)).numpy()
    return {}, arrays


RUNS: dict[str, Callable[[], tuple[Facts, Arrays]]] = {
    run.__name__: run
    for run in (tune_guided, tune_with_a_teacher_that_looks_back, compare_plans_of_ours, tune_a_pipeline, samples)
}
LOOSE = {  # relative to the largest element of the array
    # A network in float32, and coefficients fitted to its answers: a last digit grows by the condition of the fit.
    "tune_a_pipeline": 1e-3,
    # Float64 all through; fits are least squares with condition numbers to 1e5 and differences of 1e-3.
    "tune_guided": 1e-7,
    "tune_with_a_teacher_that_looks_back": 1e-7,
    "compare_plans_of_ours": 1e-7,
    "samples": 1e-7,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_runs_are_those_of_the_golden_files(name: str) -> None:
    facts, arrays = RUNS[name]()
    assert json.loads(GOLDEN.read_text())[name] == json.loads(json.dumps(facts))
    pinned = {key: value for key, value in load_file(ARRAYS).items() if key.startswith(name + "/")}
    assert {f"{name}/{key}" for key in arrays} == set(pinned)
    for key, array in arrays.items():
        expected = pinned[f"{name}/{key}"]
        room = LOOSE[name] if expected.dtype == np.float64 else max(LOOSE[name], 1e-5)  # float32 has 6e-8, 5 steps
        finite = np.abs(expected[np.isfinite(expected)])
        np.testing.assert_allclose(array, expected, rtol=room, atol=room * finite.max(initial=1.0), err_msg=key)


def write() -> None:
    """Writes the golden files from the code as it is now."""
    every = {name: run() for name, run in RUNS.items()}
    GOLDEN.write_text(json.dumps({name: facts for name, (facts, _) in every.items()}, indent=1) + "\n")
    save_file({f"{name}/{key}": array for name, (_, arrays) in every.items() for key, array in arrays.items()}, ARRAYS)


if __name__ == "__main__":
    write()
