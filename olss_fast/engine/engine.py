"""`Engine`: compiled code, weights and plans, ready to sample; `load_engine` reads one from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from olss_fast.compiling.arguments import flatten
from olss_fast.compiling.quiet import shortened
from olss_fast.engine import inputs, machine
from olss_fast.engine.compiled import LoadedCode, hash_code
from olss_fast.engine.manifest import FORMAT, Manifest
from olss_fast.engine.verifying import plan_facts, verified
from olss_fast.engine.weights import DTYPES, hash_weights, strides_of, to_blob
from olss_fast.errors import InputError, MachineError, NetworkError
from olss_fast.executors.draws import Seed, checked_streams
from olss_fast.executors.loop_cache import LoopCache, Stats, Work
from olss_fast.network import Conditioning, Denoiser, Streams, checked_arguments
from olss_fast.plan.file import plan_to_bytes
from olss_fast.plan.plan import Plan
from olss_fast.sampling.sampling import check_plan_fits, draw_step_noise
from olss_fast.support import container
from olss_fast.support.container import Blob
from olss_fast.support.device import pick_device
from olss_fast.support.files import AnyPath
from olss_fast.support.text import quoted
from olss_fast.support.tree import flat


class Engine:
    """A network compiled ahead of time, with its weights and plans. Made by `build` and `load_engine`.

    `engine(noise, **conditioning)` checks its inputs against those the engine was built for, and samples. It may be
    called from several threads; on the CPU each call has its own buffers, on a GPU calls take turns.

    manifest: the file's description, with all entries in `manifest.facts`. plans: by name; the first is the default.
    network: the compiled network, `network(x, time, *tensors)`, unchecked. unconditional: its defaults, one row for all
    samples.
    """

    def __init__(
        self,
        manifest: Manifest,
        plans: Mapping[str, Plan],
        code: Mapping[str, bytes],
        weights: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.manifest, self.plans, self.device = manifest, dict(plans), device
        self._code, self.unconditional = dict(code), dict(unconditional)
        self.network = LoadedCode(code, weights, device)
        self._loops = LoopCache([], "auto")
        self._agreed: tuple[Plan, float] | None = None

    def __call__(
        self,
        noise: Tensor | None = None,
        *,
        seed: Seed | None = None,
        shape: Sequence[int] | None = None,
        steps: int | None = None,
        plan: str | Plan | None = None,
        guidance_scale: float | None = None,
        unconditional: Conditioning | None = None,
        generator: Streams | None = None,
        **conditioning: Any,
    ) -> Tensor:
        """The samples (B, …) of unit Gaussian noise (B, …), given or drawn.

        Args:
            noise: contiguous and finite, of the engine's dtype, on its device, of a shape in its profile.
            steps, plan: the plan with that NFE, or of that name, or any Plan; default: the engine's first.
            guidance_scale: default: the engine's. unconditional: replaces the engine's own, name by name.
            seed, shape, generator: as for `olss_fast.sample`; the shape is by default the profile's `opt`.
            conditioning: the network's arguments; a number stands for every sample.

        Raises:
            InputError: arguments that the engine was not built for. NetworkError: non-finite outputs, or classes that
                the network does not have.
        """
        chosen = self.chosen_plan(steps, plan)
        scale = self.manifest.guidance_scale if guidance_scale is None else guidance_scale
        streams = checked_streams(generator, seed)
        noise = inputs.given_noise(noise, shape, streams, self.manifest, self.device)
        self._check_guidance(chosen, noise, scale)
        without = {**self.unconditional, **flatten(checked_arguments(unconditional, "unconditional"))}
        tensors = inputs.network_inputs(self.manifest, noise.shape[0], self.device, conditioning, without)
        work = Work(
            chosen,
            noise,
            flat(tensors),
            lambda held: lambda x, time, model: self.network(x, time, *held.values()),
            dtype=noise.dtype,
            device=self.device,
            doubled=self.manifest.doubled,
            guidance_scale=float(scale),
            step_noise=draw_step_noise(chosen, noise, streams),
        )
        try:
            return self._loops.run(work)
        except RuntimeError as cause:
            if isinstance(cause, torch.OutOfMemoryError):
                raise
            raise NetworkError(
                f"the compiled network failed: {shortened(cause)}; does the conditioning hold what the network takes, "
                "such as numbers of classes that it has?"
            ) from cause

    def __repr__(self) -> str:
        found, takes = self.manifest, ", ".join(["noise", *(each.name for each in self.manifest.inputs)])
        network, plans = f"{found.facts['network']}({takes})", ", ".join(self.plans)
        return f"Engine({network}, {found.profile}, {found.dtype}, plans {plans}, {self.device})"

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights that the code reads, by their names in the network's state_dict."""
        return self.network.weights

    def usual_arguments(self, samples: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Likely conditioning and unconditional arguments of the network: the engine's own, else zeros."""
        given: dict[str, Any] = {each.name: 0 for each in self.manifest.inputs}
        without = {name: 0 for name in given if name not in self.unconditional} if self.manifest.doubled else None
        for each in self.manifest.inputs:
            if each.name in self.unconditional:
                row = self.unconditional[each.name]
                given[each.name] = row.expand(samples, *row.shape[1:]) if each.per_sample else row
        return given, without

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Engine is neither pickled nor copied: save() it, and load it where it is needed")

    def stats(self) -> Stats:
        """Counters since the engine was made; see `Stats`."""
        return self._loops.stats()

    def update_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Overwrites the weights in use, without a build: a fine-tuned model, or LoRA merged into the weights.

        Names are those of the network's state_dict; some may be omitted. Weights that the code does not read have no
        effect. Do not call it while another thread samples.

        Raises InputError, before anything is written: unknown names, other shapes, dtypes of another kind, two values
        for one weight with two names.
        """
        if not isinstance(state_dict, Mapping):
            raise InputError(f"state_dict is a {type(state_dict).__name__}; expected a mapping of names to tensors")
        tied: dict[str, str] = self.manifest.facts["tied"]
        known = {*self.manifest.facts["unused"], *tied, *self.weights}
        unknown = sorted(str(name) for name in state_dict if name not in known)
        if unknown:
            raise InputError(
                f"the engine has no weights {_listed(unknown)}; its weights are {_listed(sorted(self.weights))}"
            )
        places = {name: tied.get(name, name) for name in state_dict if tied.get(name, name) in self.weights}
        faults = [fault for name, at in places.items() if (fault := _unfit(name, state_dict[name], self.weights[at]))]
        if not faults:
            faults = [
                f"{name} and {at} are one weight and were given different values"
                for name, at in places.items()
                if name != at and at in state_dict and not torch.equal(state_dict[name], state_dict[at])
            ]
        if faults:
            raise InputError(f"weights that do not fit, nothing was changed: {'; '.join(faults[:8])}")
        with torch.no_grad():
            for name, at in places.items():
                self.weights[at].copy_(state_dict[name])

    def save(self, path: AnyPath) -> None:
        """Writes the engine file, atomically, with the weights as they are now. Raises EngineFileError."""
        weights = {name: to_blob(each) for name, each in sorted(self.weights.items())}
        plans = {name: Blob.of_bytes(plan_to_bytes(plan)) for name, plan in self.plans.items()}
        blobs = {f"code/{name}": Blob.of_bytes(content) for name, content in self._code.items()}
        blobs |= {f"plans/{name}": blob for name, blob in plans.items()}
        blobs |= {f"unconditional/{name}": to_blob(each) for name, each in self.unconditional.items()}
        blobs |= {f"weights/{name}": blob for name, blob in weights.items()}
        facts = {name: fact for name, fact in self.manifest.facts.items() if name != "sha256"}
        facts["plans"] = [plan_facts(name, plan, plans[name].data) for name, plan in self.plans.items()]
        facts["strides"] = strides_of(self.weights)
        facts["hashes"] = {"weights": hash_weights(weights), "code": hash_code(self._code)}
        container.write(path, FORMAT, facts, blobs)

    def chosen_plan(self, steps: int | None = None, plan: str | Plan | None = None) -> Plan:
        """The plan that a call with these arguments runs. Raises InputError."""
        if steps is not None and plan is not None:
            raise InputError("steps and plan were both given; expected one of them")
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str) and plan in self.plans:
            return self.plans[plan]
        if plan is None and steps is None:
            return next(iter(self.plans.values()))
        for each in self.plans.values():
            if plan is None and each.nfe == steps:
                return each
        wanted = f"plan {quoted(plan)}" if steps is None else f"plan of {quoted(steps)} steps"
        has = ", ".join(f"{name} ({each.nfe} steps)" for name, each in self.plans.items())
        raise InputError(f"the engine has no {wanted}; it has {has}; any other Plan can be given as plan=")

    def _check_guidance(self, plan: Plan, noise: Tensor, scale: float) -> None:
        doubled = self.manifest.doubled
        if not doubled and plan.branches == 2:
            raise InputError("this plan keeps both outputs of a guided pair apart: build the engine with unconditional")
        if not doubled and scale != 1.0:
            raise InputError(f"guidance_scale is {scale!r}, but this engine is built without guidance: expected 1")
        if self._agreed == (plan, scale):  # checked before; checks between two network calls cost more
            return
        either: dict[str, Any] | None = {} if doubled else None
        check_plan_fits(plan, Denoiser([self.network], noise, unconditional=either, guidance_scale=scale))
        self._agreed = (plan, scale)


def load_engine(path: AnyPath, *, device: torch.device | str | None = None, sha256: str | None = None) -> Engine:
    """An engine from its file. **The file's machine code is run**: load only files from somebody you trust.

    Everything is verified before any code runs: format, checksum, plans, and that it was built for this machine and
    these versions. On a GPU the loop is captured at the profile's `opt`.

    Args:
        path: an engine file. device: default: the kind that it was built for. sha256: the expected one, from somebody
        you trust; `sha256sum` and `olss-fast inspect` print it.

    Raises:
        EngineFileError: not an engine file, damaged, altered, of another version, or with another sha256.
        MachineError: built for another machine or other versions; every mismatch is named.
    """
    found, plans, code, *tensors = verified(path, sha256)
    faults = machine.mismatches(
        found.facts["built_with"], found.facts["machine"], None if device is None else str(device)
    )
    if faults:
        raise MachineError(f"this engine does not fit this machine: {'; '.join(faults)}")
    place = pick_device(device or found.device)
    weights, without = ({name: each.to(place) for name, each in named.items()} for named in tensors)
    engine = Engine(found, plans, code, weights, without, place)
    if place.type == "cuda":
        warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """One run at the profile's `opt`, which makes the buffers, and on a GPU the graph, before the first call."""
    noise = inputs.usual_noise(engine.manifest, engine.device)
    given, without = engine.usual_arguments(noise.shape[0])
    engine(noise, unconditional=without, generator=torch.Generator(engine.device).manual_seed(0), **given)


def _unfit(name: str, value: object, held: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"{name} is a {type(value).__name__}, expected a tensor"
    if value.is_meta or value.layout != torch.strided:
        return f"{name} lies on {value.device} in layout {value.layout}, expected a tensor that holds its values"
    if value.shape != held.shape:
        return f"{name} has shape {tuple(value.shape)}, expected {tuple(held.shape)}"
    if value.is_floating_point() != held.is_floating_point() or value.dtype not in DTYPES.values():
        return f"{name} is {value.dtype}, expected {held.dtype}"
    return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
