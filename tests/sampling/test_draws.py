"""Noise from seeds and generators, starts from an image, and callbacks: what a call of `sample` and `Sampler` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_graphs import use_fake_graphs
from made_plans import split
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule, Plan, Sampler, solvers
from olss_fast.errors import InputError, ScheduleError
from olss_fast.solvers.rederive import schedule_of, truncate

SCHEDULE = NoiseSchedule.named("linear")
PLAN = solvers.unipc(SCHEDULE, 6, order=2)
STOCHASTIC = solvers.euler_ancestral(SCHEDULE, 4)
SHAPE = (3, 1, 4, 4)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 rows of a fused run against float64 ones


def network(x: Tensor, timestep: Tensor) -> Tensor:
    return 0.3 * torch.tanh(x) + timestep.view(-1, 1, 1, 1) / 5000.0


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_sample(plan: Plan, *args: Any, **how: Any) -> Tensor:
    return olss_fast.sample(network, plan, *args, **how)


def by_sampler(plan: Plan, *args: Any, **how: Any) -> Tensor:
    return Sampler(network, plan)(*args, **how)


both = pytest.mark.parametrize("run", [by_sample, by_sampler])
Run = Callable[..., Tensor]


@both
@pytest.mark.parametrize("plan", [PLAN, STOCHASTIC])
def test_one_sample_of_a_batch_is_made_again_alone(run: Run, plan: Plan) -> None:
    whole = run(plan, seed=[5, 6, 7], shape=SHAPE)
    for i in range(3):
        alone = run(plan, seed=[5 + i], shape=(1, *SHAPE[1:]))
        torch.testing.assert_close(alone, whole[i : i + 1], **CLOSE)
        torch.testing.assert_close(run(plan, seed=5 + i, shape=(1, *SHAPE[1:])), alone, rtol=0, atol=0)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1


@both
def test_a_seed_is_a_generator_of_the_cpu(run: Run) -> None:
    generator = seeded(9)
    noise = torch.randn(SHAPE, generator=generator)
    expected = run(STOCHASTIC, noise, generator=generator)
    torch.testing.assert_close(run(STOCHASTIC, seed=9, shape=SHAPE), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(STOCHASTIC, generator=seeded(9), shape=SHAPE), expected, rtol=0, atol=0)
    several = run(STOCHASTIC, noise, generator=[seeded(i) for i in range(3)])
    torch.testing.assert_close(run(STOCHASTIC, noise, seed=range(3)), several, rtol=0, atol=0)


def test_a_sampler_knows_its_shape() -> None:
    sampler = Sampler(network, PLAN, shape=SHAPE)
    assert torch.equal(sampler(seed=1), sampler(seed=1, shape=SHAPE))
    assert sampler(seed=[1, 2]).shape == (2, *SHAPE[1:])


NOISE = torch.randn(SHAPE, generator=seeded(0))
IMAGE = torch.linspace(-1, 1, NOISE.numel()).reshape(SHAPE)


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither noise nor shape came; expected noise, a tensor"),
        ({"noise": NOISE, "shape": SHAPE}, "both noise and shape came"),
        ({"seed": 1, "generator": seeded(1), "shape": SHAPE}, "seed and generator were both given"),
        ({"seed": [1, 2], "shape": SHAPE}, "2 seeds or generators came for 3 samples; expected one for each"),
        ({"seed": -1, "shape": SHAPE}, "seed is -1; expected a whole number"),
        ({"seed": 1.5, "shape": SHAPE}, r"seed is 1\.5; expected a whole number"),
        ({"seed": True, "shape": SHAPE}, "seed is True; expected a whole number"),
        ({"generator": [None], "shape": SHAPE}, "generator is a NoneType; expected a torch.Generator"),
        ({"seed": 1, "shape": (3, 0)}, r"shape is \(3, 0\); expected the noise's"),
        ({"seed": 1, "shape": "3"}, "shape is '3'; expected the noise's"),
        ({"noise": NOISE, "strength": 0.5}, "strength came without init_image; expected both"),
        ({"noise": NOISE, "init_image": 3, "strength": 0.5}, "init_image is int; expected clean samples"),
        ({"noise": NOISE, "seed": [1]}, "1 seeds or generators came for 3 samples; expected one for each"),
        ({"noise": NOISE, "init_image": IMAGE[:1], "strength": 0.5}, r"init_image is .* of shape \(1, 1, 4, 4\)"),
        ({"noise": NOISE, "init_image": IMAGE}, "init_image came without strength; expected both"),
        ({"noise": NOISE, "init_image": IMAGE, "strength": 1.2}, "strength is 1.2"),
        ({"noise": NOISE, "init_image": IMAGE * torch.nan, "strength": 0.5}, "init_image holds NaN"),
        ({"noise": NOISE, "callback": 3}, "callback is 3; expected a function"),
    ],
)
def test_refused(run: Run, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(PLAN, **arguments)


@both
def test_a_start_from_an_image(run: Run) -> None:
    """The last three of six steps, from the image at the level of row 3: by hand with the plan derived for that."""
    rest = truncate(PLAN, SCHEDULE, 3)
    assert rest.nfe == 3
    start = rest.alphas[0] * IMAGE.double() + rest.sigmas[0] * NOISE.double()
    expected = run(rest, (start / rest.rows[0, 0]).float())
    torch.testing.assert_close(run(PLAN, NOISE, init_image=IMAGE, strength=0.5), expected, rtol=0, atol=1e-6)
    seen = run(PLAN, seed=0, init_image=IMAGE, strength=0.5)  # noise of the image's shape
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("strength", [0, 0.1])
def test_a_strength_that_leaves_no_step_gives_the_image(run: Run, strength: float) -> None:
    assert torch.equal(run(PLAN, NOISE, init_image=IMAGE, strength=strength), IMAGE)


def test_a_captured_plan_starts_as_its_scheduler_does() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++")
    plan = olss_fast.capture(scheduler, 5)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    x = scheduler.add_noise(IMAGE, NOISE, scheduler.timesteps[2:3].expand(3))
    for timestep in scheduler.timesteps[2:]:
        x = scheduler.step(network(x, timestep.expand(3)), timestep, x).prev_sample
    found = olss_fast.sample(network, plan, NOISE, init_image=IMAGE, strength=0.6)
    torch.testing.assert_close(found, x, **CLOSE)


def test_a_fitted_plan_starts_where_it_was_fitted() -> None:
    fitted = PLAN.replace(metadata={"method": "olss"})
    with pytest.raises(InputError, match="was fitted for all 6 steps, but this run takes the last"):
        olss_fast.sample(network, fitted, NOISE, init_image=IMAGE, strength=0.5)
    later = truncate(PLAN, SCHEDULE, 3)
    metadata = {"method": "olss", "begin": "3", "num_inference_steps": "6"}
    found = olss_fast.sample(network, later.replace(metadata=metadata), NOISE, init_image=IMAGE, strength=0.5)
    assert torch.equal(found, olss_fast.sample(network, PLAN, NOISE, init_image=IMAGE, strength=0.5))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PLAN.replace(models=[0, 0, 0, 1, 1, 1]), "asks several networks, and begins only where it was made"),
        (split(PLAN, 2.0), "keeps the unconditional and the conditional output apart, and begins only where"),
    ],
)
def test_what_a_later_start_would_lose_is_refused(plan: Plan, message: str) -> None:
    how = {"unconditional": {}, "init_image": IMAGE}
    with pytest.raises(InputError, match=message):
        olss_fast.sample([network, network], plan, NOISE, strength=0.5, **how)
    assert olss_fast.sample([network, network], plan, NOISE, strength=1.0, **how).shape == NOISE.shape  # all its steps


def test_a_plan_that_takes_no_noise_has_no_place_for_an_image() -> None:
    rows = PLAN.rows.copy()
    rows[0, 0] = 0.0
    with pytest.raises(InputError, match="takes nothing of x_T into its first row"):
        olss_fast.sample(network, PLAN.replace(rows=rows), NOISE, init_image=IMAGE, strength=1.0)


SCHEDULES = {
    "VP": SCHEDULE,
    "zero terminal": NoiseSchedule.named("linear", prediction_type="v_prediction", zero_terminal_snr=True),
    "flow": NoiseSchedule.flow(3.0),
    "EDM": NoiseSchedule.edm(),
    "VE": NoiseSchedule.ve(0.002, 700.0, prediction_type="v_prediction", timestep="quarter_log", unit_input=True),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [solvers.ddim, solvers.heun, solvers.unipc, solvers.euler_ancestral])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_a_plan_tells_enough_of_its_schedule(name: str, solver: Callable[..., Plan], spacing: str) -> None:
    """Derived for a later start from its own levels, it is what it is from its schedule's, to rounding."""
    schedule = SCHEDULES[name]
    plan = solver(schedule, 8, spacing=spacing)
    expected, found = truncate(plan, schedule, 3), truncate(plan, schedule_of(plan), 3)
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.alphas, expected.alphas, rtol=1e-12)
    with pytest.raises(ScheduleError, match="at its own timesteps alone"):
        schedule_of(plan).timestep_of_lam(0.0)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_graphs(monkeypatch)


