"""Writes docs/schedulers.md: what `olss_fast.capture` makes of every scheduler class of the installed diffusers.

python tools/scheduler_table.py
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import NamedTuple

import diffusers

from olss_fast import capture
from olss_fast._capture_refusals import REFUSED, clipping_options
from olss_fast.errors import OlssError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "schedulers.md"
STEPS = 10
STEPS_OF_CLASS = {"ConsistencyDecoderScheduler": 2}  # takes no other
CONFIG = {"HeliosScheduler": {"stages": 1}}
ARGUMENTS = {"SCMScheduler": {"intermediate_timesteps": None}}  # for other than 2 steps

HEADER = """# diffusers' schedulers as plans

Written by `python tools/scheduler_table.py`, from diffusers {version}.

Every scheduler class of `diffusers.schedulers`, captured at {steps} steps in its default configuration, but with what
the column *with* says: options that are not linear are switched off. *Outputs* and *noises* are columns of the plan
beside the initial noise; NFE is the number of network evaluations, which is that of the outputs. Where it says why not,
the reason is the one that `olss_fast.capture` gives. {captured} of {classes} classes are captured.

| class | NFE | outputs | noises | with |
|---|---|---|---|---|
{plans}

| class | why not |
|---|---|
{reasons}
"""


class Entry(NamedTuple):
    """One class: the numbers of its plan and the settings it took, or the reason why there is none."""

    name: str
    nfe: int = 0
    outputs: int = 0
    noises: int = 0
    settings: str = ""
    reason: str = ""


def scheduler_classes() -> list[str]:
    """Names of all scheduler classes; those that lack a dependency are there too, as placeholders."""
    space = vars(diffusers.schedulers)
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    return sorted(name for name in names if inspect.isclass(space.get(name, getattr(diffusers.schedulers, name))))


def entry(name: str) -> Entry:
    """What `capture` makes of one class."""
    if name in REFUSED:
        return Entry(name, reason=REFUSED[name])
    kind, config = getattr(diffusers.schedulers, name), dict(CONFIG.get(name, {}))
    config |= dict.fromkeys(clipping_options(kind(**config)), False)
    steps, arguments = STEPS_OF_CLASS.get(name, STEPS), ARGUMENTS.get(name, {})
    settings = [f"{key}={value}" for key, value in (config | arguments).items()]
    settings += [f"{steps} steps"] if steps != STEPS else []
    try:
        plan = capture(kind(**config), steps, **arguments)
    except OlssError as error:
        return Entry(name, reason=_reason(name, str(error)))
    outputs = plan.noise_slice.start - 1
    return Entry(name, plan.nfe, outputs, plan.noises, ", ".join(settings))


def page() -> str:
    """The whole page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = [entry(name) for name in scheduler_classes()]
    plans = [f"| {e.name} | {e.nfe} | {e.outputs} | {e.noises} | {e.settings} |" for e in entries if not e.reason]
    reasons = [f"| {e.name} | {e.reason} |" for e in entries if e.reason]
    return HEADER.format(
        version=diffusers.__version__,
        steps=STEPS,
        captured=len(plans),
        classes=len(entries),
        plans="\n".join(plans),
        reasons="\n".join(reasons),
    )


def _reason(name: str, message: str) -> str:
    return message.removeprefix(f"{name} ").removeprefix("cannot be captured: ")


if __name__ == "__main__":
    diffusers.logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
