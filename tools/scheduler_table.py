"""Writes docs/schedulers.md: what `olss_fast.capture` makes of every scheduler class of the installed diffusers.

python tools/scheduler_table.py
"""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

from olss_fast import capture
from olss_fast.capturing.refusals import REFUSED, clipping_options
from olss_fast.errors import OlssError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "schedulers.md"
STEPS = 10
STEPS_OF_CLASS = {"ConsistencyDecoderScheduler": 2}  # takes no other
TRIED = (1, 2, 3, 4, 5, 100)
CONFIG = {"HeliosScheduler": {"stages": 1}}
ARGUMENTS = {"SCMScheduler": {"intermediate_timesteps": None}}  # for other than 2 steps

HEADER = """# diffusers' schedulers as plans

Written by `python tools/scheduler_table.py`, from diffusers {version}.

Every scheduler class of `diffusers.schedulers`, captured at {steps} steps in its default configuration, but with what
the column *with* says: options that are not linear are switched off. *Outputs* and *noises* are columns of the plan
beside the initial noise; NFE is the number of network evaluations, which is that of the outputs. Where it says why not,
the reason is the one that `olss_fast.capture` gives. {captured} of {classes} classes are captured.

That a class is captured says that its arithmetic is a plan. Which pipelines run it is another table:
[pipelines.md](pipelines.md). CogVideoX's do not with CogVideoXDPMScheduler, whose step takes more than a plan knows.

| class | NFE | outputs | noises | with |
|---|---|---|---|---|
{plans}

Of {tried} steps, these classes refuse some, in the settings above; all others take each of them.

| class | steps refused |
|---|---|
{refused}

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
    refused: tuple[int, ...] = ()
    reason: str = ""


def scheduler_classes() -> list[str]:
    """Names of all scheduler classes; those that lack a dependency are there too, as placeholders."""
    space = vars(diffusers.schedulers)
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    return sorted(name for name in names if inspect.isclass(space.get(name, getattr(diffusers.schedulers, name))))


@cache  # some classes take a second to make
def entry(name: str) -> Entry:
    """What `capture` makes of one class."""
    if name in REFUSED:
        return Entry(name, reason=REFUSED[name])
    scheduler, config = linear(name)
    steps, arguments = STEPS_OF_CLASS.get(name, STEPS), ARGUMENTS.get(name, {})
    settings = [f"{key}={value}" for key, value in (config | arguments).items()]
    settings += [f"{steps} steps"] if steps != STEPS else []
    try:
        plan = capture(scheduler, steps, **arguments)
    except OlssError as error:
        return Entry(name, reason=_reason(name, str(error)))
    outputs = plan.noise_slice.start - 1
    refused = tuple(count for count in TRIED if not _takes(scheduler, count, arguments))
    return Entry(name, plan.nfe, outputs, plan.noises, ", ".join(settings), refused)


def linear(name: str) -> tuple[Any, dict[str, Any]]:
    """A scheduler of this class with everything that is not linear switched off, and the options that took."""
    kind, config = getattr(diffusers.schedulers, name), dict(CONFIG.get(name, {}))
    config |= dict.fromkeys(clipping_options(kind(**config)), False)
    return kind(**config), config


def _takes(scheduler: Any, steps: int, arguments: dict[str, Any]) -> bool:
    try:
        capture(scheduler, steps, **arguments)
    except OlssError:
        return False
    return True


def page() -> str:
    """The whole page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = [entry(name) for name in scheduler_classes()]
    plans = [f"| {e.name} | {e.nfe} | {e.outputs} | {e.noises} | {e.settings} |" for e in entries if not e.reason]
    refused = [f"| {e.name} | {', '.join(map(str, e.refused))} |" for e in entries if e.refused]
    reasons = [f"| {e.name} | {e.reason} |" for e in entries if e.reason]
    return HEADER.format(
        version=diffusers.__version__,
        steps=STEPS,
        captured=len(plans),
        classes=len(entries),
        plans="\n".join(plans),
        tried=f"{', '.join(map(str, TRIED[:-1]))} and {TRIED[-1]}",
        refused="\n".join(refused),
        reasons="\n".join(reasons),
    )


def _reason(name: str, message: str) -> str:
    return message.removeprefix(f"{name} ").removeprefix("cannot be captured: ")


if __name__ == "__main__":
    diffusers.logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
