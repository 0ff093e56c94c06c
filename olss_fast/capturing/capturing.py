"""Any linear diffusers scheduler as a Plan.

A linear scheduler turns [x_T | f_0 … f_{S-1} | z_1 … z_Z] into network inputs and a sample by fixed coefficients. So it
is run with unit vectors in place of these tensors (one tensor whose last axis enumerates the basis, in float64):
the network input then *is* the row of coefficients. A second run on random tensors must agree with rows · basis to
`LINEARITY`; a scheduler that clips, mixes pixels or depends on the values fails this check and is refused.

Noise columns are in the order in which the scheduler draws. Draws after the last used one are dropped; unused ones
before it keep their column, so a generator's stream fills the same columns as in the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olss_fast.capturing.driver import Driver, Trace
from olss_fast.capturing.facts import GRIDS, CapturedFacts, captured_facts, scheduler_class
from olss_fast.capturing.levels import check_falling, levels_of, noising, with_final_levels
from olss_fast.capturing.refusals import check_protocol, checked_arguments, refuse_known
from olss_fast.errors import InputError, OlssError, ScheduleError
from olss_fast.plan.plan import Floats, Plan
from olss_fast.schedule.from_diffusers import MOST_TIMESTEPS, check_config
from olss_fast.support.device import plain_defaults
from olss_fast.support.text import quoted

LINEARITY = 1e-9
"""Largest deviation of a run on random tensors from rows · basis, relative to the sum of the magnitudes of the terms.

