"""Checks that a plan belongs to a model."""

from __future__ import annotations

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import NoiseSchedule


def check_prediction(plan: Plan, schedule: NoiseSchedule) -> None:
    """Raise `InputError` if `plan` names another prediction type than `schedule`."""
    told = plan.metadata.get("prediction_type", schedule.prediction_type)
    if told != schedule.prediction_type:
        raise InputError(
            f"the plan is for networks that predict {told!r}, this model predicts {schedule.prediction_type!r}: "
            "use a plan that was made for this model"
        )


def mismatch(plan: Plan, schedule: NoiseSchedule) -> str | None:
    """How the plan's prediction type or training schedule differs from `schedule`; None if equal or unknown.

    Labels are ignored, and so is the shift of flow matching, which moves timesteps but changes no noise level.
    """
    facts = schedule.metadata()
    for key, essence in (("prediction_type", str), ("sigma_data", str), ("schedule", _essence)):
        if key in plan.metadata and essence(plan.metadata[key]) != essence(facts.get(key, "")):
            return f"the plan was made for {key} {plan.metadata[key]!r}, the network has {facts.get(key)!r}"
    return None


def _essence(description: str) -> list[str]:
    """ "VP linear 0.0001 to 0.02, 1000 timesteps, log-SNR -5 to 5, epsilon" -> VP, 1000 timesteps, log-SNR -5 to 5."""
    kind, *rest = (part.split(" from ")[0] for part in description.split(", "))
    return [*kind.split()[:1], *(part for part in rest if "timesteps" in part or part.startswith(("log-SNR", "sigma")))]
