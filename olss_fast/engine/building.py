"""`build`: an engine from a network and plans."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from olss_fast.compiling.export import export, graph_text
from olss_fast.compiling.request import Request, checked_request, is_per_sample, named_plans
from olss_fast.compiling.shapes import Profile
from olss_fast.engine import cache as code_cache
from olss_fast.engine import machine, manifest
from olss_fast.engine.compiled import SETTINGS, compile_code, hash_code, weight_name, with_layout
from olss_fast.engine.engine import Engine, warm_up
from olss_fast.engine.manifest import BATCH, FORMAT, NOTICE
from olss_fast.engine.verifying import plan_facts
from olss_fast.engine.weights import hash_weights, strides_of, to_blob
from olss_fast.errors import BuildError, EngineFileError, InputError
from olss_fast.network import Conditioning
from olss_fast.plan.file import plan_to_bytes
from olss_fast.plan.plan import Plan
from olss_fast.sampling.old_forms import takes_old_forms
from olss_fast.support.device import timed
from olss_fast.support.identity import structure
from olss_fast.support.progress import bar_options

# Largest difference of the compiled network from the original, relative to the largest output.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
SLACK = 10.0  # what code from the cache may be further from its network than it was from the one before
TINY = 1e-30
CHECKED_TIMES = 8  # of the first plan, at most, at which both are asked
TIMED_CALLS = 5

Facts = dict[str, Any]  # a manifest, as in a file


@takes_old_forms
def build(
    network: nn.Module,
    plan: Plan | Sequence[Plan] | Mapping[str, Plan],
    *,
    shapes: Profile | Sequence[int],
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance_scale: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
    cache: bool | Path | str = True,
    progress: bool = True,
) -> Engine:
    """An engine: `network` compiled ahead of time for this machine, with its weights and one or several plans.

    Args:
        network: `network(x, timestep, **conditioning)` as for `olss_fast.sample`, in evaluation mode. Not changed.
        plan: a Plan, several, or several by name. An engine runs these and any other: no plan is compiled in.
        shapes: of the noise (B, …): a Profile, or one fixed shape.
        conditioning: the network's other arguments, at the profile's `opt`: a tensor whose first size is that B is per
            sample; every other size is fixed. Values that are not tensors are baked in.
        unconditional: as for `olss_fast.sample`; one row, or identical rows. Kept in the file as the default. Such an
            engine always evaluates both halves.
        guidance_scale: the default of calls. Default: the scale the plan was tuned at, else 1.
        dtype, device: default: those of the network's parameters.
        options: of Inductor, such as {"max_autotune": True}.
        cache: whether, or in which folder, to keep compiled code for the next build of a network of this structure.

    Raises:
        InputError: inconsistent arguments. NetworkError: an unusable network output.
        BuildError: it cannot be exported or compiled, or the compiled network computes something else.
    """
    plans = named_plans(plan)
    request = checked_request(
        network, plans, Profile.of(shapes), conditioning, unconditional, guidance_scale, dtype, device
    )
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options is {options!r}; expected a mapping of Inductor's settings")
    settings = dict(options or {})
    if not isinstance(cache, (bool, str, os.PathLike)):
        raise InputError(f"cache is {cache!r}; expected True, False or a folder")
    folder = code_cache.default_folder() if cache is True else Path(cache) if cache else None
    with _stages(progress) as stage:
        stage("look for compiled code")
        facts = _facts(request, plans)
        name = _structure(request, facts, settings)
        known = _by_structure(request, plans, facts, folder, name)
        if known is not None:
            return known
        stage("export")
        exported = export(request.flat, request.inputs(2), request.per_sample, request.profile, request.doubled)
        stage("compile")
        key, code, seconds = _by_graph(request, facts, exported, settings, folder)
        stage("check")
        constants = {**exported.state_dict, **exported.constants}
        bound = TOLERANCE[str(request.dtype).removeprefix("torch.")]
        engine = _checked(_engine(request, plans, facts, code, constants, seconds), request, bound)
        measured = engine.manifest.facts["measured"]
        for each in (
            {name, _structure(request, facts, settings)} if folder is not None else ()
        ):  # a call may change the network's structure
            code_cache.point(folder, each, key, measured["largest_difference"] / max(measured["largest_output"], TINY))
        return engine


def _by_structure(
    request: Request, plans: Mapping[str, Plan], facts: Facts, folder: Path | None, name: str
) -> Engine | None:
    """The engine from cached code for a network of this structure, without tracing. None if there is none, or if it
    turns out not to match this network."""
    found = code_cache.follow(folder, name)
    if found is None:
        return None
    network = request.flat
    tensors = {**dict(network.named_buffers()), **network.state_dict()}
    code, seconds, difference = found
    bound = SLACK * (difference + torch.finfo(request.dtype).eps)
    try:
        return _checked(_engine(request, plans, facts, code, tensors, seconds), request, bound)
    except (BuildError, EngineFileError):
        return None


def _by_graph(
    request: Request,
    facts: Facts,
    exported: torch.export.ExportedProgram,
    settings: dict[str, Any],
    folder: Path | None,
) -> tuple[str, dict[str, bytes], float]:
    """The graph's key, its code, and the seconds of its compilation; from the cache if possible."""
    graph = {"graph": graph_text(exported), "strides": strides_of(exported.state_dict)}
    key = _key(request, facts, settings, graph)
    found = code_cache.load(folder, key)
    if found is not None:
        return key, *found
    begin = time.perf_counter()
    code = with_layout(compile_code(exported, settings), exported, manifest.compiled_for(facts))
    seconds = time.perf_counter() - begin
    code_cache.store(folder, key, code, seconds)
    return key, code, seconds


