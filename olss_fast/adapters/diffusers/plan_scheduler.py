"""A Plan in the scheduler slot of any diffusers pipeline.

    pipe.scheduler = olss_fast.PlanScheduler.from_pipe(pipe, plan)
    image = pipe("a cat", num_inference_steps=8).images[0]

A pipeline's `latents` are the state that the plan's own scheduler would have (see `levels`): row k of the plan, the
next network input, divided by that scheduler's input scale. `scale_model_input` multiplies by it, `init_noise_sigma` is
rows[0, 0] divided by it. A step is one of `executors.stepwise`.

Start of a run: `set_begin_index`, else the index of the first timestep in `timesteps` (of which pipelines pass views;
numbers and CPU tensors are looked up), else the beginning. Inside torch.compile only `set_begin_index` counts.

Changed samples: pipelines may alter the sample between steps in any way (inpainting blends, callbacks edit). `step`
continues from the sample passed to it, like samplers that use only x_k and f_k: row k+1 is formed relative to it
(`olss_fast.executors.increments`). If a fitted plan's rows do not allow that, the difference d to row k counts as a
change of the initial noise by d / rows[k, 0].

Split runs (SDXL's `denoising_end` and `denoising_start`, a callback that interrupts): either part may use a plan or the
scheduler that it was captured from, else the one that it replaces.

Threads: each has its own run, to which its `timesteps`, `step_index`, … belong; see `sessions`.

A NaN from the network: on the CPU the last step checks for it; on accelerators that would synchronise, so call
`require_finite()`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from olss_fast.adapters.diffusers.levels import StepOutput, scales_of, untimed_amplitude
from olss_fast.adapters.diffusers.plan_book import PlanBook, whole
from olss_fast.adapters.diffusers.sessions import OwnSession, Session, Sessions, first_index, places
from olss_fast.adapters.diffusers.stand_in import StandIn, check_slot, network_config, plans_from, visible_config
from olss_fast.capturing.facts import ENDS_AT_CLEAN, captured_facts, name_of
from olss_fast.errors import InputError, NetworkError
from olss_fast.executors.stepwise import Run
from olss_fast.plan.plan import Plan
from olss_fast.schedule.fits import mismatch
from olss_fast.support.text import quoted

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
DRAWS_FLOAT32 = {
    "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler", "SCMScheduler",
}  # fmt: skip
"""Classes that draw their noise in float32 for any dtype of the sample."""


class PlanScheduler(OwnSession, StandIn, SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Runs Plans with the interface of a diffusers scheduler.

    Args:
        plans: a plan, or several for different numbers of steps (also as the values of a mapping).
            `num_inference_steps` selects a captured plan by the steps it was captured at, others by their NFE or
            metadata["num_inference_steps"].
        scheduler: the diffusers scheduler (or its config) that the network was trained with. Captured plans bring their
            own. It gives `add_noise` the levels between the plan's timesteps and analytic plans their later starts. Its
            config is kept: `OtherScheduler.from_config(ours.config)` works. Plans must match a scheduler; a config is
            not checked.

    Raises:
        InputError: a plan of two branches or several networks, two plans for one number of steps, an unreadable config,
            a plan for another prediction type or training schedule than the scheduler's.
        ScheduleError: a config with unusable numbers.
    """

    _compatibles = [*(kind.name for kind in KarrasDiffusionSchedulers), *FLOW_SCHEDULERS]  # noqa: RUF012
    __module__ = "olss_fast"  # the name in model_index.json of a saved pipeline, wherever this file is

    def __init__(self, plans: Plan | Mapping[str, Any] | Iterable[Any], scheduler: Any = None) -> None:
        given = plans_from(plans)
        network = network_config(scheduler, given)
        config = {"_plans": [plan.to_dict() for plan in given], "_scheduler": network, **visible_config(network, given)}
        self.register_to_config(**config)  # type: ignore[no-untyped-call]
        self._book = PlanBook(given, network)
        if scheduler is not None and not isinstance(scheduler, Mapping):
            self._check_fit(type(scheduler).__name__)
        self._sessions = Sessions(Session(), torch.empty(0, device="cpu"))

    @classmethod
    def from_pipe(
        cls, pipe: Any, plans: Plan | Mapping[Any, Plan] | Iterable[Plan], *, check: bool = True
    ) -> PlanScheduler:
        """A PlanScheduler to replace `pipe.scheduler`; the pipeline is unchanged: assign it.

        InputError if the pipeline has no scheduler slot or does not use it, or (unless `check` is False) a plan was
        made for another prediction type or training schedule than that of the pipeline's scheduler.
        """
        slot = check_slot(pipe)
        return cls(plans, slot if check else network_config(slot, ()))

    def _check_fit(self, network: str) -> None:
        """InputError for a plan made for another network than that of the scheduler `network`."""
        schedule = self._book.schedule
        for plan in self.plans:
            if schedule is not None and (problem := mismatch(plan, schedule)):
                raise InputError(
                    f"{name_of(plan)} does not fit this {network}: {problem}. Give a plan made for this network, or "
                    "from_pipe(…, check=False) if its config is wrong"
                )

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the config of a PlanScheduler, or of another scheduler with `plans=`. InputError if there are none."""
        if isinstance(config, Mapping):
            kwargs.setdefault("plans", config.get("_plans"))
            kwargs.setdefault("scheduler", config.get("_scheduler") or dict(config))
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __repr__(self) -> str:
        """A summary; `config` holds everything."""
        return f"PlanScheduler, {len(self.plans)} plans\n" + textwrap.indent(str(self._book), "  ")

    def __len__(self) -> int:
        """Training timesteps of the network, as of every scheduler."""
        return int(self.config["num_train_timesteps"])

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans, in the order given."""
        return self._book.plans

    @property
    def init_noise_sigma(self) -> float:
        """The factor of the initial unit noise.

        Before set_timesteps that of a captured plan's scheduler. InputError if there is none and the plans differ.
        """
        if (entry := self._session.entry) is not None:
            return self._amplitude(entry.plan)
        for plan in self.plans:
            if (said := untimed_amplitude(plan)) is not None:
                return said
        starts = {self._amplitude(plan) for plan in self.plans}
        if len(starts) > 1:
            raise InputError(f"the plans begin with noise of {sorted(starts)}; call set_timesteps first to choose one")
        return starts.pop()

    def _amplitude(self, plan: Plan) -> float:
        return float(plan.rows[0, 0] / scales_of(plan, self._book.network)[0])

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 of the training schedule at its timesteps 0 … N-1, for networks that have them."""
        schedule = self._book.schedule
        count = len(self)
        if schedule is None or schedule.first != count - 1:
            raise AttributeError("alphas_cumprod: the network's schedule is not known, or not one of betas")
        return torch.from_numpy(schedule.alpha(np.arange(count)) ** 2).float()

    # --- before a run -------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **other: Any,
    ) -> None:
        """Selects the plan and forgets the last run. InputError if no plan matches.

        With other `timesteps`, `sigmas`, `mu` or scheduler arguments than at its capture, a captured plan is captured
        again; an analytic plan is derived again for other `timesteps`. A plan captured with a custom grid keeps it if
        pipelines of flow models pass their plain one, 1 … 1/N.
        """
        asked = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu, **other}
        entry = self._book.choose(
            num_inference_steps, {key: value for key, value in asked.items() if value is not None}
        )
        closing = [0.0] if entry.class_name in ENDS_AT_CLEAN else []
        dtype = torch.int64 if np.all(entry.timesteps == np.round(entry.timesteps)) else torch.float32
        with torch.inference_mode(False):  # views of a plain tensor can be told apart from copies in every mode
            grid = torch.tensor(entry.timesteps.tolist() + closing, dtype=dtype, device=device or "cpu")
        layout = entry.layout.ready_on(grid.device)
        self._sessions.hold(Session(entry, entry.levels.ratios(), layout, offset=entry.begin), grid)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this index of `timesteps`. Plans are derived again for it. InputError if that is impossible."""
        index = whole("a run cannot begin at index", begin_index)
        session = self._sessions.own()
        if session.entry is not None:
            self._begin_at(session, index)
        session.begin_index = index

    def scale_model_input(self, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """The network input of the next step: the sample times the input scale of the plan's own scheduler."""
        if (layout := self._session.layout) is None or not layout.scaled:
            return sample
        session = self._sessions.at(timestep, sample)
        if session.run is None or session.run.step == 0:
            self._find_start(session, timestep)
        assert session.layout is not None
        scales = session.layout.scales
        k = 0 if session.run is None else min(session.run.step, scales.size - 1)
        return sample * float(scales[k])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma eps, as the plan's own scheduler mixes them to begin at a timestep.

        Between the plan's timesteps the levels are those of the training schedule. If that scheduler uses the index of
        the run after `set_begin_index`, so does this, and the timesteps are ignored.

        timesteps: a number or (B,) on any device; not read on the host.
        """
        levels = self._chosen().levels
        alpha, sigma = levels.at_index(self._place()) or levels.at(timesteps, original_samples)
        try:
            return (alpha * original_samples + sigma * noise).to(original_samples.dtype)
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"add_noise cannot add noise of shape {_shape(noise)} to samples of shape {_shape(original_samples)} "
                f"at timesteps {quoted(timesteps)}: {error}"
            ) from error

    def _place(self) -> int | None:
        """The index in `timesteps` where the run is or will begin; None without `set_begin_index`."""
        session = self._session
        return session.begin_index if session.begin_index is None or session.run is None else session.next

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise`, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    # --- a run --------------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *positional: Any,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        eta: float | None = None,
        **other: Any,
    ) -> Any:
        """From the network's output at `sample` to the next network input, or finally the sample.

        Args:
            model_output: of sample's shape, or with twice the channels where the network predicts the variance too.
            timestep: used in the first step only, see above.
            sample: the output of the last step, or a changed version of it; in the first step, the initial sample.
            positional: in the order of the captured scheduler's own `step` (in DDIM eta comes next, in Euler s_churn);
                for other plans generator, return_dict. A generator is accepted in any position.
            generator: for the noises that a stochastic plan draws.
            eta, other: must equal the values that the plan was captured with (or their defaults); None is ignored, and
                so are 0 and False for arguments unknown to the plan.

        Returns:
            SchedulerOutput(prev_sample), or (prev_sample, prev_sample): a new tensor of sample's dtype and shape. The
            former computes `pred_original_sample` when read; pipelines of consistency models decode the second of the
            latter after the last step, where it is the clean image.

        Raises:
            InputError: no set_timesteps, more steps than planned, another shape or device than the run began with, a
                first timestep that is not in the plan.
            NetworkError: an output of another shape or device, or (on the CPU, at the last step) a non-finite one.
        """
        if positional:
            named = {"generator": generator, "return_dict": return_dict, "eta": eta, **other}
            named |= self._chosen().expected.named(positional)
            return self.step(model_output, timestep, sample, **named)
        previous = other.pop("prev_timestep", None)
        session = self._sessions.at(timestep, sample)
        if eta is not None or other:
            self._chosen().expected.check({"eta": eta, **other})
        run = session.run
        if run is None or run.step == 0:
            run = self._start(session, timestep, sample)
        if previous is not None:
            self._check_previous(previous, session.next + 1)
        row = session.returned = run.advance(model_output, sample, generator)
        compiled = torch.compiler.is_compiling()
        if run.step == run.steps and run.readable and not compiled and not torch.isfinite(row).all():
            self.require_finite()
        if not return_dict:
            return row, row
        return SchedulerOutput(row) if compiled else StepOutput(row, (run.layout, run.step - 1, sample, model_output))

    def require_finite(self) -> None:
        """NetworkError naming the first output of this run with NaN or infinity. Synchronises with the device."""
        session = self._session
        first = None if session.run is None or session.run.step == 0 else session.run.first_not_finite()
        if first is None:
            return
        if first < 0:
            raise NetworkError("the sample that this run began with holds a NaN or an infinity; look at the latents")
        index = first + session.offset
        raise NetworkError(
            f"the network's output at step {index} (timestep {self.timesteps[index].item():g}) holds a NaN or an "
            "infinity; half precision that overflows is the usual cause: run the network in float32 or bfloat16"
        )

    def _start(self, session: Session, timestep: Any, sample: Tensor) -> Run:
        """A run from the first timestep passed."""
        class_name = self._chosen().class_name
        self._find_start(session, timestep)
        session.check_sigmas()
        assert session.layout is not None
        session.run = Run(session.layout, sample, _noise_dtype(class_name, sample))
        return session.run

    def _find_start(self, session: Session, timestep: Any) -> None:
        """Loads the plan of a run that begins at the index of `set_begin_index`, else at this timestep."""
        index = session.begin_index
        if index is None:
            index = first_index(timestep, self.timesteps, self._chosen().timesteps)
        if index != session.offset:
            self._begin_at(session, index)

    def _begin_at(self, session: Session, index: int) -> None:
        """Loads the plan for a run that begins at this index of `timesteps`."""
        assert session.entry is not None
        session.layout = self._book.begun_at(session.entry, index).ready_on(self.timesteps.device)
        session.offset = index

    def _stands_for(self) -> Mapping[str, Any] | None:
        """The config of the scheduler that the plan was captured from, else of the network's."""
        plan = self.plans[0] if (entry := self._session.entry) is None else entry.plan
        facts = captured_facts(plan)
        return facts.network_config if facts else self._book.network

    def _check_previous(self, told: Any, index: int) -> None:
        """`prev_timestep` of UnCLIPScheduler must be the next timestep, as in every plan."""
        found = places(told, self.timesteps, self._chosen().timesteps)
        if found is not None and index not in found:
            raise InputError(
                f"step {index - 1} was asked to go to prev_timestep={quoted(told)}; the plan goes to its next timestep"
            )


def _noise_dtype(kind: str, sample: Any) -> torch.dtype | None:
    """The dtype in which scheduler class `kind` draws noise; None for the model output's. Another gives other noise."""
    wide = kind == "FlowMatchLCMScheduler" and getattr(sample, "dtype", None) != torch.float64  # else float64 itself
    return torch.float32 if wide or kind in DRAWS_FLOAT32 else None


def _shape(tensor: Any) -> Any:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
