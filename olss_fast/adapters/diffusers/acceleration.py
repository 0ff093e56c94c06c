"""`olss_fast.accelerate`: the denoising loop of a diffusers pipeline as one call.

An accelerated call runs on a temporary copy of the pipeline in which two components are replaced. The scheduler shows
one timestep; the network, when called there, runs the whole loop by the fused or the graph executor, with the arguments
it received (prompt embeddings and all) and the call's guidance scale. What the pipeline does with that output has no
effect, and the scheduler's step returns the finished latents.

The pipeline itself has the plan as a `PlanScheduler`, and its network is unchanged: threads do not interfere. A call
runs step by step if anything may matter between steps (also `guidance_rescale`, `denoising_end`, an unknown argument),
or if its plan draws fresh noise.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from olss_fast.adapters.diffusers.plan_scheduler import PlanScheduler
from olss_fast.adapters.diffusers.sessions import Session, Sessions
from olss_fast.adapters.diffusers.stand_in import check_slot
from olss_fast.errors import InputError
from olss_fast.executors.fused import Ask
from olss_fast.executors.graph import require_cuda
from olss_fast.executors.loop_cache import LoopCache, Stats, Work
from olss_fast.plan.plan import Plan
from olss_fast.support.tree import flat

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDPMPipeline", "DDIMPipeline")
BACKENDS = ("auto", "fused", "graph")
STEADY = frozenset(
    (
        *("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "num_images_per_prompt", "clip_skip"),
        *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        *("ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs", "guidance_scale"),
        *("original_size", "crops_coords_top_left", "target_size", "height", "width", "batch_size"),
        *("negative_original_size", "negative_crops_coords_top_left", "negative_target_size"),
        *("num_inference_steps", "timesteps", "sigmas", "eta", "use_clipped_model_output", "generator", "latents"),
        *("output_type", "return_dict", "callback_on_step_end_tensor_inputs", "callback_steps"),
    )
)
"""Arguments that a pipeline uses before its loop, after it, or the same at every step."""
WATCHED = {"step", "set_timesteps", "scale_model_input"}
"""Methods of a scheduler; a replaced one expects to see the steps."""


class LoopScheduler(PlanScheduler):
    """A PlanScheduler for one call that shows one timestep, and whose step returns the samples made there."""

    whole = False
    why_not = ""
    grid: Tensor  # all timesteps
    finished: Tensor | None = None

    @classmethod
    def of(cls, scheduler: PlanScheduler) -> LoopScheduler:
        """One with the plans of `scheduler` and a session of its own."""
        loop = cls.__new__(cls)
        vars(loop).update(vars(scheduler), _sessions=Sessions(Session(), torch.empty(0, device="cpu")))
        return loop

    @functools.wraps(PlanScheduler.set_timesteps)  # pipelines look at the signatures of both
    def set_timesteps(self, *args: Any, **named: Any) -> None:  # type: ignore[override]
        super().set_timesteps(*args, **named)
        entry, self.finished = self._chosen(), None
        self.why_not = "its plan draws fresh noise" if entry.plan.noises else ""
        if entry.begin:
            self.why_not = f"its plan begins at index {entry.begin}"
        self.whole = not self.why_not
        if self.whole:
            self.grid = self.timesteps
            self.timesteps = self.grid[:1].clone()

    @functools.wraps(PlanScheduler.step)
    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Any, sample: Tensor, *positional: Any, **named: Any
    ) -> Any:
        if positional or not self.whole:
            return super().step(model_output, timestep, sample, *positional, **named)
        return_dict = named.pop("return_dict", True)
        self._chosen().expected.check({name: value for name, value in named.items() if name != "generator"})
        if self.finished is None:
            raise InputError("the pipeline came to its scheduler's step without a call of its unet")
        finished, self.finished = self.finished, None
        return SimpleNamespace(prev_sample=finished) if return_dict else (finished, finished)


class LoopNetwork(torch.nn.Module):
    """Replaces `pipe.unet` in one call of the pipeline: runs the whole loop when called at its timestep."""

    def __init__(self, pipe: Any, loops: LoopCache) -> None:
        super().__init__()
        vars(self).update(pipe=pipe, network=pipe.unet, loops=loops)  # the network is no submodule: it is only used

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["network"], name)

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **arguments: Any) -> Any:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        if not scheduler.whole:
            return self.network(sample, timestep, *args, **arguments)
        plan = scheduler._chosen().plan
        doubled = bool(getattr(pipe, "do_classifier_free_guidance", False))
        work = Work(
            plan,
            (sample.chunk(2)[0] if doubled else sample) / float(plan.rows[0, 0]),
            flat([list(args), {**arguments, "return_dict": False}]),
            functools.partial(_asking, self.network),
            dtype=sample.dtype,
            device=sample.device,
            doubled=doubled,
            guidance_scale=float(pipe.guidance_scale) if doubled else 1.0,
        )
        scheduler.finished = self.loops.run(work)
        return (sample,) if arguments.get("return_dict") is False else SimpleNamespace(sample=sample)


def _asking(network: Any, held: Any) -> Ask:
    args, arguments = held

    def ask(x: Tensor, time: Tensor, model: int) -> Tensor:
        output: Tensor = network(x, time, *args, **arguments)[0]
        return output[:, : x.shape[1]]  # the rest is a predicted variance

    return ask


class Acceleration:
    """The result of `accelerate`. `stats()` as in `Sampler`; `restore()` undoes it."""

    def __init__(self, pipe: Any, plans: Plan | Sequence[Plan], backend: str, check: bool) -> None:
        check_slot(pipe)
        if (before := vars(pipe).get("_acceleration")) is not None:
            before.restore()
        self.pipe, self.original = pipe, pipe.scheduler
        self.kind: Any = pipe.__class__
        self.reasons: dict[str, None] = {}  # why calls ran step by step
        self.loops: LoopCache | None = None
        known = self.kind.__name__ in PIPELINES and self.kind is getattr(diffusers, self.kind.__name__)
        if known and backend == "graph":
            require_cuda(torch.device(pipe.device))
        self.scheduler = PlanScheduler.from_pipe(pipe, plans, check=check)
        pipe.scheduler = self.scheduler
        if not known:
            self._say(f"only {', '.join(PIPELINES)} can be made one call")
            return
        self.loops = LoopCache([pipe.unet], backend)
        vars(pipe)["_acceleration"] = self
        pipe.__class__ = _accelerated(self.kind)

    def restore(self) -> None:
        """Restores the pipeline's own scheduler and loop."""
        self.pipe.scheduler = self.original
        if vars(self.pipe).get("_acceleration") is self:
            del vars(self.pipe)["_acceleration"]
            self.pipe.__class__ = self.kind
        self.loops = None

    def require_finite(self) -> None:
        """NetworkError naming the first non-finite evaluation of this thread's last run. Synchronises the device."""
        if self.loops is not None:
            self.loops.require_finite()

    def stats(self) -> Stats:
        """Counters as in `Sampler.stats`, with the reasons why calls ran step by step."""
        reason = f"{self.kind.__name__} runs step by step: {'; '.join(self.reasons)}" if self.reasons else ""
        if self.loops is None:
            return Stats("PlanScheduler", 0, 0, reason, 0, None)
        stats = self.loops.stats()
        return replace(stats, reason="; ".join(each for each in (stats.reason, reason) if each))

    def call(self, *args: Any, **how: Any) -> Any:
        """The pipeline's call, as one run of the loop if nothing acts between steps."""
        pipe, run, loops = self.pipe, self.kind.__call__, self.loops
        if pipe.scheduler is not self.scheduler or loops is None:
            return run(pipe, *args, **how)
        if reason := self._needs_steps(args, how):
            self._say(reason)
            return run(pipe, *args, **how)
        if loops.networks[0] is not pipe.unet:
            self.loops = loops = LoopCache([pipe.unet], loops.backend)
        before, alone = dict(vars(pipe)), object.__new__(self.kind)
        scheduler = LoopScheduler.of(self.scheduler)
        vars(alone).update(before, scheduler=scheduler, maybe_free_model_hooks=pipe.maybe_free_model_hooks)
        vars(alone)["unet"] = LoopNetwork(alone, loops)
        lent = dict(vars(alone))
        try:
            return run(alone, *args, **how)
        finally:  # guidance_scale, num_timesteps and the like are read after a call too
            vars(pipe).update({name: value for name, value in vars(alone).items() if lent.get(name) is not value})
            if scheduler.whole:  # and so are the timesteps, of which one was shown
                self.scheduler._sessions.hold(scheduler._session.afresh(), scheduler.grid)
                if "_num_timesteps" in vars(pipe):
                    pipe._num_timesteps = len(scheduler.grid)
            vars(alone).clear()  # otherwise it and its network keep each other alive
            if scheduler.why_not:
                self._say(scheduler.why_not)

    def _needs_steps(self, args: Sequence[Any], how: Mapping[str, Any]) -> str:
        """Why this call has to run step by step; "" if it need not."""
        if WATCHED & vars(self.scheduler).keys():
            return "methods of its scheduler were replaced"
        signature = inspect.signature(self.kind.__call__)
        try:
            given = signature.bind(self.pipe, *args, **how).arguments
        except TypeError:
            return ""  # the pipeline says what is wrong
        given |= given.pop("kwargs", {})
        del given["self"]
        for name, value in given.items():
            if name not in STEADY and not _is_default(signature.parameters.get(name), value):
                return f"{name} may change something between two steps"
        return ""

    def _say(self, reason: str) -> None:
        """Warns, once per reason."""
        if reason not in self.reasons:
            self.reasons[reason] = None
            warnings.warn(f"{self.kind.__name__} runs step by step: {reason}", stacklevel=4)


