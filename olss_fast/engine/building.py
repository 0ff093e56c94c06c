"""`build`: an engine from a network and plans."""

from __future__ import annotations

import json
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

from olss_fast.compiling.export import export
from olss_fast.compiling.request import Request, checked_request, named_plans
from olss_fast.compiling.shapes import Profile, name_of
from olss_fast.engine import cache as code_cache
from olss_fast.engine import machine, manifest
from olss_fast.engine.cache import Entry
from olss_fast.engine.compiled import SETTINGS, compile_code, weight_name, with_layout
from olss_fast.engine.engine import Engine, warm_up
from olss_fast.engine.manifest import FORMAT, NOTICE
from olss_fast.engine.verifying import plan_facts
from olss_fast.errors import BuildError, EngineFileError, InputError
from olss_fast.network import Conditioning
from olss_fast.plan.file import plan_to_bytes
from olss_fast.plan.plan import Plan
from olss_fast.sampling.old_forms import takes_old_forms
from olss_fast.support.device import timed
from olss_fast.support.identity import digest, structure
from olss_fast.support.progress import bar_options

# Largest difference of the compiled network from the original, relative to the largest output.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
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
        key = _key(request, facts, settings)
        found = None if folder is None else code_cache.load(folder, key)
        tensors = {**dict(request.flat.named_buffers()), **request.flat.state_dict()}
        if known := _known(request, plans, facts, found, tensors):
            return known
        stage("export")
        exported = export(request.flat, request.inputs(2), request.per_sample, request.profile, request.doubled)
        tensors = {**exported.state_dict, **exported.constants}
        if known := _known(request, plans, facts, found, tensors):  # now with tensors that the network never registered
            return known
        stage("compile")
        begin = time.perf_counter()
        code = with_layout(compile_code(exported, settings), exported, manifest.compiled_for(facts))
        seconds = time.perf_counter() - begin
        stage("check")
        engine = _checked(_engine(request, plans, facts, code, tensors, seconds), request, TOLERANCE[request.dtype])
        if folder is not None:
            measured = engine.manifest.facts["measured"]
            difference = measured["largest_difference"] / max(measured["largest_output"], TINY)
            for each in {key, _key(request, facts, settings)}:  # a call may change the network's structure
                code_cache.store(folder, each, Entry(code, seconds, difference))
        return engine


def _known(
    request: Request, plans: Mapping[str, Plan], facts: Facts, found: Entry | None, tensors: Mapping[str, Any]
) -> Engine | None:
    """The engine from cached code for a network of this structure. None if there is none, or if it turns out not to
    match this network, or to read more than these tensors."""
    if found is None:
        return None
    bound = min(TOLERANCE[request.dtype], SLACK * (found.difference + torch.finfo(request.dtype).eps))
    try:
        return _checked(_engine(request, plans, facts, found.code, tensors, found.seconds), request, bound)
    except (BuildError, EngineFileError):
        return None


def _key(request: Request, facts: Facts, settings: dict[str, Any]) -> str:
    """The cache key: of the network's structure, and of everything else that code depends on."""
    flat = request.flat
    asked = {"network": flat.network, "form": flat.form, "fixed": flat.fixed, "lends_x": flat.lends_x}
    key = structure(asked, [*flat.network.parameters(), *flat.network.buffers()])
    example = [[str(each.dtype), list(each.shape), list(each.stride())] for each in request.inputs()]
    relied_on = {name: facts[name] for name in ("version", "built_with", "machine", "fixed")}
    relied_on |= {"compiled_for": manifest.compiled_for(facts), "structure": key, "example": example}
    relied_on |= {"settings": repr(sorted({**settings, **SETTINGS}.items()))}
    return digest(json.dumps(relied_on, sort_keys=True))


def _facts(request: Request, plans: Mapping[str, Plan]) -> Facts:
    """The part of the manifest that is known before compiling. `save` adds what concerns the file: sums and strides."""
    return {
        "sha256": "0" * 64,
        "format": FORMAT.name,
        "version": FORMAT.version,
        "notice": NOTICE,
        "built_with": machine.versions(),
        "machine": machine.describe(str(request.device)),
        "network": type(request.flat.network).__name__,
        "dtype": name_of(request.dtype),
        "profile": request.profile.to_dict(),
        "doubled": request.doubled,
        "guidance_scale": request.guidance_scale,
        "inputs": [
            {"name": name, "dtype": name_of(request.tensors[name].dtype), "shape": sizes}
            for name, sizes in request.shapes.items()
        ],
        "fixed": request.fixed,
        "plans": [plan_facts(name, each, plan_to_bytes(each)) for name, each in plans.items()],
        "strides": {},
        "unused": [],
        "tied": {},
        "hashes": {"weights": "", "code": ""},
        "measured": {},
    }


def _engine(
    request: Request,
    plans: Mapping[str, Plan],
    facts: Facts,
    code: dict[str, bytes],
    tensors: Mapping[str, Any],
    seconds: float,
) -> Engine:
    """The engine, not yet measured. tensors: weights by their names in the exported code; the engine copies them."""
    weights = {weight_name(name): each.detach().clone() for name, each in tensors.items() if isinstance(each, Tensor)}
    facts = {**facts, "measured": {"seconds_to_compile": seconds}}
    engine = Engine(manifest.parse(facts), plans, code, weights, request.unconditional, request.device)
    state = request.flat.network.state_dict()
    facts["tied"] = _tied(state, list(engine.weights))
    facts["unused"] = sorted(set(state) - set(engine.weights) - set(facts["tied"]))
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
        warm_up(engine)
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