def _structure(request: Request, facts: Facts, settings: dict[str, Any]) -> str:
    flat = request.flat
    asked = {"network": flat.network, "form": flat.form, "lends_x": flat.lends_x}
    key = structure(asked, [*flat.network.parameters(), *flat.network.buffers()])
    return _key(request, facts, settings, {"structure": key, "fixed": request.fixed})


def _key(request: Request, facts: Facts, settings: dict[str, Any], about: Mapping[str, object]) -> str:
    """The cache key: of the facts `about` the network, and of everything else that code depends on."""
    example = [[str(each.dtype), list(each.shape), list(each.stride())] for each in request.inputs()]
    relied_on = {name: facts[name] for name in ("version", "built_with", "machine")}
    relied_on |= {"compiled_for": manifest.compiled_for(facts), "example": example}
    return code_cache.key_of({**about, **relied_on, "settings": repr(sorted({**settings, **SETTINGS}.items()))})


def _facts(request: Request, plans: Mapping[str, Plan]) -> Facts:
    """The part of the manifest that is known before compiling."""
    return {
        "sha256": "0" * 64,
        "format": FORMAT.name,
        "version": FORMAT.version,
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
        "plans": [plan_facts(name, each, plan_to_bytes(each)) for name, each in plans.items()],
        "strides": {},
        "unused": [],
        "tied": {},
    }


def _engine(
    request: Request,
    plans: Mapping[str, Plan],
    facts: Facts,
    code: dict[str, bytes],
    tensors: Mapping[str, Any],
    seconds: float,
) -> Engine:
    """The engine with a manifest that lacks only measurements. tensors: weights by their names in the exported code;
    the engine copies them."""
    weights = {weight_name(name): each.detach().clone() for name, each in tensors.items() if isinstance(each, Tensor)}
    hashes = {"weights": "", "code": hash_code(code)}
    facts = {**facts, "hashes": hashes, "measured": {"seconds_to_compile": seconds}}
    engine = Engine(manifest.parse(facts), plans, code, weights, request.unconditional, request.device)
    facts["tied"] = _tied(request.flat.network.state_dict(), list(engine.weights))
    facts["unused"] = sorted(set(request.flat.network.state_dict()) - set(engine.weights) - set(facts["tied"]))
    facts["strides"] = strides_of(engine.weights)
    facts["hashes"]["weights"] = hash_weights({name: to_blob(each) for name, each in engine.weights.items()})
    return engine


def _tied(state: Mapping[str, Tensor], used: list[str]) -> dict[str, str]:
    """Second names of weights that the code reads: name -> the name that it reads."""
    places = {_place(state[name]): name for name in used if name in state and state[name].numel()}
    rest = {name: each for name, each in state.items() if name not in used}
    return {name: places[_place(each)] for name, each in rest.items() if _place(each) in places}


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _checked(engine: Engine, request: Request, bound: float) -> Engine:
    """The engine, with measurements in its manifest. BuildError if its network differs from the original by more than
    `bound` times the largest output."""
    difference, largest = 0.0, 0.0
    for inputs in _checked_inputs(request):
        with torch.no_grad():  # each gets its own inputs, for networks that work in place
            found = engine.network(*[each.clone() for each in inputs]).double()
            expected = request.flat(*inputs).double()
        if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
            raise BuildError("the compiled network's output is not finite, or of another shape than the original's")
        difference = max(difference, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    if not difference <= bound * max(largest, TINY):
        raise BuildError(
            f"the compiled network differs from the original by {difference:.3g} where the largest output is "
            f"{largest:.3g}; expected at most {bound:.3g} of that: is it random, or does it change its weights?"
        )
    if engine.device.type == "cuda":
        warm_up(engine, request.tensors)
    inputs = request.inputs()
    seconds = statistics.median(timed(lambda: engine.network(*inputs), engine.device) for _ in range(TIMED_CALLS))
    figures = {"milliseconds_per_network_call": 1e3 * seconds}
    engine.manifest.facts["measured"].update(figures | {"largest_difference": difference, "largest_output": largest})
    return engine


def _checked_inputs(request: Request) -> Iterator[list[Tensor]]:
    """Inputs at `opt` and the first plan's timesteps, and at the ends of the profile: torch.export assumes that no
    dynamic size is one, which a network may treat differently."""
    for time_ in request.times[:: max(1, len(request.times) // CHECKED_TIMES)]:
        yield request.inputs(time=time_)
    for shape in sorted({request.profile.min, request.profile.max} - {request.profile.opt}):
        yield request.inputs(shape=shape)


@contextmanager
def _stages(progress: bool) -> Iterator[Callable[[str], object]]:
    """A progress bar over the stages of a build; the yielded function starts one."""
    with tqdm(total=4, desc="Building", bar_format="{desc} {bar:12} {elapsed}", **bar_options(progress)) as bar:

        def stage(name: str) -> None:
            bar.set_description(f"Building: {name:<22}", refresh=False)
            bar.update(1)

        yield stage
        bar.set_description(f"{'Built':<32}", refresh=False)
        bar.update(bar.total - bar.n)


def _described(name: str, value: Tensor, profile: Profile) -> dict[str, Any]:
    shape: list[Any] = list(value.shape)
    if is_per_sample(value, profile):
        shape[0] = BATCH
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
