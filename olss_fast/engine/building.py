"""`build`: a network and plans made an engine."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from olss_fast._device import pick_device
from olss_fast.engine import cache as code_cache
from olss_fast.engine import machine, manifest
from olss_fast.engine.arguments import FlatNetwork, flatten, require_names
from olss_fast.engine.compiled import SETTINGS, compile_code, export, graph_text, hash_code, weight_name
from olss_fast.engine.container import VERSION
from olss_fast.engine.engine import Engine, warm_up
from olss_fast.engine.manifest import BATCH, DTYPES, FORMAT, NOTICE
from olss_fast.engine.shapes import Profile
from olss_fast.engine.weights import hash_weights, strides_of, to_blob
from olss_fast.errors import BuildError, InputError
from olss_fast.network import Conditioning, Denoiser, require_finite
from olss_fast.plan import Plan
from olss_fast.plan_io import plan_to_bytes
from olss_fast.sampling import check_plan_fits, network_dtype

# How far the compiled network may be from the one that it was compiled from, relative to the largest output.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
RESERVED = {"noise", "steps", "plan", "guidance_scale", "unconditional", "generator"}  # arguments of an engine's call
TIMED_CALLS = 5


def build(
    network: nn.Module,
    plan: Plan | Sequence[Plan] | Mapping[str, Plan],
    *,
    shapes: Profile | Sequence[int],
    example: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
    cache: bool | Path | str = True,
    progress: bool = True,
) -> Engine:
    """An engine: `network` compiled ahead of time for this machine, with its weights and with one or several plans.

    Args:
        network: `network(x, timestep, **conditioning)` as for `olss_fast.sample`, in evaluation mode. Not changed.
        plan: a Plan, several, or several by name. An engine runs them all, and any other: no plan is compiled in.
        shapes: the noise (B, …) that it is for: a Profile, or one fixed shape.
        example: conditioning at the profile's `opt`: a tensor whose first size is that B belongs to the samples;
            every other size is fixed. What is no tensor is baked in.
        unconditional: as for `olss_fast.sample`; one row, or rows that are all the same. Kept in the file as the
            default. Such an engine always asks the network about both halves.
        guidance_scale: the default of calls. Default: what the plan was tuned at, else 1.
        dtype, device: default: those of the network's parameters.
        options: of Inductor, such as {"max_autotune": True}.
        cache: whether, or in which folder, compiled code is kept for the next build of a network of this structure.

    Raises:
        InputError: arguments that do not fit each other. NetworkError: the network's output.
        BuildError: it cannot be exported or compiled, or what was compiled computes something else.
    """
    plans = _named_plans(plan)
    request = _request(network, plans, Profile.of(shapes), example, unconditional, guidance_scale, dtype, device)
    with _stages(progress) as stage:
        stage("export")
        exported = export(request.flat, request.inputs(2), request.per_sample, request.profile, request.doubled)
        stage("compile")
        code, seconds = _code(exported, request, dict(options or {}), cache)
        stage("load")
        constants = {**exported.state_dict, **exported.constants}
        weights = {weight_name(name): each.detach().clone() for name, each in constants.items() if _stored(each)}
        engine = _engine(request, plans, code, weights, {"seconds_to_compile": seconds})
        stage("check")
        return _measured(engine, request)


@dataclass(frozen=True)
class _Request:
    """What is built, all of it checked. tensors: the example's, by name, `unconditional` alike, of one row each."""

    flat: FlatNetwork
    profile: Profile
    tensors: dict[str, Tensor]
    unconditional: dict[str, Tensor]
    fixed: dict[str, str]
    doubled: bool
    guidance_scale: float
    dtype: torch.dtype
    device: torch.device
    time: float

    @property
    def per_sample(self) -> list[bool]:
        return [_is_per_sample(each, self.profile) for each in self.tensors.values()]

    def inputs(self, least: int = 1) -> list[Tensor]:
        """x, time and the example's tensors, as the network sees them at `opt`; of a batch that is not fixed at least
        `least` samples, since one is a special case for torch.export."""
        samples = max(self.profile.opt[0], least if 0 in self.profile.dynamic else 1)
        batch = samples * (1 + self.doubled)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((batch, *self.profile.opt[1:]), generator=generator).to(self.device, self.dtype)
        time = torch.full((batch,), self.time, device=self.device)
        rest = [
            _repeated(each, batch) if own else each
            for each, own in zip(self.tensors.values(), self.per_sample, strict=True)
        ]
        return [x, time, *rest]


