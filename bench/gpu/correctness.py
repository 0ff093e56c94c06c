"""What must hold on this device before any time means something: kernels, executors, memory accesses.

Kernels are checked by the tests' own checks (tests/helpers/kernel_checks.py): against float64 twins, in buffers that
are poisoned with NaN and lie between margins. Executors keep the error budget |fast - ref| <= 2 |eager - ref|: ref is
the float64 reference with the network in float64, eager the rows summed by torch in the network's own precision.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memcheck
import numpy as np
import torch
from kernel_checks import Guarded, check_lincomb, check_run, check_step_too_many, eager_sum, guarded_state
from made_plans import split
from results import Bench
from step_kernel import CHECKED, excess
from torch import Tensor

from olss_fast import NoiseSchedule, Plan, Sampler, sample, solvers
from olss_fast.kernels import StepState, lincomb, start, step

SANITIZER = "compute-sanitizer"
SANITIZER_SECONDS = 90
DTYPES = ("float16", "bfloat16", "float32")
LARGE = (1, 3_000_017)
PLAIN, GUIDED, SPLIT = {}, {"doubled": True}, {"doubled": True, "branches": 2}
STEP_CASES: tuple[tuple[tuple[int, ...], str, dict[str, Any]], ...] = (
    *(((2, 4, 63, 5), dtype, {"steps": 3, "noises": 2, **kind}) for dtype in DTYPES for kind in (PLAIN, GUIDED, SPLIT)),
    *(((1, size), "float16", {"steps": 2, **GUIDED}) for size in (0, 1, 255, 256, 257, 16384, 65536)),
    ((2, 8, 16, 16), "float16", {"steps": 3, "channels_last": True, "spare": 3, **GUIDED}),
    ((1, 777), "float64", {"steps": 3, **GUIDED}),
    ((1, 4, 64, 64), "bfloat16", {"steps": 40, **GUIDED}),
    ((1, 777), "float16", {"steps": 128, "begin": 126, **PLAIN}),
    (LARGE, "float16", {"steps": 3, **GUIDED}),
    (LARGE, "float32", {"steps": 3, **PLAIN}),
)
LINCOMB_CASES = (  # those with many separate tensors last: they take long to compile
    *((5, 65536, dtype) for dtype in DTYPES),
    (3, 1, "float32"),
    (3, 3_000_017, "bfloat16"),
    *((columns, 4099, "float16") for columns in (1, 2, 3, 16, 17, 40, 128, 130)),
)
FAR = (40, (1 << 26) + 3)  # more elements than a 32-bit offset reaches

SCHEDULE = NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)
SCALE, BUDGET = 2.5, 2.0


PLANS = {
    "DDIM 6": solvers.ddim(SCHEDULE, 6),
    "UniPC 5": solvers.unipc(SCHEDULE, 5, order=3),
    "DPM++ 2M 20": solvers.dpm_solver_pp(SCHEDULE, 20),
    "Euler ancestral 4": solvers.euler_ancestral(SCHEDULE, 4),
    "DDIM 6, split guidance": split(solvers.ddim(SCHEDULE, 6), SCALE),
}


class Net(torch.nn.Module):
    """The exact noise of data that a rotation of the channels, z = Q x, makes y / 10 ± 1 with a spread s each.

    Where a network denoises, what one step rounds is drawn in by the next ones; one that does not would carry it on.
    With v = alpha^2 s^2 + sigma^2 and u = Q x - alpha y / 10 the noise is Q^T sigma / v (u - alpha tanh(alpha u / v)).
    """

    spread = 0.3

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        turned = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
        self.mix = torch.nn.Parameter(turned[:, :, None, None].to(device, dtype), requires_grad=False)
        alphas = torch.from_numpy(SCHEDULE.alpha(np.arange(1000.0)))
        self.register_buffer("levels", torch.stack([alphas, (1.0 - alphas**2).sqrt()]).to(device, dtype))

    def forward(self, x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        below = time.long().clamp(0, 998)
        levels = torch.lerp(self.levels[:, below], self.levels[:, below + 1], (time - below).to(x.dtype))
        alpha, sigma = levels.view(2, -1, 1, 1, 1)
        v = (alpha * self.spread) ** 2 + sigma**2
        u = torch.nn.functional.conv2d(x, self.mix) - alpha * (y / 10.0).view(-1, 1, 1, 1).to(x.dtype)
        noise = sigma / v * (u - alpha * torch.tanh(alpha / v * u))
        return torch.nn.functional.conv2d(noise, self.mix)  # Q is its own transpose


def section(bench: Bench) -> None:
    torch.backends.cudnn.allow_tf32 = False
    sanitizer = _start_sanitizer(bench)  # it has the device to itself in the next section; nothing is timed in this one
    try:
        for dtype in DTYPES:
            for name in PLANS:
                bench.run(f"{name} {dtype}", _check_executors, name, dtype)
        for shape, dtype, how in STEP_CASES:
            bench.run(f"step {dtype} {shape}", _checked, _check_step, shape, dtype, how)
        bench.run("64-bit offsets", _checked, _check_far)
        for columns, size, dtype in LINCOMB_CASES:
            bench.run(f"lincomb {columns} × {size} {dtype}", _checked, _check_lincomb, columns, size, dtype)
        bench.run(SANITIZER, _collect_sanitizer, sanitizer)
    finally:
        if sanitizer is not None and sanitizer.poll() is None:
            sanitizer.kill()
        torch.backends.cudnn.allow_tf32 = True


# --- kernels ----------------------------------------------------------------------------------------------------------


def _checked(bench: Bench, check: Callable[..., tuple[str, dict[str, Any]]], *arguments: Any) -> None:
    """A row that says whether the check held; its AssertionError is the note of the row, any other error is one too."""
    name, fields = "", {}
    try:
        name, fields = check(bench, *arguments)
        note = ""
    except AssertionError as error:
        name, note = bench.part, " ".join(str(error).split())[:300] or "an assertion failed"
    bench.add(name or bench.part, float(bool(note)), "failures", ok=not note, note=note, reference="float64", **fields)


def _small(bench: Bench, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, 3001) if bench.dry and shape == LARGE else shape


def _check_step(bench: Bench, shape: tuple[int, ...], dtype: str, how: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    shape, options = _small(bench, shape), dict(how)
    begin = options.pop("begin", 0)
    guard = Guarded(str(bench.device.torch))
    state = guarded_state(guard, shape, getattr(torch, dtype), **options)
    check_run(start, step, guard, state, steps=options["steps"], begin=begin)
    if not bench.dry:  # on the CPU this is an error
        check_step_too_many(step, guard, state)
    kind = ", ".join(f"{key} {value}" for key, value in options.items() if key != "steps")
    return "step", {"dtype": dtype, "shape": shape, "k": 1 + options["steps"], "case": kind}


def _check_lincomb(bench: Bench, columns: int, size: int, dtype: str) -> tuple[str, dict[str, Any]]:
    size = min(size, 5003) if bench.dry else size
    check_lincomb(lincomb, columns, size, getattr(torch, dtype), device=str(bench.device.torch))
    return "lincomb", {"dtype": dtype, "shape": (size,), "k": columns}


def _check_far(bench: Bench) -> tuple[str, dict[str, Any]]:
    """The last elements of a history of more than 2^31 of them."""
    columns, size = (5, 1003) if bench.dry else FAR
    x = torch.empty(1, size, dtype=torch.float16, device=bench.device.torch)
    state = StepState.empty(x, torch.zeros(1, device=x.device), steps=columns - 1)
    state.history.normal_()
    state.rows.normal_()
    state.finished.fill_((columns - 2) * state.programs)
    output = torch.randn_like(x)
    step(output, state)
    assert torch.equal(state.history[-1], output[0]), "the output is not in the last column"
    terms = state.rows[-1].double()[:, None] * state.history[:, -CHECKED:].double()
    for name, found in (("step", x[0]), ("lincomb", lincomb(state.history, state.rows[-1]))):
        error = excess(found[-CHECKED:], terms)
        assert error <= 1.0, f"{name}: {error:.3g} times the allowed error"
    return "step and lincomb, 64-bit offsets", {"dtype": "float16", "shape": (1, size), "k": columns}


# --- executors --------------------------------------------------------------------------------------------------------


def _check_executors(bench: Bench, plan_name: str, dtype_name: str) -> None:
    plan, dtype, device = PLANS[plan_name], getattr(torch, dtype_name), bench.device.torch
    shape = (2, 4, 9, 7) if bench.dry else (2, 4, 64, 63)
    net = Net(dtype, device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    how = {
        "conditioning": {"y": torch.tensor([3, 7], device=device)},
        "unconditional": {"y": 0},
        "guidance_scale": SCALE,
    }
    exact = sample(copy.deepcopy(net).double(), plan, noise.double(), generator=seeded(device), **how)
    eager_error = rms(eager_run(plan, net, noise, how["conditioning"]["y"]).double() - exact)
    found: dict[str, Tensor] = {}
    for backend in ("reference", "fused", "graph", "unrolled"):
        named = "graph" if backend == "unrolled" else backend
        sampler = Sampler(net, plan, backend=named, unroll=backend == "unrolled", **how)
        for _ in range(2):  # the second run finds its buffers as the first left them
            found[backend] = sampler(noise, generator=seeded(device))
        share = rms(found[backend].double() - exact) / eager_error
        fell_back = sampler.stats().reason
        bench.add(
            f"executor {backend}",
            share,
            "of eager's error",
            case=plan_name,
            dtype=dtype_name,
            shape=shape,
            nfe=plan.nfe,
            ok=bool(share <= BUDGET) and not fell_back,
            reference="float64",
            note=fell_back,
        )
    for backend in ("graph", "unrolled"):
        differing = int((found[backend] != found["fused"]).sum())
        facts = {"case": plan_name, "dtype": dtype_name, "shape": shape, "nfe": plan.nfe, "reference": "executor fused"}
        bench.add(f"executor {backend}", differing, "differing elements", ok=differing == 0, **facts)


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(4)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


@torch.no_grad()
def eager_run(plan: Plan, net: Net, noise: Tensor, y: Tensor) -> Tensor:
    """The plan as one would write it in torch in the network's precision: every product and every sum is rounded."""
    drawn = torch.randn((plan.noises, *noise.shape), generator=seeded(noise.device), device=noise.device)
    basis, noises = [noise], list(drawn.to(noise.dtype))
    for i in range(plan.nfe + 1):
        weights = [*plan.rows[i, : len(basis)], *plan.rows[i, plan.noise_slice]]
        x = eager_sum([*basis, *noises], torch.tensor(weights, device=noise.device))
        if i < plan.nfe:
            time = torch.full((len(x),), float(plan.timesteps[i]), device=x.device)
            without, given = net(x, time, torch.zeros_like(y)), net(x, time, y)
            basis += [without, given] if plan.branches == 2 else [without + SCALE * (given - without)]
    return x


