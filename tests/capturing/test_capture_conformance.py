"""Captured plans equal the schedulers they come from: every class x prediction type x timestep spacing x steps.

The scheduler runs as in a pipeline, in float32 and in float64, on random tensors and with real draws of a seeded
generator; rows · basis is evaluated in float64 (`scheduler_runs` says what the deviation is relative to).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest

from olss_fast.errors import OlssError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from scheduler_kinds import KINDS, NONE, WITH_FLOW  # noqa: E402
from scheduler_runs import check_plan, remember_quadratures  # noqa: E402

from olss_fast.capturing.capturing import capture  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = (1, 2, 5, 10, 20, 50)
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