def _request(
    network: nn.Module,
    plans: Mapping[str, Plan],
    profile: Profile,
    example: Conditioning | None,
    unconditional: Conditioning | None,
    guidance_scale: float | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> _Request:
    if not isinstance(network, nn.Module) or network.training:
        what = "in training mode" if isinstance(network, nn.Module) else f"a {type(network).__name__}"
        raise InputError(f"network is {what}; expected a torch.nn.Module in evaluation mode: wrap it, or call .eval()")
    first = next(iter(plans.values()))
    scale = _scale(first, unconditional, guidance_scale)
    given = _on_device(require_names(example, "example"), device := _device(network, device))
    if RESERVED & set(given):
        raise InputError(
            f"the network's argument {sorted(RESERVED & set(given))} has the name of one of an engine's call"
        )
    denoiser = Denoiser(
        network, samples=profile.opt[0], conditioning=given, unconditional=unconditional, guidance_scale=scale
    )
    for each in plans.values():
        check_plan_fits(each, denoiser)
        if each.branches == 2 and unconditional is None:
            raise InputError("a plan keeps the unconditional and the conditional output apart: pass unconditional")
    dtype = _dtype(network, dtype)
    flat, without = flatten(given), flatten(unconditional or {})
    for name in sorted(set(flat) & set(without)):
        if not isinstance(flat[name], Tensor) and flat[name] != without[name]:
            raise InputError(f"conditioning and unconditional differ in {name!r}, which is no tensor: it is baked in")
    tensors = {name: each for name, each in flat.items() if isinstance(each, Tensor)}
    request = _Request(
        flat=FlatNetwork(_prepared(network, dtype, device), given),
        profile=profile,
        tensors=tensors,
        unconditional=_one_row(tensors, without, profile, device),
        fixed={name: repr(each)[:200] for name, each in flat.items() if not isinstance(each, Tensor)},
        doubled=unconditional is not None,
        guidance_scale=scale,
        dtype=dtype,
        device=device,
        time=float(first.timesteps[0]),
    )
    with torch.no_grad():  # a network that cannot be called is found before minutes are spent on it
        require_finite(request.flat(*request.inputs())[None], step=0, first_sample=0)
    return request


def _code(
    exported: torch.export.ExportedProgram, request: _Request, options: dict[str, Any], cache: bool | Path | str
) -> tuple[dict[str, bytes], float]:
    """The code and the seconds that it took to compile, from the cache where it is there."""
    folder = code_cache.default_folder() if cache is True else Path(cache) if cache else None
    key = code_cache.key_of(
        {
            "graph": graph_text(exported),
            "strides": strides_of(exported.state_dict),
            "inputs": [[str(each.dtype), list(each.stride())] for each in request.inputs()[2:]],
            "settings": repr(sorted({**options, **SETTINGS}.items())),
            "versions": machine.versions(),
            "machine": machine.describe(str(request.device)),
            "format": VERSION,
        }
    )
    found = code_cache.load(folder, key) if folder is not None else None
    if found is not None:
        return found
    begin = time.perf_counter()
    code = compile_code(exported, options)
    seconds = time.perf_counter() - begin
    if folder is not None:
        code_cache.store(folder, key, code, seconds)
    return code, seconds


def _engine(
    request: _Request, plans: Mapping[str, Plan], code: dict[str, bytes], weights: dict[str, Tensor], measured: Any
) -> Engine:
    """The engine with a manifest that says all but what running it will tell."""
    facts: dict[str, Any] = {
        "sha256": "0" * 64,
        "format": FORMAT,
        "version": VERSION,
        "notice": NOTICE,
        "built_with": machine.versions(),
        "machine": machine.describe(str(request.device)),
        "network": type(request.flat.network).__name__,
        "dtype": str(request.dtype).removeprefix("torch."),
        "profile": request.profile.to_dict(),
        "doubled": request.doubled,
        "guidance_scale": request.guidance_scale,
        "inputs": [_described(name, each, request.profile) for name, each in request.tensors.items()],
        "fixed": request.fixed,
        "plans": [_plan_facts(name, each) for name, each in plans.items()],
        "strides": {},
        "unused": [],
        "hashes": {"weights": "", "code": hash_code(code)},
        "measured": measured,
    }
    engine = Engine(manifest.parse(facts), plans, code, weights, request.unconditional, request.device)
    facts["unused"] = sorted(set(request.flat.network.state_dict()) - set(engine.weights))
    facts["strides"] = strides_of(engine.weights)
    facts["hashes"]["weights"] = hash_weights({name: to_blob(each) for name, each in engine.weights.items()})
    return engine


def _measured(engine: Engine, request: _Request) -> Engine:
    """The engine, if its network computes what the one that it was compiled from does; with figures in its manifest."""
    inputs = request.inputs()
    with torch.no_grad():
        expected = request.flat(*inputs).double()
        found = engine.network(*inputs).double()
        difference = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= TOLERANCE[engine.manifest.dtype] * max(largest, 1e-30):
        raise BuildError(
            f"the compiled network differs from the original by {difference:.3g} where the largest output is "
            f"{largest:.3g}; expected at most {TOLERANCE[engine.manifest.dtype]:g} of that: is it random, or does it "
            "change its weights?"
        )
    warm_up(engine)
    seconds = statistics.median(_timed(engine, inputs) for _ in range(TIMED_CALLS))
    engine.manifest.facts["measured"].update(
        {"milliseconds_per_network_call": 1e3 * seconds, "largest_difference": difference, "largest_output": largest}
    )
    return engine


def _timed(engine: Engine, inputs: list[Tensor]) -> float:
    on_gpu = engine.device.type == "cuda"
    begin = time.perf_counter()
    engine.network(*inputs)
    if on_gpu:
        torch.cuda.synchronize(engine.device)
    return time.perf_counter() - begin


@contextmanager
def _stages(progress: bool) -> Iterator[Any]:
    with tqdm(total=4, desc="Building", unit="stage", disable=not progress, delay=0.5) as bar:
        begun: list[str] = []

        def stage(name: str) -> None:
            bar.update(1 if begun else 0)
            begun.append(name)
            bar.set_description(f"Building: {name}")

        yield stage
        bar.update(1)


# --- the request ---------------------------------------------------------------------------------------------------


def _named_plans(plan: Any) -> dict[str, Plan]:
    """By name. Plans without a name are called by their method and NFE."""
    if isinstance(plan, Mapping):
        named = dict(plan)
    else:
        named = {}
        for each in [plan] if isinstance(plan, Plan) else list(plan) if isinstance(plan, Sequence) else []:
            base = _plan_name(each)
            copies = sum(re.fullmatch(re.escape(base) + r"(\.\d+)?", name) is not None for name in named)
            named[base if copies == 0 else f"{base}.{copies + 1}"] = each
    if not named or not all(isinstance(each, Plan) for each in named.values()):
        raise InputError(f"plan is {plan!r}; expected a Plan, several, or several by name")
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.+-]{1,100}", name) for name in named):
        raise InputError(f"the plans are named {list(named)}; expected names of letters, digits and . + - _")
    return named