def _is_default(parameter: inspect.Parameter | None, value: Any) -> bool:
    default = None if parameter is None else parameter.default
    return value is default or (isinstance(value, (int, float, str)) and bool(value == default))


@functools.cache
def _accelerated(kind: Any) -> Any:
    """A subclass of `kind` whose calls go to the pipeline's `Acceleration`; with the same name, which is saved."""

    @functools.wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **how: Any) -> Any:
        return vars(self)["_acceleration"].call(*args, **how)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {"__call__": __call__, **names})


def accelerate(pipe: Any, plans: Plan | Sequence[Plan], *, backend: str = "auto", check: bool = True) -> Acceleration:
    """Run the denoising loop of `pipe` as one call with `plans` (selected by `num_inference_steps`).

    For Stable Diffusion and SDXL (text-to-image), and DDPM and DDIM pipelines; others get a `PlanScheduler` and a
    warning, and so do calls with a callback or anything else that acts between two steps. Other pipelines built from
    the same components run step by step. Several threads may call the pipeline if prompts are embeddings: tokenizers
    are not thread-safe. An `interrupt` from outside comes too late for a call that is one run of the loop.

    `backend` is "graph" (default on CUDA), "fused" or "auto". The result has `stats()`, and `restore()` to undo it.

    Raises:
        InputError: as `PlanScheduler.from_pipe`; an unknown backend, or a graph without a CUDA device.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    return Acceleration(pipe, plans, backend, check)