Both sides are float64 with at most a few hundred operations per element: rounding stays below 1e-13, even where a
scheduler divides by a signal level of 1e-3; the least clipping is of order 1."""

MAGNITUDES = (1e-2, 1e2, 1e6)  # of the random tensors: below and beyond every usual threshold and clipping range
PROBE_SHAPE = (2, 3, 4, 5)  # for each magnitude


@plain_defaults()
def capture(
    scheduler: Any,
    steps: int | None = None,
    *,
    begin: int = 0,
    step_arguments: Mapping[str, Any] | None = None,
    **set_timesteps_arguments: Any,
) -> Plan:
    """The plan that equals `scheduler` after `set_timesteps(steps, **set_timesteps_arguments)`.

    Args:
        scheduler: any object with the interface of a diffusers scheduler. It is copied, never modified.
        steps: num_inference_steps; None if `timesteps=` or `sigmas=` are given. NFE may be larger (Heun).
        begin: index of the first timestep to run, as in image-to-image pipelines. The column x_T then is the first
            *network input*, alphas[0] image + sigmas[0] noise, and rows[0, 0] = 1.
        step_arguments: further arguments of every `step`, such as {"eta": 0.5}.
        set_timesteps_arguments: further arguments of `set_timesteps`: timesteps, sigmas, mu, …

    Returns:
        A plan with metadata "scheduler": JSON of class, config, steps, arguments, step_arguments, begin and order, from
        which `recapture` derives it again, and of its states and `add_noise` (`levels.noising`); "method", "title",
        and if known "prediction_type" and "schedule".

    Raises:
        InputError: `steps` below 1 or above MAX_EVALUATIONS, timesteps or sigmas outside the scheduler's range or along
            which the noise does not fall, arguments that the scheduler's methods do not take, a `begin` beyond the
            timesteps.
        ScheduleError: not a scheduler, or none that a Plan can represent; the message says why and what to switch off.
    """
    check_protocol(scheduler)
    steps, arguments, stepping = checked_arguments(scheduler, steps, set_timesteps_arguments, step_arguments)
    refuse_known(scheduler, stepping)
    driver = Driver(scheduler, steps, begin, arguments, stepping)
    rows, trace = _rows(driver)
    levels = levels_of(driver, trace.scales, rows)
    if any(arguments.get(name) is not None for name in GRIDS):
        check_falling(driver, levels)
    plan = Plan(
        timesteps=driver.timesteps[driver.begin :].double().numpy(),
        rows=rows,
        alphas=[*levels.alphas, 1.0],
        sigmas=[*levels.sigmas, 0.0],
    )
    plan = with_final_levels(plan, levels, driver.name, begun=driver.begin > 0)
    facts = CapturedFacts(
        class_name=driver.name,
        config={key: value for key, value in driver.config.items() if not key.startswith("_")},
        steps=steps,
        arguments=arguments,
        step_arguments=stepping,
        begin=driver.begin,
        order=driver.order,
        **noising(driver, trace.scales, plan),
    )
    named = {"method": "captured", "title": _title(driver), "scheduler": facts.to_json()}
    return plan.replace(metadata={**named, **levels.metadata})


@plain_defaults()
def recapture(plan: Plan, **changes: Any) -> Plan:
    """A captured plan again, with another `begin`, `steps` or arguments of `set_timesteps` (mu, sigmas, …).

    The scheduler is made from the class and config in the plan's metadata. New `timesteps` or `sigmas` replace the
    number of steps, and vice versa; to replace both, pass both.

    Raises:
        InputError: the plan was not captured, diffusers has no such class, or the class gives another plan for the
            stored config, because the scheduler was modified or the version of diffusers differs.
        ScheduleError: the stored config holds values that no schedule can be made of.
    """
    facts = captured_facts(plan)
    if facts is None:
        raise InputError(
            f"this plan's method is {plan.metadata.get('method')!r}; only captured plans can be derived again: capture "
            "the scheduler, or make the analytic plan anew"
        )
    what = "".join(f", with {name}={quoted(value)}" for name, value in changes.items())
    kind = scheduler_class(facts.class_name)
    if kind is None:
        raise InputError(
            f"this plan was captured from {facts.class_name}, and only classes of diffusers can be derived again "
            f"(diffusers has no scheduler {facts.class_name}); for this run capture the scheduler itself{what}"
        )
    check_config(facts.config)
    for name, value in {**facts.config, **facts.arguments}.items():
        if isinstance(value, int) and abs(value) > MOST_TIMESTEPS:  # lists that long would be made
            raise InputError(f"{name} of this captured plan is {quoted(value)}; expected at most {MOST_TIMESTEPS}")
    try:
        return _captured_again(plan, kind.from_config(facts.config), facts, changes)
    except InputError:
        raise
    except Exception as error:  # any error of diffusers, from a config that may have been altered
        detail = str(error) if isinstance(error, OlssError) else f"{type(error).__name__}: {quoted(str(error), 200)}"
        raise InputError(f"this plan of {facts.class_name} cannot be derived again{what}: {detail}") from error


def _captured_again(plan: Plan, scheduler: Any, facts: CapturedFacts, changes: dict[str, Any]) -> Plan:
    """Captured with `changes` of its arguments, after checking that the plan itself can be reproduced."""
    stored = {"begin": facts.begin, "steps": facts.steps, **facts.arguments}
    again = capture(scheduler, step_arguments=facts.step_arguments, **stored)
    if again.rows.shape != plan.rows.shape or not np.allclose(again.rows, plan.rows, rtol=1e-6, atol=1e-6):
        raise InputError(
            f"{facts.class_name} with the config of this plan makes other rows than the plan has; capture the "
            "scheduler itself again"
        )
    if "steps" in changes:
        stored = {key: value for key, value in stored.items() if key not in GRIDS}
    elif set(GRIDS) & set(changes):
        stored["steps"] = None
    return capture(scheduler, step_arguments=facts.step_arguments, **{**stored, **changes})


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(driver: Driver) -> tuple[Floats, Trace]:
    """(S+1, columns) and the run they come from; the run on random tensors also counts the noises."""
    basis, found = _probe(driver)
    width = len(basis)
    identity = torch.eye(width, dtype=torch.float64).view(width, 1, 1, 1, width)
    trace = driver.run(identity[0], lambda i: identity[1 + i], lambda k: identity[1 + driver.nfe + k])
    rows = torch.stack([*trace.inputs, trace.sample]).reshape(-1, width).numpy().copy()
    if driver.begin:
        rows[0] = identity[0].flatten().numpy()
    _check_finite(driver, rows)
    for of_one_magnitude in zip(*(np.split(each, len(MAGNITUDES), axis=1) for each in (basis, found)), strict=True):
        _check_linear(driver, rows, *of_one_magnitude)
    used = np.flatnonzero(np.any(rows[:, 1 + driver.nfe :] != 0, axis=0))
    return rows[:, : 1 + driver.nfe + (int(used[-1]) + 1 if used.size else 0)], trace


def _probe(driver: Driver) -> tuple[Floats, Floats]:
    """A run on random tensors: the basis [x_T | outputs | noises], and the network inputs and sample made of it.

    The batch holds samples of each of MAGNITUDES in turn.
    """
    generator = np.random.default_rng(0)
    magnitudes = np.repeat(MAGNITUDES, PROBE_SHAPE[0]).reshape(-1, *(1 for _ in PROBE_SHAPE[1:]))

    def draw(_: int = 0) -> Tensor:
        return torch.from_numpy(magnitudes * generator.standard_normal((len(magnitudes), *PROBE_SHAPE[1:])))

    start, outputs = draw(), [draw() for _ in range(driver.nfe)]
    trace = driver.run(start, outputs.__getitem__, draw)
    return _flat([start, *outputs, *trace.noises]), _flat([*trace.inputs, trace.sample])


def _flat(tensors: list[Tensor]) -> Floats:
    flat: Floats = torch.stack(tensors).reshape(len(tensors), -1).numpy()
    return flat


def _check_finite(driver: Driver, rows: Floats) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        what = f"the input of evaluation {bad[0]}" if bad[0] < driver.nfe else "the sample"
        raise ScheduleError(
            f"{driver.name} computes coefficients that are not finite for {what}; {_division(driver, int(bad[0]))}"
        )
    if not rows[-1].any():
        raise ScheduleError(f"{driver.name} returns a sample of zeros for any network output; take more steps")


def _division(driver: Driver, row: int) -> str:
    """The likely division by zero behind a non-finite row: equal timesteps just before it, or a level of 0."""
    times = driver.timesteps[driver.begin :].tolist()
    for i in range(max(row - 3, 0), min(row, driver.nfe - 1)):
        if times[i] == times[i + 1]:
            return (
                f"timesteps {i} and {i + 1} are both {times[i]:g}, and it divides by the fall of noise between them: "
                "take fewer steps or another timestep_spacing"
            )
    return (
        "it divides by a signal or noise level of 0 there: try another final_sigmas_type, solver_type or "
        "prediction_type, or no zero terminal SNR"
    )


def _check_linear(driver: Driver, rows: Floats, basis: Floats, found: Floats) -> None:
    terms = np.maximum((np.abs(rows) @ np.abs(basis)).max(axis=1), np.finfo(np.float64).tiny)
    error = np.abs(rows @ basis - found).max(axis=1) / terms
    bad = np.flatnonzero(~(error <= LINEARITY))
    if bad.size:
        what = f"the input of evaluation {bad[0]}" if bad[0] < driver.nfe else "the sample"
        raise ScheduleError(
            f"{driver.name} is not linear: on random tensors {what} differs by {error[bad[0]]:.2g} (relative; at most "
            f"{LINEARITY:g} was expected) from its combination of x_T, network outputs and noises. It adds a "
            "constant, looks at the values or mixes pixels; no option of its config is known to be the cause"
        )


# --- what a captured plan remembers -----------------------------------------------------------------------------------


def _title(driver: Driver) -> str:
    """ "EulerDiscreteScheduler (linspace)": class and timestep spacing."""
    config, kinds = driver.config, ("karras", "exponential", "beta", "flow")
    notes = [str(config["timestep_spacing"])] if config.get("timestep_spacing") else []
    notes += [kind for kind in kinds if config.get(f"use_{kind}_sigmas")]
    notes += ["lu"] if config.get("use_lu_lambdas") else []
    return driver.name + (f" ({', '.join(notes)})" if notes else "")