def _plan_name(plan: Any) -> str:
    if not isinstance(plan, Plan):
        raise InputError(f"plan holds a {type(plan).__name__}; expected Plans")
    return re.sub(r"[^\w.+-]+", "-", f"{plan.metadata.get('method', 'plan')}-{plan.nfe}")[:80]


def _plan_facts(name: str, plan: Plan) -> dict[str, Any]:
    import hashlib

    digest = hashlib.sha256(plan_to_bytes(plan)).hexdigest()
    return {"name": name, "nfe": plan.nfe, "branches": plan.branches, "noises": plan.noises, "sha256": digest}


def _scale(plan: Plan, unconditional: Conditioning | None, guidance_scale: float | None) -> float:
    if guidance_scale is not None:
        return guidance_scale
    return float(plan.metadata.get("guidance_scale", 1.0)) if unconditional is not None else 1.0


def _device(network: nn.Module, device: torch.device | str | None) -> torch.device:
    own = next((each.device for each in network.parameters()), torch.device("cpu"))
    return pick_device(own if device is None else device)


def _dtype(network: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    chosen = network_dtype(network, torch.float32) if dtype is None else dtype
    if str(chosen).removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype is {chosen!r}; expected one of {', '.join(DTYPES)} of torch")
    return chosen


def _prepared(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network itself, or a copy of it where it has another dtype or lies elsewhere."""
    tensors = [*network.parameters(), *network.buffers()]
    fits = all(each.device == device and (not each.is_floating_point() or each.dtype == dtype) for each in tensors)
    return network if fits else copy.deepcopy(network).to(device=device, dtype=dtype)


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device).contiguous()
    if isinstance(value, Mapping):
        return {key: _on_device(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_on_device(each, device) for each in value])
    return value


def _is_per_sample(value: Tensor, profile: Profile) -> bool:
    return value.ndim > 0 and value.shape[0] == profile.opt[0]


def _repeated(value: Tensor, batch: int) -> Tensor:
    """Its rows, in turn, as many as `batch`."""
    return value[torch.arange(batch, device=value.device) % value.shape[0]]


def _one_row(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any], profile: Profile, device: torch.device
) -> dict[str, Tensor]:
    """The default unconditional arguments: one row for every sample, in the form of the example's tensors."""
    return {name: _row(name, given[name], each, profile, device) for name, each in tensors.items() if name in given}


def _row(name: str, value: Any, like: Tensor, profile: Profile, device: torch.device) -> Tensor:
    shape = (1, *like.shape[1:]) if _is_per_sample(like, profile) else tuple(like.shape)
    plain = torch.as_tensor(value).to(device, like.dtype)
    try:
        whole = plain.expand(like.shape)
    except RuntimeError as error:
        raise InputError(
            f"unconditional[{name!r}] has shape {tuple(plain.shape)}; expected one that stands for {tuple(like.shape)}"
        ) from error
    first = whole[:1] if _is_per_sample(like, profile) else whole
    if not torch.equal(whole, first.expand(whole.shape)):
        raise InputError(f"the rows of unconditional[{name!r}] differ; expected one row that stands for every sample")
    return first.reshape(shape).clone(memory_format=torch.contiguous_format)


def _described(name: str, value: Tensor, profile: Profile) -> dict[str, Any]:
    shape: list[Any] = list(value.shape)
    if _is_per_sample(value, profile):
        shape[0] = BATCH
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def _stored(value: object) -> bool:
    return isinstance(value, Tensor)
