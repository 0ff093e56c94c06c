"""Whole sampling loops of real architectures: ours, the same graphed network with diffusers' schedulers, and diffusers.

The limit is the graphed network alone, NFE times. All contenders share one network with its weights in channels_last
(the UNets), and take turns in one process. Guided networks are handed both halves as one batch. A scheduler's
`set_timesteps` is not part of its time; of ours everything is, the copies of noise and conditioning too.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from devices import Contender, Counts, Device, Times, rounds
from figures import COMPILED, COMPILED_GRAPH, DIT, EAGER, FLUX, FUSED, GRAPH, LIMIT, SD15, SDXL, with_graph
from networks import ARCHITECTURES, Architecture
from results import Bench
from torch import Tensor

from olss_fast import NoiseSchedule, Plan, Sampler, solvers

GUIDANCE = 7.5
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP, FLOW = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012), NoiseSchedule.flow()
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", BETAS),
    "UniPC": ("UniPCMultistepScheduler", BETAS),
    "DDIM": ("DDIMScheduler", {**BETAS, "clip_sample": False}),
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


@dataclass(frozen=True)
class Case:
    """`seconds`: of rounds in all, shared among the NFE as long as their loops are."""

    architecture: str
    dtype: str
    batch: int
    nfe: tuple[int, ...]
    seconds: float


# The longest loop first: the shorter ones then fit into its buffers. What matters most comes first.
CASES = (
    Case(SD15, "float16", 1, (20, 4, 10, 5), 35),
    Case(SDXL, "float16", 1, (20, 4), 35),
    Case(SD15, "float16", 16, (10,), 12),
    Case(DIT, "bfloat16", 1, (20, 4), 8),
    Case(FLUX, "bfloat16", 1, (20, 4), 10),
    Case(SDXL, "float16", 4, (5,), 8),
    Case(SD15, "bfloat16", 1, (20, 4), 10),
)
COMPILED_CASE = CASES[0]
IN_OUR_GRAPH = "max-autotune-no-cudagraphs"
COMPILE_SECONDS = 60.0  # without that much left, no compilation is begun; it is ended by the end of the bench
Ask = Callable[[Tensor, Tensor], Tensor]


def plan_of(architecture: Architecture, nfe: int) -> Plan:
    return solvers.euler(FLOW, nfe) if architecture.flow else solvers.dpm_solver_pp(VP, nfe)


class Graphed:
    """The network alone as a CUDA graph, on input buffers of its own."""

    def __init__(self, device: Device, ask: Ask, x: Tensor) -> None:
        self.x, self.time = x.clone(), torch.zeros(len(x), device=x.device)
        self.graph = device.capture(lambda: self._run(ask))

    def _run(self, ask: Ask) -> None:
        self.output = ask(self.x, self.time)

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        self.x.copy_(x)
        self.time.copy_(times)
        self.graph.replay()
        return self.output


class Loops:
    """A network with all inputs of its loop, and the contenders around it."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.case, self.device = case, bench.device
        self.architecture = ARCHITECTURES[case.architecture]
        dtype, where = getattr(torch, case.dtype), bench.device.torch
        self.network = self.architecture.network(case.architecture, where, dtype, dry=bench.dry)
        self.noise, self.given = self.architecture.inputs(case.batch, where, dtype, dry=bench.dry)
        self.without = {name: torch.zeros_like(each) for name, each in self.given.items()}
        self.joined = self.given
        if self.architecture.guided:
            self.joined = {name: torch.cat([self.without[name], each]) for name, each in self.given.items()}

    @property
    def facts(self) -> dict[str, Any]:
        case = self.case
        shape = tuple(self.noise.shape)
        return {"case": case.architecture, "batch": case.batch, "dtype": case.dtype, "shape": shape}

    def ask(self, network: Callable[..., Tensor]) -> Ask:
        return functools.partial(_with, network, self.joined)

    def doubled(self, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if self.architecture.guided else x

    def graphed(self) -> Graphed:
        return Graphed(self.device, self.ask(self.network), self.doubled(self.noise))

    def sampler(self, backend: str, network: Any = None) -> Sampler:
        guided = {"unconditional": self.without, "guidance_scale": GUIDANCE} if self.architecture.guided else {}
        return Sampler(
            self.network if network is None else network,
            plan_of(self.architecture, max(self.case.nfe)),
            dtype=self.noise.dtype,
            device=self.noise.device,
            conditioning=self.given,
            backend=backend,
            **guided,
        )

    def ours(self, sampler: Sampler, nfe: int) -> Contender:
        plan = plan_of(self.architecture, nfe)
        return Contender(lambda: sampler(self.noise), lambda: setattr(sampler, "plan", plan))

    def peer(self, ask: Ask, scheduler_name: str, nfe: int) -> Contender:
        """The denoising loop of diffusers' pipelines around `ask`."""
        import diffusers

        name, config = SCHEDULERS[scheduler_name]
        scheduler = getattr(diffusers, name)(**config)

        def run() -> Tensor:
            latents = self.noise * getattr(scheduler, "init_noise_sigma", 1.0)
            for timestep in scheduler.timesteps:
                x = self.doubled(latents)
                if hasattr(scheduler, "scale_model_input"):
                    x = scheduler.scale_model_input(x, timestep)
                output = ask(x, timestep.expand(len(x)))
                if self.architecture.guided:
                    without, given = output.chunk(2)
                    output = without + GUIDANCE * (given - without)
                latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
            return latents

        return Contender(torch.no_grad()(run), lambda: scheduler.set_timesteps(nfe, device=self.noise.device))


def _with(network: Callable[..., Tensor], arguments: Mapping[str, Tensor], x: Tensor, times: Tensor) -> Tensor:
    return network(x, times, **arguments)


def section(bench: Bench) -> None:
    for case in CASES:
        name = f"{case.architecture}, batch {case.batch}, {case.dtype}"
        bench.run(name, _loops, case, least=min(30.0, case.seconds))
        bench.free()


@torch.no_grad()
def _loops(bench: Bench, case: Case) -> None:
    loops = Loops(bench, case)
    graphed, samplers = loops.graphed(), {GRAPH: loops.sampler("graph"), FUSED: loops.sampler("fused")}
    _compare_samplers(bench, loops, samplers)
    for i, nfe in enumerate(case.nfe[:2] if bench.dry else case.nfe):
        if i and bench.left < 10:
            bench.skip(f"{bench.part}, NFE {nfe}", "the section's time was over")
            continue
        contenders = {LIMIT: Contender(_times(graphed.graph.replay, nfe))}
        contenders |= {name: loops.ours(sampler, nfe) for name, sampler in samplers.items()}
        contenders |= _peers(bench, loops, graphed, nfe)
        _time(bench, loops, contenders, nfe)
    _host_time(bench, loops, samplers[GRAPH])


def _peers(bench: Bench, loops: Loops, graphed: Graphed, nfe: int) -> dict[str, Contender]:
    peers = loops.architecture.peers
    try:
        found = {with_graph(peer): loops.peer(graphed, peer, nfe) for peer in peers}
        return found | {EAGER: loops.peer(loops.ask(loops.network), peers[0], nfe)}
    except ModuleNotFoundError as error:
        for name in (*map(with_graph, peers), EAGER):
            bench.skip(f"{bench.part}, NFE {nfe}, {name}", str(error))
        return {}


def _times(run: Callable[[], Any], count: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(count):
            run()

    return several


def _time(bench: Bench, loops: Loops, contenders: dict[str, Contender], nfe: int) -> Times:
    """A row for each contender against the limit, and for each of ours against every peer."""
    share = min(loops.case.seconds * nfe / sum(loops.case.nfe), max(1.0, bench.left - 5))
    times = rounds(bench.device, contenders, seconds=0 if bench.dry else share, least=2 if bench.dry else 4)
    ours = [name for name in contenders if name.startswith("Sampler")]
    facts = {**loops.facts, "nfe": nfe, "unit": "ms"}
    for name in contenders:
        bench.add(name, **times.row(name, None if name == LIMIT else LIMIT, scale=1e3), **facts)
    for name in ours:
        for peer in contenders:
            if peer != LIMIT and peer not in ours:
                bench.add(name, **times.row(name, peer, scale=1e3), **facts)
    return times


def _compare_samplers(bench: Bench, loops: Loops, samplers: Mapping[str, Sampler]) -> None:
    """Both executors on this network, bit by bit, or close where libraries choose other algorithms under capture."""
    graph, fused = (samplers[name](loops.noise).double() for name in (GRAPH, FUSED))
    difference = float((graph - fused).norm() / fused.norm())
    equal, reason = bool(torch.equal(graph, fused)), samplers[GRAPH].stats().reason
    bench.add(
        "Sampler graph against fused",
        difference,
        "relative difference",
        ok=difference <= 1e-2 and not reason,
        note=reason or ("equal bit by bit" if equal else "not equal bit by bit"),
        **loops.facts,
    )


def _host_time(bench: Bench, loops: Loops, sampler: Sampler) -> None:
    """Until the call returns, with nothing waited for: the difference between a long and a short loop, by step."""
    long, short = 20, 4
    took: dict[int, list[float]] = {long: [], short: []}
    for nfe in took:
        sampler.plan = plan_of(loops.architecture, nfe)
        sampler(loops.noise)
        for _ in range(1 if bench.dry else 8):
            bench.device.synchronize()
            started = time.perf_counter()
            sampler(loops.noise)
            took[nfe].append(time.perf_counter() - started)
    bench.device.synchronize()
    middle = {nfe: statistics.median(times) for nfe, times in took.items()}
    step = (middle[long] - middle[short]) / (long - short)
    facts = {**loops.facts, "n": len(took[long])}
    bench.add("host time a step", 1e6 * step, "µs", **facts)
    bench.add("host time of a call, without its steps", 1e6 * (middle[short] - short * step), "µs", **facts)


# --- kernels, waits and copies a step ---------------------------------------------------------------------------------


def counts_section(bench: Bench) -> None:
    bench.run("counts", _counts)


@torch.no_grad()
def _counts(bench: Bench) -> None:
    """What a step costs: a long loop less a short one, less the network's own kernels."""
    tiny = Case(DIT, "float16", 1, (20, 4), 0)
    loops = Loops(bench, tiny)
    graphed = loops.graphed()
    network = [bench.device.count(graphed.graph.replay).kernels for _ in range(2)][-1]  # the first starts the profiler
    makers: dict[str, Callable[[int], Contender]] = {
        name: functools.partial(loops.ours, loops.sampler(backend))
        for name, backend in ((GRAPH, "graph"), (FUSED, "fused"))
    }
    makers |= {with_graph(peer): functools.partial(loops.peer, graphed, peer) for peer in loops.architecture.peers}
    for name, make in makers.items():
        bench.run(f"counts, {name}", _count_one, name, make, network, loops.facts)


def _count_one(bench: Bench, name: str, make: Callable[[int], Contender], network: int, facts: dict[str, Any]) -> None:
    long, short = 20, 4
    found = {nfe: _count(bench.device, make(nfe)) for nfe in (long, short)}
    for unit in ("kernels", "syncs", "copies"):
        per_step = (getattr(found[long], unit) - getattr(found[short], unit)) / (long - short)
        own = per_step - network if unit == "kernels" else per_step
        bench.add(name, own, f"{unit} a step", n=1, **facts)


def _count(device: Device, contender: Contender) -> Counts:
    for _ in range(2):
        contender.prepare()
        contender.run()
    contender.prepare()
    return device.count(contender.run)


# --- against a compiled network ---------------------------------------------------------------------------------------


def compiled_section(bench: Bench) -> None:
    bench.run(COMPILED, _against_compiled, least=0.0 if bench.dry else COMPILE_SECONDS)


@torch.no_grad()
def _against_compiled(bench: Bench) -> None:
    """diffusers as its documentation recommends; ours on the network as it is, then on one that is compiled alike."""
    loops, nfe = Loops(bench, COMPILED_CASE), max(COMPILED_CASE.nfe)
    compiled = bench.device.compile(loops.network, mode="max-autotune", fullgraph=True)
    peer = loops.peer(loops.ask(compiled), loops.architecture.peers[0], nfe)
    _warm_up(bench, loops, COMPILED, peer)
    graphed = loops.graphed()  # is held as long as its graph is replayed
    contenders = {LIMIT: Contender(_times(graphed.graph.replay, nfe)), COMPILED: peer}
    _time(bench, loops, contenders | {GRAPH: loops.ours(loops.sampler("graph"), nfe)}, nfe)
    bench.run(COMPILED_GRAPH, _on_compiled, loops, contenders, nfe)


def _on_compiled(bench: Bench, loops: Loops, contenders: dict[str, Contender], nfe: int) -> None:
    """Our graph around the network compiled alike, but for the compiler's own graphs."""
    sampler = loops.sampler("graph", bench.device.compile(loops.network, mode=IN_OUR_GRAPH, fullgraph=True))
    ours = loops.ours(sampler, nfe)
    _warm_up(bench, loops, COMPILED_GRAPH, ours)
    if reason := sampler.stats().reason:
        raise RuntimeError(reason)
    _time(bench, loops, contenders | {COMPILED_GRAPH: ours}, nfe)


def _warm_up(bench: Bench, loops: Loops, name: str, contender: Contender) -> None:
    """The compiler runs, then its code warms up, then it records its graphs."""
    started = time.monotonic()
    for _ in range(3):
        contender.prepare()
        contender.run()
    bench.device.synchronize()
    bench.add(f"compilation and warm-up, {name}", time.monotonic() - started, "s", **loops.facts)
