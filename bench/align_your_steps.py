"""The published Align Your Steps times on the embedded model, which has the noise schedule they were made for.

    python bench/align_your_steps.py        # 5 minutes on one core; writes bench/results/align_your_steps.md

Held-out noise, guidance and teacher are those of bench/quality.py, so the figures stand beside the README's.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.schedulers import AysSchedules

import olss_fast
from olss_fast import demo, metrics, solvers
from olss_fast.cli.model import arguments, draw_noise, pick_labels
from olss_fast.plan.plan import Plan

OUT = Path(__file__).parent / "results" / "align_your_steps.md"
SAMPLES, JUDGED = 256, slice(192, 256)
STEPS = 10
METHODS = (
    ("DDIM", solvers.ddim, {}),
    ("DPM-Solver++ 2M", solvers.dpm_solver_pp, {"order": 2}),
    ("UniPC-2", solvers.unipc, {"order": 2}),
    ("UniPC-3", solvers.unipc, {"order": 3}),
    ("DEIS-3", solvers.deis, {"order": 3}),
)
SCHEDULES = {"AYS, SD 1.5": "StableDiffusionTimesteps", "AYS, SDXL": "StableDiffusionXLTimesteps"}
SPACINGS = ("trailing", "karras", "logsnr")


def plans(schedule: olss_fast.NoiseSchedule) -> Iterator[tuple[str, str, Plan]]:
    """(solver, times, plan)."""
    for name, solver, options in METHODS:
        for title, key in SCHEDULES.items():
            yield name, title, solver(schedule, timesteps=AysSchedules[key], **options)
        for spacing in SPACINGS:
            yield name, spacing, solver(schedule, STEPS, spacing=spacing, **options)


def main() -> None:
    model = demo.load()
    noise, labels = draw_noise(model, SAMPLES, 0)[JUDGED], pick_labels(model, SAMPLES)[JUDGED]
    how = arguments(model, labels)
    teacher = olss_fast.sample(model.network, solvers.ddim(model.schedule, 100), noise, **how)
    errors: dict[str, dict[str, float]] = {}
    for name, times, plan in plans(model.schedule):
        images = olss_fast.sample(model.network, plan, noise, **how)
        errors.setdefault(name, {})[times] = float(metrics.rmse(images, teacher).mean())
        print(name, times, errors[name][times], flush=True)
    columns = [*SCHEDULES, *SPACINGS]
    lines = [f"| {STEPS} NFE | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[key]:.4f}' for key in columns)} |" for name, row in errors.items()]
    setting = f"RMSE to the 100-step teacher, mean over {noise.shape[0]} samples, embedded model, guidance 1.5."
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}."
    OUT.write_text("\n".join([*lines, "", f"{setting} {machine}", ""]))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
