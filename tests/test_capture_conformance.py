"""Captured plans equal the schedulers they come from: every class x prediction type x timestep spacing x steps.

The scheduler runs as in a pipeline, in float32 and in float64, on random tensors and with real draws of a seeded
generator; rows · basis is evaluated in float64 (`scheduler_runs` says what the deviation is relative to).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest

from olss_fast.errors import OlssError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from scheduler_runs import check_plan, remember_quadratures  # noqa: E402

from olss_fast.capturing import capture  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = ("epsilon", "sample", "v_prediction")
NOT_SAMPLE = ("epsilon", "v_prediction")
WITH_FLOW = (*ALL, "flow_prediction")
SPACINGS = ("linspace", "leading", "trailing")
STEPS = (1, 2, 5, 10, 20, 50)
NONE = (None,)


class Kind(NamedTuple):
    """What a class takes: prediction types and spacings that it accepts, and steps that it does not."""

    predictions: tuple[str | None, ...] = NONE
    spacings: tuple[str | None, ...] = NONE
    rejected_steps: tuple[int, ...] = ()
    config: dict[str, Any] = {}  # noqa: RUF012
    arguments: dict[str, Any] = {}  # noqa: RUF012


LINEAR = {"clip_sample": False}
KINDS = {
    "CMStochasticIterativeScheduler": Kind(rejected_steps=(50,), config={"clip_denoised": False}),
    "CogVideoXDDIMScheduler": Kind(ALL, SPACINGS),
    "CogVideoXDPMScheduler": Kind(ALL, SPACINGS),
    "ConsistencyDecoderScheduler": Kind(rejected_steps=(1, 5, 10, 20, 50)),
    "DDIMParallelScheduler": Kind(ALL, SPACINGS, config=LINEAR),
    "DDIMScheduler": Kind(ALL, SPACINGS, config=LINEAR),
    "DDPMParallelScheduler": Kind(ALL, SPACINGS, config=LINEAR),
    "DDPMScheduler": Kind(ALL, SPACINGS, config=LINEAR),
    "DDPMWuerstchenScheduler": Kind(),
    "DEISMultistepScheduler": Kind(WITH_FLOW, SPACINGS),
    "DPMSolverMultistepScheduler": Kind(WITH_FLOW, SPACINGS),
    "DPMSolverSinglestepScheduler": Kind(WITH_FLOW),
    "EDMDPMSolverMultistepScheduler": Kind(NOT_SAMPLE),
    "EDMEulerScheduler": Kind(NOT_SAMPLE),
    "EulerAncestralDiscreteScheduler": Kind(NOT_SAMPLE, SPACINGS),
    "EulerDiscreteScheduler": Kind(ALL, SPACINGS),
    "FlowMapEulerDiscreteScheduler": Kind(),
    "FlowMatchEulerDiscreteScheduler": Kind(),
    "FlowMatchHeunDiscreteScheduler": Kind(),
    "FlowMatchLCMScheduler": Kind(),
    "HeliosScheduler": Kind(config={"stages": 1}),
    "HeunDiscreteScheduler": Kind(ALL, SPACINGS),
    "IPNDMScheduler": Kind(rejected_steps=(1,)),
    "KDPM2AncestralDiscreteScheduler": Kind(NOT_SAMPLE, SPACINGS),
    "KDPM2DiscreteScheduler": Kind(NOT_SAMPLE, SPACINGS),
    "LCMScheduler": Kind(ALL, SPACINGS),
    "LMSDiscreteScheduler": Kind(ALL, SPACINGS),
    "LTXEulerAncestralRFScheduler": Kind(),
    "MiniMaxH3Scheduler": Kind(rejected_steps=(1,)),
    "PNDMScheduler": Kind(NOT_SAMPLE, SPACINGS, rejected_steps=(1, 2)),  # Runge-Kutta needs four
    "SASolverScheduler": Kind(WITH_FLOW, SPACINGS),
    "SCMScheduler": Kind(arguments={"intermediate_timesteps": None}),
    "TCDScheduler": Kind(ALL, SPACINGS),
    "UnCLIPScheduler": Kind(("epsilon", "sample"), rejected_steps=(1,), config=LINEAR),
    "UniPCMultistepScheduler": Kind(WITH_FLOW, SPACINGS),
}
REJECTED_FLOW = {"DEISMultistepScheduler": (1,), "SASolverScheduler": (1,)}  # one step from a sigma to itself


def combinations(name: str) -> Iterator[tuple[str | None, str | None, int, bool]]:
    """(prediction, spacing, steps, whether the class itself rejects these steps)."""
    kind = KINDS[name]
    for prediction, spacing, steps in product(kind.predictions, kind.spacings, STEPS):
        flow = REJECTED_FLOW.get(name, ()) if prediction == "flow_prediction" else ()
        yield prediction, spacing, steps, steps in (*kind.rejected_steps, *flow)


@cache  # some take a second to make, and none is ever touched
def make(name: str, prediction: str | None, spacing: str | None) -> Any:
    wanted = {"prediction_type": prediction, "timestep_spacing": spacing}
    config: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if prediction == "flow_prediction":
        config["use_flow_sigmas"] = True
    return getattr(diffusers.schedulers, name)(**KINDS[name].config, **config)


@pytest.fixture(autouse=True)
def remembered_quadratures(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_quadratures(monkeypatch)


@pytest.mark.parametrize("name", KINDS)
def test_plans_equal_schedulers(name: str) -> None:
    arguments = KINDS[name].arguments
    for prediction, spacing, steps, rejected in combinations(name):
        scheduler = make(name, prediction, spacing)
        if rejected:
            with pytest.raises(OlssError):
                capture(scheduler, steps, **arguments)
        else:
            check_plan(scheduler, steps, **arguments)


def rejected_predictions() -> list[tuple[str, str]]:
    """(class, prediction type) that a class with that option does not take."""
    choosing = {name: kind for name, kind in KINDS.items() if kind.predictions is not NONE}
    return [(name, type_) for name, kind in choosing.items() for type_ in WITH_FLOW if type_ not in kind.predictions]


@pytest.mark.parametrize(("name", "prediction"), rejected_predictions())
def test_other_predictions_are_rejected(name: str, prediction: str) -> None:
    kind = getattr(diffusers.schedulers, name)
    with pytest.raises(OlssError, match=r"[Pp]rediction"):
        capture(kind(**KINDS[name].config, prediction_type=prediction), 5)


def test_nothing_is_left_out() -> None:
    """The tables above cannot become empty unnoticed."""
    assert len(rejected_predictions()) == 25
    found = [rejected for name in KINDS for *_, rejected in combinations(name)]
    assert len(KINDS) == 35
    assert (found.count(False), found.count(True)) == (1130, 28)
