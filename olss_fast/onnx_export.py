"""`olss_fast.export_onnx`: network, guidance and plan as one ONNX model, for ONNX Runtime and its kin.

The model's inputs are

| name | shape | |
|---|---|---|
| noise | (batch, …) | unit Gaussian, of the network's dtype |
| step_noise | (Z, batch, …) | float32, fresh unit noises; of stochastic plans only |
| the network's arguments by name | (batch, …), or as they came | nested ones joined by dots: "added.text_embeds" |
| unconditional.NAME | (1, …) | may be left out: stands for every sample in the unconditional half |
| guidance_scale | () | may be left out; float32, or float64 for float64 networks |

and its output is `sample` (batch, …), in the network's dtype. The batch is free; all other sizes are those of the
export. A Loop calls the network as often as the plan's tables say. They are the initialisers `plan.rows`,
`plan.timesteps`, `plan.columns` and `plan.nfe`: a longer plan makes no larger graph. Weights keep the names that they
have in the network's state_dict. The model's metadata hold those of the plan, and the version of olss_fast.

No value is looked at: NaN or infinity goes through to the sample.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from olss_fast.engine.arguments import FlatNetwork, flatten, require_names
from olss_fast.errors import BuildError, InputError, ModelError, OlssError
from olss_fast.network import Conditioning, Denoiser
from olss_fast.plan import Plan
from olss_fast.sampling import check_plan_fits, network_dtype

if TYPE_CHECKING:
    from olss_fast._onnx_loop import Argument

PACKAGES = ("onnx", "onnx_ir", "onnxscript")
ROWS = "rows"  # the network's batch, which is twice the model's where it is doubled
RESERVED = {"noise", "step_noise", "guidance_scale", "sample"}


def export_onnx(
    network: torch.nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    example: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Write the whole sampler as one ONNX model to `path`.

    Args:
        network: `network(x, timestep, **conditioning)` as for `olss_fast.sample`, in evaluation mode. Not changed.
        plan: any Plan that asks one network.
        shape: (B, …) of the noise that `example` belongs to. The model takes any batch.
        example: the network's other arguments. A tensor whose first size is B belongs to the samples and becomes an
            input (batch, …), any other tensor an input of its own shape. What is no tensor is baked in.
        unconditional: as for `sample`; one row, or rows that are all the same. The network of such a model is always
            handed both halves, in one doubled batch.
        guidance_scale: what `guidance_scale` is if left out. Default: what the plan was tuned at, else 1.

    Weights beyond what fits into one file (2 GB) lie in a second one beside it, `<name>.<digest>.data`. Either file is
    written atomically, the model last.

    Raises:
        InputError: arguments that do not fit each other, or that the network cannot be called with.
        BuildError: packages that this needs are missing, or the network cannot be expressed in ONNX.
        ModelError: the file cannot be written.
    """
    _check_network(network)
    _check_plan(plan)
    sizes = _check_shape(shape)
    _check_path(path)
    _check_packages()
    scale = _scale(plan, unconditional, guidance_scale)
    denoiser = Denoiser(
        network,
        samples=sizes[0],
        conditioning=require_names(example, "example"),
        unconditional=unconditional,
        guidance_scale=scale,
    )
    check_plan_fits(plan, denoiser)
    doubled = unconditional is not None
    if plan.branches == 2 and not doubled:
        raise InputError("this plan keeps the unconditional and the conditional output apart: pass unconditional")
    arguments = _arguments(denoiser)
    flat = FlatNetwork(network, denoiser.conditioning)
    inputs = _inputs(network, plan, sizes, arguments, doubled=doubled)
    with torch.no_grad():
        _try(flat, inputs)
        program = _export(flat, inputs, [each.per_sample for each in arguments])

    from olss_fast._onnx_file import save
    from olss_fast._onnx_loop import loop_model

    save(loop_model(program, plan, arguments, sizes[1:], guidance_scale=scale if doubled else None), path)


# --- checks, before any work -----------------------------------------------------------------------------------------


def _check_network(network: Any) -> None:
    if not isinstance(network, torch.nn.Module) or network.training:
        what = "in training mode" if isinstance(network, torch.nn.Module) else f"a {type(network).__name__}"
        raise InputError(f"network is {what}; expected a torch.nn.Module in evaluation mode: wrap it, or call .eval()")


def _check_plan(plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise InputError(f"plan is a {type(plan).__name__}; expected a Plan")
    if plan.models.any():
        raise InputError(
            f"the plan asks the networks {sorted({*plan.models.tolist()})}; expected a plan of one network"
        )


def _check_shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"shape is {shape!r}; expected that of a batch of noise, (B, …), such as (2, 4, 64, 64)")
    return sizes


