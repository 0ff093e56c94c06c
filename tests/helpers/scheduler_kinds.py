"""What every scheduler class that can be captured takes: prediction types, timestep spacings, numbers of steps."""

from __future__ import annotations

from typing import Any, NamedTuple

ALL = ("epsilon", "sample", "v_prediction")
NOT_SAMPLE = ("epsilon", "v_prediction")
WITH_FLOW = (*ALL, "flow_prediction")
SPACINGS = ("linspace", "leading", "trailing")
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
