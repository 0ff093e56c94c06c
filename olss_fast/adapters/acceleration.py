"""`olss_fast.accelerate`: the denoising loop of a diffusers pipeline as one call.

The pipeline is shown a schedule of one timestep. When it asks its network there, the whole loop is run, with the
arguments it gave (prompt embeddings and all) and its guidance scale, by the fused or the graph executor; what it does
then with the output has no effect, and its scheduler's step hands out the finished latents.

So callbacks are called once, at the end. This is done for text-to-image Stable Diffusion and SDXL, and for DDPM and
DDIM pipelines of a UNet2DModel. Every other pipeline gets the plan as a `PlanScheduler`, which runs it step by step;
so does a call that needs more than guidance of the outputs (`guidance_rescale`), that is cut (`denoising_end`), or
whose plan draws fresh noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from olss_fast.adapters.pipeline_check import check_slot
from olss_fast.adapters.plan_scheduler import PlanScheduler
from olss_fast.errors import InputError
from olss_fast.executors.fused import Ask
from olss_fast.executors.graph import require_cuda
from olss_fast.executors.loops import Loops, Stats
from olss_fast.plan import Plan

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDPMPipeline", "DDIMPipeline")
BACKENDS = ("auto", "fused", "graph")


class LoopScheduler(PlanScheduler):
    """A PlanScheduler that shows one timestep, whose step hands out the samples that `Acceleration` made there."""

    handle: Acceleration | None = None
    stepwise: Callable[[], bool] = staticmethod(lambda: True)  # whether this call has to be run step by step
    whole = False
    sample: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **other: Any,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu, **other)
        entry, self.sample = self._chosen(), None
        self.whole = not self.stepwise() and entry.begin == 0 and entry.plan.noises == 0
        if self.whole:
            self.timesteps = self.timesteps[:1]

    def set_begin_index(self, begin_index: int = 0) -> None:
        if self.whole and begin_index:
            raise InputError(f"an accelerated pipeline begins at the beginning, got begin index {begin_index}")
        super().set_begin_index(begin_index)

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
        named = {"generator": generator, "return_dict": return_dict, "eta": eta, **other}
        if positional or not self.whole:
            return super().step(model_output, timestep, sample, *positional, **named)
        self._check_arguments(eta, other)
        if self.sample is None:
            raise InputError("the pipeline came to its scheduler's step without a call of its unet")
        finished, self.sample, self.whole = self.sample, None, False
        return Finished(finished) if return_dict else (finished, finished)


# Saved and loaded as what it is to everybody else.
LoopScheduler.__name__ = LoopScheduler.__qualname__ = "PlanScheduler"


class Finished:
    """The output of a network or a scheduler, by both names."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = self.prev_sample = sample


class Acceleration:
    """What `accelerate` did to a pipeline. `stats()` as of `Sampler`; `restore()` takes it back."""

    def __init__(self, pipe: Any, plans: Plan | Sequence[Plan], backend: str, check: bool) -> None:
        check_slot(pipe)
        if isinstance(pipe.scheduler, LoopScheduler) and pipe.scheduler.handle is not None:
            pipe.scheduler.handle.restore()
        self.pipe, self.original = pipe, pipe.scheduler
        self.reason = ""
        self.loops: Loops | None = None
        if type(pipe).__name__ not in PIPELINES:
            self.reason = f"{type(pipe).__name__} runs step by step: only {', '.join(PIPELINES)} can be made one call"
            warnings.warn(self.reason, stacklevel=3)
            pipe.scheduler = PlanScheduler.from_pipe(pipe, plans, check=check)
            return
        device = torch.device(pipe.device)
        if backend == "graph":
            require_cuda(device)
        chosen = ("graph" if device.type == "cuda" else "fused") if backend == "auto" else backend
        self.unet = pipe.unet
        self.loops = Loops([self.unet], chosen)
        self.forward = self.unet.forward
        self.before = {name: value for name, value in vars(self.unet).items() if name == "forward"}
        scheduler: Any = LoopScheduler.from_pipe(pipe, plans, check=check)
        scheduler.stepwise, scheduler.handle = self._stepwise, self
        self.scheduler = pipe.scheduler = scheduler
        self.unet.forward = self._whole_loop

    def restore(self) -> None:
        """The pipeline's own scheduler and network again."""
        self.pipe.scheduler = self.original
        if self.loops is not None:
            own = vars(self.unet)  # a compiled module has a forward of its own there, others their class's
            own.pop("forward", None)
            own.update(self.before)
            self.loops = None

    def _stepwise(self) -> bool:
        """Whether the pipeline's present call needs its loop: outputs that are rescaled, a run that is cut."""
        pipe = self.pipe
        return getattr(pipe, "_guidance_rescale", 0.0) > 0.0 or getattr(pipe, "_denoising_end", None) is not None

    def require_finite(self) -> None:
        """NetworkError that names the first evaluation of the last run that was not finite. Waits for the device."""
        if self.loops is not None:
            self.loops.require_finite()

    def stats(self) -> Stats:
        if self.loops is None:
            return Stats("PlanScheduler", 0, 0, self.reason, 0, None)
        return self.loops.stats()

    def _whole_loop(self, sample: Tensor, timestep: Any, *args: Any, **arguments: Any) -> Any:
        """Stands in for the network's forward: runs the whole loop where the pipeline asks for its one timestep."""
        scheduler, loops = self.scheduler, self.loops
        if loops is None or self.pipe.scheduler is not scheduler or not scheduler.whole or scheduler.sample is not None:
            return self.forward(sample, timestep, *args, **arguments)
        plan = scheduler._chosen().plan
        doubled = bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        noise = (sample.chunk(2)[0] if doubled else sample) / float(plan.rows[0, 0])
        finished = loops.run(
            plan,
            noise,
            [list(args), {**arguments, "return_dict": False}],
            self._asking,
            dtype=sample.dtype,
            device=sample.device,
            doubled=doubled,
            guidance_scale=float(self.pipe.guidance_scale) if doubled else 1.0,
        )
        scheduler.sample = finished
        return (sample,) if arguments.get("return_dict") is False else Finished(sample)

    def _asking(self, held: Any) -> Ask:
        args, arguments = held

        def ask(x: Tensor, time: Tensor, model: int) -> Tensor:
            output: Tensor = self.forward(x, time, *args, **arguments)[0]
            return output[:, : x.shape[1]]  # the rest is a predicted variance

        return ask


def accelerate(pipe: Any, plans: Plan | Sequence[Plan], *, backend: str = "auto", check: bool = True) -> Acceleration:
    """Make the denoising loop of `pipe` one call that runs `plans` (picked by `num_inference_steps`).

    For Stable Diffusion and SDXL (text-to-image), and DDPM and DDIM pipelines; others get a `PlanScheduler`, with a
    warning that says so. `backend` is "graph" (default on CUDA), "fused" or "auto". The result's `stats()` says what
    happens, its `restore()` takes it back.

    Raises:
        InputError: as `PlanScheduler.from_pipe`; an unknown backend, or a graph without a CUDA device.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    return Acceleration(pipe, plans, backend, check)
