"""How close tuned samplers come to their teacher, on the embedded model with `tune`'s defaults.

    python bench/quality.py        # about an hour on 2 cores; writes bench/results/quality.{json,md} and pictures

Every figure of the README's quality table comes from this file's output. The same held-out noise judges everything:
`tune` at 4, 5, 6, 8 and 10 evaluations, then all analytic solvers at more evaluations, to see when they catch up.
The Fréchet distance (on the embedded classifier's features; it is not FID) and the class agreement are those of fresh
samples that no fit has seen.
"""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import olss_fast
from olss_fast import demo, metrics
from olss_fast.cli.model import arguments, draw_noise, pick_labels
from olss_fast.tuning import compare as comparison
from olss_fast.tuning.tuning import tune

STEPS = (4, 5, 6, 8, 10)
MORE_STEPS = (7, 14, 20)


def main(
    out: Annotated[Path, typer.Option(help="Written with .json and .md behind it.")] = Path("bench/results/quality"),
    samples: Annotated[int, typer.Option(help="Noise samples of tune.")] = 256,
    fresh: Annotated[int, typer.Option(help="Fresh samples for the Fréchet distance and the class agreement.")] = 400,
    store: Annotated[Path | None, typer.Option(help="Folder for the recording; resumes.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for torch's default.")] = 0,
) -> None:
    """Measure and write the quality table."""
    if threads:
        torch.set_num_threads(threads)
    model = demo.load()
    noise, labels = draw_noise(model, samples, 0), pick_labels(model, samples)
    how = arguments(model, labels) | {"teacher_steps": 100}
    result = tune(
        model.network, noise=noise, schedule=model.schedule, steps=STEPS, teacher_steps=100, store=store, **how
    )
    print(result.report.table())
    out.parent.mkdir(parents=True, exist_ok=True)
    result.report.to_json(out.with_name(out.name + "-report.json"))
    result.report.plot_error(out.with_name(out.name + "-error.png"))  # the README's pictures are copies of these
    result.report.plot_path(out.with_name(out.name + "-path.png"))
    judged = slice(samples - result.report.held_out, samples)
    later = _later(model, noise[judged], labels[judged], store)
    best = {n: result.report.best(n, "analytic") for n in STEPS} | {n: later.best(n, "analytic") for n in MORE_STEPS}
    rows = [_row(result, n, best) for n in STEPS]
    fresh_rows = _fresh(model, result, best, fresh)
    data = {
        "environment": _environment(),
        "settings": dict(result.report.settings),
        "seconds": dict(result.report.seconds),
        "evaluations": dict(result.report.evaluations),
        "rows": rows,
        "analytic": {n: {"name": each.name, "mean": each.mean, "median": each.median} for n, each in best.items()},
        "fresh": fresh_rows,
    }
    out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    out.with_suffix(".md").write_text(_markdown(data))
    print(out.with_suffix(".md").read_text())


def _later(model: demo.DemoModel, noise: torch.Tensor, labels: list[int], store: Path | None) -> olss_fast.Report:
    """All analytic solvers at `MORE_STEPS` on the noise that judged the tuned plans; kept in the store, if any."""
    kept = store / "analytic-at-more-steps.json" if store else None
    if kept and kept.exists():
        return olss_fast.Report.from_json(kept)
    how = arguments(model, labels) | {"teacher_steps": 100}
    report = comparison.compare(model.network, noise=noise, schedule=model.schedule, steps=MORE_STEPS, **how)
    if kept:
        report.to_json(kept)
    return report


def _row(result: olss_fast.TuneResult, n: int, best: dict[int, Any]) -> dict[str, Any]:
    accepted = result.report.best(n)
    ours = {each.kind: each.mean for each in result.report.candidates if each.nfe == n and each.kind != "analytic"}
    return {
        "nfe": n,
        "accepted": accepted.name,
        "mean": accepted.mean,
        "median": accepted.median,
        "interval": accepted.interval(),
        "analytic": best[n].name,
        "analytic_mean": best[n].mean,
        "analytic_median": best[n].median,
        "ratio": accepted.mean / best[n].mean,
        "analytic_at_more": {m: best[m].mean for m in sorted(best) if m > n},
        "better_than_analytic_at": max((m for m in sorted(best) if best[m].mean > accepted.mean), default=None),
        "ours": ours,
    }


def _fresh(
    model: demo.DemoModel, result: olss_fast.TuneResult, best: dict[int, Any], count: int
) -> list[dict[str, Any]]:
    """Fréchet distance to real images and to the teacher's samples, and class agreement, of `count` fresh samples."""
    noise, labels = draw_noise(model, count, 12345), pick_labels(model, count)
    how = arguments(model, labels)
    classifier, reference = demo.classifier(), demo.reference_statistics()
    plans = {"teacher": result.report.teacher}
    for n in (5, 8):
        plans |= {f"OLSS, {n} NFE": result.plans[n], f"{best[n].name}, {n} NFE": best[n].plan}
    rows, teacher = [], None
    for name, plan in plans.items():
        images = olss_fast.sample(model.network, plan, noise, batch_size=64, **how)
        features = metrics.extract_features(images, classifier)
        teacher = features if teacher is None else teacher
        agreement = metrics.class_agreement(images, labels, classifier)
        row = {"sampler": name, "frechet": metrics.frechet_distance(features, reference), "agreement": agreement}
        rows.append(row | {"frechet_to_teacher": metrics.frechet_distance(features, teacher), "samples": count})
        print(rows[-1])
    return rows


def _environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "olss_fast": olss_fast.__version__,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _markdown(data: dict[str, Any]) -> str:
    lines = [
        "| NFE | accepted | RMSE to teacher (mean, 95%) | best analytic | its RMSE | ratio | better than analytic at |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['nfe']} | {row['accepted']} | {row['mean']:.4f} ({low:.4f}-{high:.4f}) | {row['analytic']} "
            f"| {row['analytic_mean']:.4f} | {row['ratio']:.2f} | {row['better_than_analytic_at'] or '-'} NFE |"
        )
    lines += [
        "",
        "| sampler | Fréchet distance to real images | to the teacher's samples | class agreement |",
        "|---|---|---|---|",
    ]
    for row in data["fresh"]:
        figures = f"{row['frechet']:.3f} | {row['frechet_to_teacher']:.3f} | {100 * row['agreement']:.1f}%"
        lines.append(f"| {row['sampler']} | {figures} |")
    environment = ", ".join(f"{key} {value}" for key, value in data["environment"].items())
    return "\n".join([*lines, "", f"Samples: {data['settings']['samples']}. {environment}.", ""])


if __name__ == "__main__":
    typer.run(main)
