"""Whether network and schedule belong together: right hook-ups are silent, the usual mistakes are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import olss_fast
from olss_fast import NoiseSchedule
from olss_fast.errors import HookUpWarning, NetworkError
from olss_fast.schedule.noise_schedule import beta_schedule
from olss_fast.testing import ExactMixture

SHAPE = (2, 8, 8)
SD = {"beta_start": 0.00085, "beta_end": 0.012}
COSINE = np.cumprod(1.0 - beta_schedule("squaredcos_cap_v2"))


def noise_of(samples: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn((samples, *shape), generator=torch.Generator().manual_seed(2))


def mixture(schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Exact, at float32's timesteps, which rounding may move beyond the schedule's ends."""
    means = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5
    exact, ends = ExactMixture(schedule, means, 0.1), sorted((schedule.first, schedule.last))
    return lambda x, t: exact(x, t.double().clamp(*ends))


RIGHT = {
    "linear": NoiseSchedule.named("linear"),
    "linear, v": NoiseSchedule.named("linear", prediction_type="v_prediction"),
    "linear, x0": NoiseSchedule.named("linear", prediction_type="x0"),
    "linear, flow": NoiseSchedule.named("linear", prediction_type="flow"),
    "scaled linear": NoiseSchedule.named("scaled_linear", **SD),
    "scaled linear, negative": NoiseSchedule.named("scaled_linear", **SD, prediction_type="-epsilon"),
    "whole": NoiseSchedule.named("scaled_linear", **SD, whole_times=True),
    "few": NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.5, 0.9], whole_times=True),
    "cosine, v": NoiseSchedule.named("squaredcos_cap_v2", prediction_type="v_prediction"),
    "cosine, x0": NoiseSchedule.named("squaredcos_cap_v2", prediction_type="sample"),
    "cosine": NoiseSchedule.named("squaredcos_cap_v2"),  # an exact network's noise may be divided by anything
    "cosine, clamped": NoiseSchedule.from_alphas_cumprod(np.maximum(COSINE, 4e-5)),
    "no signal": NoiseSchedule.named("linear", prediction_type="v_prediction", zero_terminal_snr=True),
    "VE": NoiseSchedule.ve(0.02, 50.0),
    "VE, table": NoiseSchedule.from_sigmas(np.geomspace(0.02, 50.0, 200)),
    "EDM": NoiseSchedule.edm(),
    "SVD": NoiseSchedule.ve(0.002, 700, prediction_type="v_prediction", timestep="quarter_log", unit_input=True),
    "flow": NoiseSchedule.flow(),
    "flow, shifted": NoiseSchedule.flow(3.0),
    "flow, x0": NoiseSchedule.flow(3.0, prediction_type="x0"),
    "flow, reversed": NoiseSchedule.flow(1.0, 1, reversed_time=True, prediction_type="velocity"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_hook_ups_pass_without_a_warning(name: str) -> None:
    schedule = RIGHT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = olss_fast.check(mixture(schedule), schedule, noise=noise_of(16))
    assert found.finding == ""
    assert found.error < 0.5  # an exact denoiser is below 1, and this one knows more than the size of the data
    assert np.all(np.diff(schedule.lam(np.array(found.timesteps))) > 0)
    assert len(found.errors) == len(found.timesteps) > 3


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return olss_fast.demo.load("cpu")


def checked(network: Callable[..., Tensor], schedule: NoiseSchedule) -> olss_fast.Check:
    """On two samples of the embedded model, guided."""
    return olss_fast.check(
        network,
        schedule,
        noise=noise_of(2, (1, 32, 32)),
        conditioning={"class_labels": torch.tensor([3, 17])},
        unconditional={"class_labels": 20},
        guidance_scale=1.5,
    )


def test_the_embedded_model_is_hooked_up_right(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(model.network, model.schedule).error < 0.2


MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], str]] = {
    "time reversed": (lambda t: 999 - t, {}, "time seems reversed: the network wants 0 where the noise is, not 999"),
    "wants [0, 1]": (lambda t: 1000 * t, {}, r"the unit of time seems wrong: the network wants timesteps in \[0, 1\]"),
    "wants 0 to 1000": (lambda t: t, {"time_scale": 1e-3}, r"the network wants timesteps in \[0, 1000\]"),
    "sign": (lambda t: t, {"prediction_type": "-epsilon"}, "sign seems wrong.*'epsilon', not '-epsilon'"),
    "x0": (lambda t: t, {"prediction_type": "sample"}, "prediction type seems wrong: 'epsilon', not 'sample'"),
    "v": (lambda t: t, {"prediction_type": "v_prediction"}, "type seems wrong: 'epsilon', not 'v_prediction'"),
    "flow": (lambda t: t, {"prediction_type": "flow"}, "prediction type seems wrong: 'epsilon', not 'flow'"),
    "other flow": (lambda t: t, {"prediction_type": "-flow"}, "prediction type seems wrong: 'epsilon', not '-flow'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(model: Any, name: str) -> None:
    clock, changes, message = MISTAKES[name]

    def network(x: Tensor, timestep: Tensor, **how: Tensor) -> Tensor:
        return model.network(x, clock(timestep), **how)

    warnings.simplefilter("error", HookUpWarning)  # until the end of the test
    with pytest.raises((NetworkError, HookUpWarning), match=message):
        checked(network, replace(model.schedule, **changes))


def test_a_mistake_is_named_before_the_teacher_is_measured() -> None:
    """Also where the network is not finite at the timesteps that it is asked by mistake."""
    right, calls = NoiseSchedule.flow(3.0, 1), 0
    exact = mixture(right)

    def network(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return exact(x, t) * (1.0 if t.max() <= 1.0 else torch.nan)

    with pytest.raises(NetworkError, match=r"the network wants timesteps in \[0, 1\]"):
        olss_fast.tune(network, noise=noise_of(24), schedule=NoiseSchedule.flow(3.0), steps=2, progress=False)
    assert calls < 150
    with pytest.raises(NetworkError, match=r"NaN or infinity at evaluation 0 for sample\(s\) \[0, 1"):
        olss_fast.check(lambda x, t: x * torch.nan, right, noise=noise_of(4))


def test_tune_refuses_a_teacher_that_blows_up(model: Any) -> None:
    """Noise predictions divided by the root of 2.4e-9: once a tidy report of images with a peak of 125."""
    schedule = NoiseSchedule.named("squaredcos_cap_v2")
    how = {"noise": noise_of(12, (1, 32, 32)), "conditioning": {"class_labels": torch.arange(12)}, "progress": False}
    with pytest.raises(NetworkError, match=r"blow up .*alphas_cumprod = 2\.4e-09\. Clamp it"):
        olss_fast.tune(model.network, schedule=schedule, steps=2, teacher_steps=8, **how)


WRONG_FLOWS = {
    "velocity": (NoiseSchedule.flow(3.0), {"prediction_type": "-flow"}, "to be 'flow', not '-flow'"),
    "reversed": (
        NoiseSchedule.flow(3.0, reversed_time=True, prediction_type="velocity"),
        {"time_scale": 1.0, "time_offset": 0.0, "prediction_type": "flow"},
        "time seems reversed.*and the output seems to be '-flow'",
    ),
    "reversed in [0, 1]": (
        NoiseSchedule.flow(3.0, 1, reversed_time=True, prediction_type="velocity"),
        {"time_scale": 1.0, "time_offset": 0.0, "prediction_type": "flow"},
        r"time seems reversed and its unit wrong: timesteps in \[0, 1\], and the output '-flow'",
    ),
    "in [0, 1]": (NoiseSchedule.flow(3.0, 1), {"time_scale": 1.0}, r"timesteps in \[0, 1\]"),
    "log": (NoiseSchedule.ve(0.02, 50.0, timestep="log"), {"curve": RIGHT["VE"].curve}, "'log', not 'sigma'"),
}


@pytest.mark.parametrize("name", WRONG_FLOWS)
def test_mistakes_of_other_families_are_named_by_tune(name: str) -> None:
    right, changes, message = WRONG_FLOWS[name]
    given = replace(right, **changes)
    warnings.simplefilter("error", HookUpWarning)  # until the end of the test
    with pytest.raises((NetworkError, HookUpWarning), match=message):
        olss_fast.tune(mixture(right), noise=noise_of(24), schedule=given, steps=2, teacher_steps=20, progress=False)


# --- what cannot be judged -----------------------------------------------------------------------------------------

ODD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": lambda x, t: 0.0 * x,
    "linear": lambda x, t: 0.1 * x,
    "itself": lambda x, t: x,
    "constant": lambda x, t: torch.ones_like(x),
    "class": lambda x, t: torch.linspace(-1.0, 1.0, len(x)).view(-1, 1, 1, 1).expand_as(x),
    "untrained": lambda x, t: torch.tanh(x.roll(1, -1) - 0.5 * x + t.view(-1, 1, 1, 1) / 1000.0),
}


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize("name", ODD)
def test_odd_networks_are_not_refused(name: str, kind: str) -> None:
    """None of them denoises; a network that does not is worth a warning at most, and no mistake is made up."""
    schedule = NoiseSchedule.named("linear", prediction_type=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookUpWarning)
        finding = olss_fast.check(ODD[name], schedule, noise=noise_of(16)).finding
    assert "seem" not in finding


def test_a_warning_shows_the_line_that_called() -> None:
    def odd(x: Tensor, t: Tensor) -> Tensor:
        return -2.0 * torch.sin(3.0 * x)

    with pytest.warns(HookUpWarning, match="worse than a multiple of the noisy image") as caught:
        olss_fast.tune(odd, noise=noise_of(24), schedule=RIGHT["linear"], steps=1, teacher_steps=5, progress=False)
    assert [each.filename for each in caught] == [__file__]


def test_a_sound_network_costs_five_questions() -> None:
    asked = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return mixture(RIGHT["flow, shifted"])(x, t)

    assert olss_fast.check(counted, RIGHT["flow, shifted"], noise=noise_of(20)).error < 0.2
    assert asked == [16] * (8 + 5)  # a short run, and five levels