def _check_path(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path is a {type(path).__name__}; expected the path of a file to write")
    target = Path(path)
    if target.is_dir():
        raise ModelError(f"cannot write {target}: it is a folder; give the path of a file")
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {target}: {target.parent} is no folder; create it first")


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as cause:
            raise BuildError(
                f"ONNX export needs the package {package}, which cannot be imported ({cause}): "
                "pip install 'olss-fast[onnx]'"
            ) from cause


def _scale(plan: Plan, unconditional: Conditioning | None, guidance_scale: float | None) -> float:
    if guidance_scale is not None:
        return guidance_scale
    return float(plan.metadata.get("guidance_scale", 1.0)) if unconditional is not None else 1.0


# --- arguments of the network ----------------------------------------------------------------------------------------


def _arguments(denoiser: Denoiser) -> list[Argument]:
    """The tensors among the network's arguments, with what stands for them in the unconditional half."""
    from olss_fast._onnx_loop import Argument

    given = flatten(denoiser.conditioning)
    without = {} if denoiser.unconditional is None else flatten(denoiser.unconditional)
    _check_names(given)
    arguments = []
    for name, value in given.items():
        row = None
        if denoiser.unconditional is not None:
            if name not in without:
                raise InputError(f"unconditional lacks {name!r}; expected the same names as in example")
            row = _unconditional(name, without[name], value, denoiser.samples)
        if isinstance(value, Tensor):
            arguments.append(Argument(name, value, _per_sample(value, denoiser.samples), row))
    return arguments


def _check_names(given: Mapping[str, Any]) -> None:
    taken = sorted(name for name in given if name in RESERVED or name.split(".")[0] == "unconditional")
    if taken:
        raise InputError(
            f"the network's argument {taken[0]!r} has the name of one of the model's own inputs or outputs"
        )


def _per_sample(value: Tensor, samples: int) -> bool:
    return value.ndim > 0 and value.shape[0] == samples


def _unconditional(name: str, value: Any, given: Any, samples: int) -> Tensor | None:
    """One row (1, …) that stands for every sample, of `given`'s dtype; None for what belongs to no sample."""
    if not isinstance(given, Tensor):
        if isinstance(value, Tensor) or value != given:
            raise InputError(f"example and unconditional differ in {name!r}, which is no tensor: it is baked in")
        return None
    whole = _expanded(name, value, given)
    if not _per_sample(given, samples):
        if not torch.equal(whole, given):
            raise InputError(
                f"example and unconditional differ in {name!r}, whose first size is not that of the samples, "
                f"{samples}: one doubled batch cannot be handed both"
            )
        return None
    if not torch.equal(whole, whole[:1].expand(whole.shape)):
        raise InputError(f"the rows of unconditional[{name!r}] differ; expected one row that stands for every sample")
    return whole[:1]


def _expanded(name: str, value: Any, given: Tensor) -> Tensor:
    if not isinstance(value, (Tensor, bool, int, float)):
        raise InputError(f"unconditional[{name!r}] is a {type(value).__name__}; expected a tensor or a number")
    try:
        return torch.as_tensor(value).to(given).expand(given.shape)
    except RuntimeError as cause:
        raise InputError(
            f"unconditional[{name!r}] has shape {tuple(torch.as_tensor(value).shape)}, which does not broadcast to "
            f"that of example[{name!r}], {tuple(given.shape)}"
        ) from cause


# --- one call of the network as a graph ------------------------------------------------------------------------------


def _inputs(
    network: torch.nn.Module, plan: Plan, shape: Sequence[int], arguments: Sequence[Argument], *, doubled: bool
) -> list[Tensor]:
    """x, time and the arguments as the network sees them; at least two rows, since one is special to torch.export."""
    rows = max(2, shape[0] * (1 + doubled))
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    x = torch.randn((rows, *shape[1:]), generator=torch.Generator().manual_seed(0))
    time = torch.full((rows,), float(plan.timesteps[0]), device=device)
    rest = [_rows(each, rows).to(device) for each in arguments]
    return [x.to(device, network_dtype(network, torch.float32)), time, *rest]


def _rows(argument: Argument, rows: int) -> Tensor:
    if not argument.per_sample:
        return argument.given
    parts = [argument.given] if argument.unconditional is None else [argument.unconditional, argument.given]
    joined = torch.cat(parts)
    return joined[torch.arange(rows, device=joined.device) % len(joined)]


def _try(flat: FlatNetwork, inputs: Sequence[Tensor]) -> None:
    """What is wrong with the example shows in a plain call, and there has a better message than in a trace."""
    try:
        flat(*inputs)
    except OlssError:
        raise
    except Exception as cause:
        raise InputError(
            f"the network cannot be called with x of shape {tuple(inputs[0].shape)} and the example repeated to that "
            f"batch: {_shortened(cause)}"
        ) from cause


def _export(flat: FlatNetwork, inputs: Sequence[Tensor], per_sample: Sequence[bool]) -> Any:
    """The graph of one call (an onnx_ir.Model), for any number of rows."""
    from olss_fast.engine.compiled import quiet

    batch = {0: torch.export.Dim(ROWS)}
    rest = tuple(batch if own else {} for own in per_sample)
    dynamic = (batch, batch, rest) if rest else (batch, batch)
    try:
        with quiet():
            program = torch.onnx.export(flat, tuple(inputs), dynamo=True, dynamic_shapes=dynamic, verbose=False)
        return program.model  # type: ignore[union-attr]
    except Exception as cause:
        raise BuildError(f"the network cannot be expressed in ONNX: {_shortened(_root(cause))}") from cause


def _root(cause: BaseException) -> BaseException:
    """The exporter wraps what went wrong in pages of advice."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return cause


def _shortened(cause: BaseException) -> str:
    from olss_fast.engine.compiled import shortened

    return shortened(cause)