# --- memory accesses --------------------------------------------------------------------------------------------------


def _start_sanitizer(bench: Bench) -> subprocess.Popen[str] | None:
    if bench.dry or shutil.which(SANITIZER) is None:
        return None
    script = str(Path(__file__).with_name("memcheck.py"))
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
    return subprocess.Popen(
        ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _collect_sanitizer(bench: Bench, process: subprocess.Popen[str] | None) -> None:
    if process is None:
        memcheck.launches(str(bench.device.torch))
        return bench.skip(SANITIZER, "the tool is not on the PATH; its launches ran without it")
    try:
        output, _ = process.communicate(timeout=min(SANITIZER_SECONDS, max(1.0, bench.left)))
    except subprocess.TimeoutExpired:
        process.kill()
        return bench.skip(SANITIZER, "not done in the time of this section")
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    refused = process.returncode != 0 and "Invalid" not in output and "ERROR SUMMARY: 0 errors" not in output
    if refused and "not supported" in output:
        return bench.skip(SANITIZER, f"it refuses this device: {' '.join(lines)[:200]}")
    note = "" if process.returncode == 0 else " ".join(lines[:3] + lines[-1:] or output.splitlines()[-3:])[:300]
    bench.add("memcheck of the kernels", float(process.returncode != 0), "failures", ok=not note, note=note)
