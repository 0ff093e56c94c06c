"""What tuning costs beside the network, and in memory.

    pytest bench/bench_tuning.py --benchmark-only -s

The share of everything but network calls is taken within one run, on latents of Stable Diffusion's size with a
synthetic network of 0.7 GFLOP a sample, with the light effort and one number of steps: a larger network makes the share
smaller. Memory is the peak of a process of its own, for some samples and for four times as many.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

import olss_fast
from olss_fast.tuning.tuning import Effort

pytestmark = pytest.mark.slow
LATENT = (4, 64, 64)
SAMPLES = 32
TEACHER_STEPS = 100
MOST_OVERHEAD = 0.10
MOST_GROWTH = 1.15  # peak memory of four times the samples; some is the noise itself

SCHEDULE = olss_fast.NoiseSchedule.named("scaled_linear", beta_start=0.00085, beta_end=0.012)


class Synthetic(torch.nn.Module):
    """Three convolutions, time-dependent and non-linear; 0.7 GFLOP a sample. Times itself."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(i, o, 3, padding=1) for i, o in ((4, width), (width, width), (width, 4))
        )
        self.seconds, self.samples = 0.0, 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        first, second, last = self.layers
        hidden = torch.nn.functional.silu(first(x) * (1.0 + timestep.view(-1, 1, 1, 1) / 1000.0))
        output = 0.9 * x + 0.1 * last(torch.nn.functional.silu(second(hidden)))
        self.seconds += time.perf_counter() - start
        self.samples += len(x)
        return output


def run_tune(samples: int, teacher_steps: int, latent: tuple[int, ...], **how: Any) -> dict[str, Any]:
    network = Synthetic().requires_grad_(False)
    noise = torch.randn((samples, *latent), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    olss_fast.tune(
        network, noise=noise, schedule=SCHEDULE, steps=[5], teacher_steps=teacher_steps, progress=False, **how
    )
    total = time.perf_counter() - start
    return {
        "total_s": total,
        "network_s": network.seconds,
        "overhead": 1.0 - network.seconds / total,
        "network_ms_per_sample": 1e3 * network.seconds / network.samples,
        "overhead_ms_per_sample": 1e3 * (total - network.seconds) / network.samples,
    }


def test_everything_but_network_calls(benchmark: Any) -> None:
    effort = Effort.light()
    row = benchmark.pedantic(
        run_tune, args=(SAMPLES, TEACHER_STEPS, LATENT), kwargs={"effort": effort}, rounds=1, iterations=1
    )
    benchmark.extra_info.update(row)
    print("\n" + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    assert row["overhead"] <= MOST_OVERHEAD


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from bench_tuning import run_tune, Effort
run_tune(int(sys.argv[1]), 20, (4, 32, 32), effort=Effort.light(), batch_size=8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
def test_peak_memory_does_not_grow_with_samples(benchmark: Any) -> None:
    def peak(samples: int) -> int:
        folder = __file__.rsplit("/", 1)[0]
        command = [sys.executable, "-c", PEAK, str(samples), folder]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    few, many = benchmark.pedantic(lambda: (peak(32), peak(128)), rounds=1, iterations=1)
    benchmark.extra_info.update({"peak_kib_32_samples": few, "peak_kib_128_samples": many})
    print(f"\npeak {few} KiB for 32 samples, {many} KiB for 128")
    assert many <= MOST_GROWTH * few
