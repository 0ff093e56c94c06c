"""`olss-fast demo`, and the files that `tune` and `demo` write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

import olss_fast
from olss_fast import metrics
from olss_fast.cli.jobs import NetworkSubject
from olss_fast.cli.model import DEMO, device_of
from olss_fast.methods import ANALYTIC
from olss_fast.report.plots import plot_grid
from olss_fast.report.report import Report
from olss_fast.report.tables import families
from olss_fast.support.folders import make_folder, try_folder
from olss_fast.support.progress import bar_options
from olss_fast.tuning.study import Effort

STEPS = (4, 5, 6, 8, 10)
PLANS = "plans"  # folder within the output folder
SAMPLES = 80  # a quarter are held out
GRID_STEPS = 5
GRID_CLASSES = (3, 5, 7, 8, 9, 10, 13, 15, 18, 19)
GRID_PEERS = 3  # solver families shown with OLSS
GRID_SEED = 1  # added to the seed: noise used for neither fitting nor judging

Say = Callable[[str], None]


def run_demo(
    out: str | Path,
    *,
    device: str | None = None,
    steps: Sequence[int] = STEPS,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: bool = True,
    say: Say = print,
) -> olss_fast.TuneResult:
    """Tune the embedded model, print the table through `say`, and write plans, report and pictures to `out`.

    Errors as in `tune`; `PlanFileError` if something cannot be written.
    """
    start = time.perf_counter()
    out = try_folders(out)
    subject = NetworkSubject(DEMO, device, seed=seed, progress=progress)
    say(
        f"Tuning the embedded model on {device_of(subject.loaded)}: {samples} samples, light polish. "
        "`olss-fast tune --model demo` takes more of both, and finds better plans."
    )
    result = subject.tune(samples, None, steps=list(steps), teacher_steps=100, effort=Effort.light())
    written = write_result(result, out)
    others = NetworkSubject(DEMO, device, seed=seed + GRID_SEED, progress=False)
    written.append(draw_grid(result.report, others, out / "grid.png", progress=progress))
    say(result.report.table())
    say(time_spent(result.report, time.perf_counter() - start))
    say(f"In {out}: " + ", ".join(str(path.relative_to(out)) for path in written))
    return result


def try_folders(out: str | Path) -> Path:
    """`out` and its `plans`, checked for writing before any work starts."""
    try_folder(out)
    return try_folder(Path(out) / PLANS).parent


def write_result(result: olss_fast.TuneResult, out: Path) -> list[Path]:
    """`plans/olss-<n>.safetensors`, `report.json` and the report's pictures; returns their paths."""
    plans = make_folder(out / PLANS)
    written = []
    for nfe, plan in sorted(result.plans.items()):
        plan.save(plans / f"olss-{nfe}.safetensors")
        written.append(plans / f"olss-{nfe}.safetensors")
    return [*written, result.report.to_json(out / "report.json"), *result.report.plot(out)]


def time_spent(report: Report, total: float) -> str:
    """One line: total time, and that of each stage of the report."""
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.seconds.items())
    evaluations = sum(report.evaluations.values())
    return f"{duration(total)} in all ({stages}); {evaluations:,} network evaluations of one sample."


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 07 s"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def draw_grid(report: Report, subject: NetworkSubject, path: Path, *, progress: bool = True) -> Path:
    """Samples of the teacher, OLSS and the best others from the same noise at `GRID_STEPS` NFE (else the fewest)."""
    nfe = GRID_STEPS if GRID_STEPS in report.nfes else report.nfes[0]
    accent, plans = f"OLSS\n{nfe} NFE", {f"teacher\n{report.teacher.nfe} NFE": report.teacher}
    if best := report.olss(nfe):
        plans[accent] = best.plan
    peers = [members[nfe] for members in families(report.at(nfe, ANALYTIC)).values()]  # the best family first
    plans |= {each.name.replace(" (", "\n("): each.plan for each in peers[:GRID_PEERS]}
    rows = tqdm(plans.values(), desc="Pictures", unit="row", **bar_options(progress))
    sampled = [subject.sample(plan, {}, len(GRID_CLASSES), GRID_CLASSES) for plan in rows]
    images = {name: each for name, (each, _, _) in zip(plans, sampled, strict=True)}
    (_, reference), *others = images.items()
    return plot_grid(
        images,
        path,
        errors={name: list(metrics.rmse(each, reference)) for name, each in others},
        titles=sampled[0][2],
        heading=f"The same noises at {nfe} network evaluations; below each image its RMSE to the teacher",
        accent=accent,
    )