@pytest.mark.parametrize("backend", ["reference", "fused", "graph"])
@pytest.mark.parametrize("unroll", [False, True])
def test_a_callback_sees_every_state(backend: str, unroll: bool, fake_graphs: None) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    sampler = Sampler(network, PLAN, backend=backend, unroll=unroll)
    result = sampler(NOISE, callback=lambda *what: seen.append(what))
    assert [i for i, _, _ in seen] == list(range(6))
    assert [time for _, time, _ in seen] == PLAN.timesteps.tolist()
    assert torch.equal(seen[-1][2], result)
    inputs: list[Tensor] = []
    olss_fast.sample(lambda x, t: (inputs.append(x), network(x, t))[1], PLAN, NOISE)
    for (_, _, state), expected in zip(seen, inputs[1:], strict=False):
        torch.testing.assert_close(state, expected, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "fused", "graph"])
def test_what_a_callback_raises_comes_out(backend: str, fake_graphs: None) -> None:
    calls = []

    def callback(i: int, timestep: float, x: Tensor) -> None:
        calls.append(i)
        raise KeyError("mine")

    sampler = Sampler(network, PLAN, backend=backend)
    with pytest.raises(KeyError, match="mine"):
        sampler(NOISE, callback=callback)
    assert calls == [0]
    torch.testing.assert_close(sampler(NOISE), olss_fast.sample(network, PLAN, NOISE), **CLOSE)


@both
def test_a_progress_bar_counts_evaluations(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("olss_fast.support.progress.can_draw", lambda: True)  # as on a terminal
    run(PLAN, NOISE)
    assert capsys.readouterr().err == ""
    run(PLAN, NOISE, progress=True)
    assert "6/6" in capsys.readouterr().err
