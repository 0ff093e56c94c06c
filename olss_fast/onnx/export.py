"""`olss_fast.export_onnx`: network, guidance and plan as one ONNX model, for ONNX Runtime and others.

    how = {"conditioning": {"y": y}, "unconditional": {"y": null}, "guidance_scale": 3.0}
    olss_fast.export_onnx(network, plan, "five.onnx", shape=noise.shape, **how)
    (images,) = onnxruntime.InferenceSession("five.onnx").run(["sample"], {"noise": noise.numpy(), "y": y.numpy()})

The model's inputs are

| name | shape | |
|---|---|---|
| noise | (batch, …) | unit Gaussian, of the network's dtype |
| step_noise | (Z, batch, …) | float32, fresh unit noises; for stochastic plans only |
| the network's arguments by name | (batch, …), or as given | nested ones joined by dots: "added.text_embeds" |
| unconditional.NAME | (1, …) | optional; used for every sample in the unconditional half |
| guidance_scale | () | optional; float32, or float64 for float64 networks |

and its output is `sample` (batch, …), in the network's dtype. The batch size is free; all other sizes are fixed at
export. A Loop calls the network NFE times, by the plan's tables. They are the initialisers `plan.rows`,
`plan.timesteps`, `plan.columns` and `plan.nfe`: a longer plan does not make the graph larger. Weights keep their names
in the network's state_dict. The model's metadata holds that of the plan and the version of olss_fast.

Values are not checked: NaN or infinity propagates to the sample.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from olss_fast.compiling.export import export
from olss_fast.compiling.quiet import quiet, shortened
from olss_fast.compiling.request import Request, checked_request
from olss_fast.compiling.shapes import LARGEST, Profile
from olss_fast.errors import BuildError, InputError, ModelError
from olss_fast.network import Conditioning
from olss_fast.plan.plan import Plan, checked_plan
from olss_fast.sampling.old_forms import takes_old_forms

if TYPE_CHECKING:
    import onnx_ir

PACKAGES = ("onnx", "onnx_ir", "onnxscript")
RESERVED = {"noise", "step_noise", "guidance_scale", "unconditional", "sample"}  # the model's own inputs and output


@takes_old_forms
def export_onnx(
    network: torch.nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Write the whole sampler as one ONNX model to `path`.

    Args:
        network: `network(x, timestep, **conditioning)` as for `olss_fast.sample`, in evaluation mode. Not changed.
        plan: any Plan of a single network.
        shape: (B, …) of the noise that matches `conditioning`. The model takes any batch size.
        conditioning: the network's other arguments. A tensor whose first size is B is per sample and becomes an input
            (batch, …), any other tensor an input of its own shape. Values that are not tensors are baked in.
        unconditional: as for `sample`; one row, or identical rows. The network then always gets both halves in one
            doubled batch.
        guidance_scale: the model's default. Default: the scale the plan was tuned at, else 1.

    Weights that do not fit in one file (2 GB) go to a second file beside it, `<name>.<digest>.data`. Both files are
    written atomically, the model last.

    Raises:
        InputError: inconsistent arguments. NetworkError: the network cannot be called with them.
        BuildError: required packages are missing, or the network cannot be expressed in ONNX.
        ModelError: the file cannot be written.
    """
    _check_plan(plan)
    _check_path(path)
    _check_packages()
    sizes = Profile.of(shape).opt
    profile = Profile((1, *sizes[1:]), sizes, (LARGEST, *sizes[1:]))
    given = (conditioning, unconditional, guidance_scale)
    request = checked_request(network, {"plan": plan}, profile, *given, reserved=RESERVED)

    from olss_fast.onnx.file import save
    from olss_fast.onnx.loop import loop_model

    save(loop_model(_one_call(request), plan, request), path)


# --- checks, before any work -----------------------------------------------------------------------------------------


def _check_plan(plan: Any) -> None:
    if checked_plan(plan).models.any():
        asked = sorted({*plan.models.tolist()})
        raise InputError(f"the plan asks the networks {asked}; expected a plan that asks one, number 0")


def _check_path(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path is a {type(path).__name__}; expected the path of a file to write")
    target = Path(path)
    if target.is_dir():
        raise ModelError(f"cannot write {target}: it is a folder; give the path of a file")
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {target}: {target.parent} is not a folder; create it first")


def _check_packages() -> None:
    try:
        for package in PACKAGES:
            importlib.import_module(package)
    except ImportError as cause:
        needed = ", ".join(PACKAGES)
        raise BuildError(f"the export needs the packages {needed} ({cause}): pip install 'olss-fast[onnx]'") from cause


# --- one call of the network as a graph ------------------------------------------------------------------------------


def _one_call(request: Request) -> onnx_ir.Model:
    exported = export(request.flat, request.inputs(2), request.per_sample, request.profile, request.doubled)
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except Exception as cause:
        raise BuildError(f"the network cannot be expressed in ONNX: {shortened(_root(cause))}") from cause
    assert program is not None
    return program.model


def _root(cause: BaseException) -> BaseException:
    """The root cause: the exporter wraps errors in pages of advice."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return cause
