"""The pictures: error against NFE, planned paths over the noise schedule, and grids of samples.

Nothing touches pyplot: each picture is a `Figure` of its own, drawn under its own settings and written atomically.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from olss_fast.errors import InputError
from olss_fast.methods import ANALYTIC, OLSS, with_lines
from olss_fast.report.images import to_uint8
from olss_fast.report.tables import families
from olss_fast.support.files import write_atomically
from olss_fast.support.folders import PathLike

if TYPE_CHECKING:
    from olss_fast.plan.plan import Plan
    from olss_fast.report.report import Candidate, Report

INK = "#1b2733"
MUTED = "#6b7785"
FAINT = "#c9d0d8"
ACCENT = "#d1411e"  # OLSS
BEST = "#1f5f99"  # the best analytic solver
MARGIN = 0.1  # inches around a picture
HEADROOM = 12.0
MOST_NAMED = 6  # up to so many step counts there is room for the names of the best solvers
LOG_SNR_LIMIT = 12.0  # a zero terminal SNR, or an end at sigma = 0, is drawn at this edge

STYLE: Any = {  # matplotlib types its keys one by one, in newer versions only
    "font.size": 11.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.titlepad": 12.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "olss_fast",
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@contextmanager
def picture(path: PathLike, size: tuple[float, float], dpi: int = 160) -> Iterator[Figure]:
    """A figure of `size` inches that is written to `path` when the block ends without an error."""
    path = Path(path)
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=MARGIN, h_pad=MARGIN)  # type: ignore[union-attr, call-arg]
        yield figure
        buffer = io.BytesIO()
        kind = path.suffix.lstrip(".").lower() or "png"
        if kind not in figure.canvas.get_supported_filetypes():
            raise InputError(f"{path.name} has the suffix {path.suffix!r}; pictures are written as .png, .svg or .pdf")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=None if kind == "png" else {"Date": None})
    write_atomically(path, buffer.getvalue())


def plot_error(report: Report, path: PathLike) -> Path:
    """Mean error against NFE, both logarithmic: each solver family at its best order and spacing, and the fits.

    Bands are 95 % bootstrap intervals of the mean, small dots the other orders and spacings. A family whose members
    were all dropped after a few samples is drawn without a mark there.
    """
    if not report.candidates:
        raise InputError("the report has no candidates to draw")
    with picture(path, (8.2, 5.2)) as figure:
        axes = figure.subplots()
        lines = [line for line in _lines(report) if line.points]
        for line in lines:
            _draw(axes, line)
        _dot_others(axes, report)
        if len(report.nfes) <= MOST_NAMED:
            _name_best(axes, report)
        _error_axes(axes, report)
        _label_ends(axes, lines)
        _legend(axes, report)
    return Path(path)


@dataclass(frozen=True)
class Line:
    """Some candidates, one an NFE; `main` lines have a band and a bold name at their end."""

    name: str
    points: Sequence[Candidate]
    colour: str
    style: Mapping[str, Any]
    main: bool = False


def _lines(report: Report) -> Iterator[Line]:
    for name, members in families(report.candidates).items():
        points = [members[nfe] for nfe in sorted(members) if math.isfinite(members[nfe].mean)]
        full = [each.samples == report.held_out for each in points]
        marks = {"marker": "o", "markersize": 3.5, "markevery": full}
        yield Line(name, points, MUTED, {"color": FAINT, "linewidth": 1.2, "zorder": 1, **marks})
    thick = {"marker": "o", "linewidth": 1.8, "markersize": 5, "zorder": 3}
    yield Line("best analytic", _best(report, ANALYTIC), BEST, thick, main=True)
    for kind, method in with_lines().items():
        if method.line:
            colour, dashes = method.line
            yield Line(method.title, _best(report, kind), colour, {"linestyle": dashes, "linewidth": 1.6, "zorder": 2})
    edged = {"linewidth": 3, "markersize": 8, "zorder": 4, "markeredgecolor": "white", "markeredgewidth": 1.2}
    yield Line("OLSS", _best(report, OLSS), ACCENT, thick | edged, main=True)


def _draw(axes: Axes, line: Line) -> None:
    nfes = [each.nfe for each in line.points]
    axes.plot(nfes, [each.mean for each in line.points], **{"color": line.colour, **line.style})
    if line.main:
        low, high = np.transpose([each.interval() for each in line.points])
        axes.fill_between(nfes, low, high, color=line.colour, alpha=0.13, linewidth=0, zorder=2)


def _dot_others(axes: Axes, report: Report) -> None:
    """The analytic solvers behind the best one."""
    others = [each for nfe in report.nfes for each in report.at(nfe, ANALYTIC)[1:] if math.isfinite(each.mean)]
    axes.plot([each.nfe for each in others], [each.mean for each in others], ".", color=FAINT, markersize=3, zorder=1)


def _name_best(axes: Axes, report: Report) -> None:
    """Which solver was the best analytic one, below each NFE."""
    place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
    for each in _best(report, ANALYTIC):
        name = each.name.replace(" (", "\n(")
        axes.annotate(name, (each.nfe, 0.0), (0, -24), fontsize=8, color=BEST, va="top", **place)


def _best(report: Report, kind: str) -> list[Candidate]:
    """The best of `kind`, and of `OLSS` its best variant, at each NFE that has one, with all samples scored and none
    diverged."""
    found = (report.olss(nfe) if kind == OLSS else report.find(nfe, kind) for nfe in report.nfes)
    return [best for best in found if best and math.isfinite(best.mean)]


def _error_axes(axes: Axes, report: Report) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(report.nfes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    low, high = axes.get_ylim()
    best = [each.mean for each in (*_best(report, ANALYTIC), *_best(report, OLSS))]
    high = min(high, HEADROOM * max(best, default=high))  # solvers that diverge must not flatten all others
    axes.set_ylim(low, high)
    ticks = [m * 10.0**e for e in range(-8, 9) for m in (1, 2, 3, 5) if low <= m * 10.0**e <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    named = len(report.nfes) <= MOST_NAMED and bool(_best(report, ANALYTIC))
    axes.set_xlabel(
        "network evaluations (NFE); below them the best analytic solver" if named else "network evaluations (NFE)",
        labelpad=30 if named else 4,
    )
    axes.set_ylabel("RMSE to the teacher")
    _title(axes, f"RMSE to the {report.teacher.nfe}-step teacher, mean over {report.held_out} held-out samples")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(within(text, axes.figure.get_figwidth() - 0.9, 13.0))  # type: ignore[union-attr]


def within(text: str, inches: float, size: float) -> str:
    """`text` broken into lines that a bold font of `size` points fits into `inches`."""
    return textwrap.fill(text, max(12, int(inches * 72.0 / (0.58 * size))))


def _legend(axes: Axes, report: Report) -> None:
    """Explains bands and grey marks; lines have their names at their ends."""
    full = {"marker": "o", "markersize": 3.5, "label": "grey: a family at its best; dot: scored on all samples"}
    rest = {"marker": ".", "markersize": 3, "linestyle": "", "label": "small dot: its other orders and spacings"}
    lines = [full, rest] if any(len(report.at(nfe, ANALYTIC)) > 1 for nfe in report.nfes) else []
    handles: list[Artist] = [Patch(color=ACCENT, alpha=0.13, label="band: 95% interval of the mean")]
    handles += [Line2D([], [], color=FAINT, **line) for line in lines]  # type: ignore[arg-type]
    axes.legend(handles=handles, loc="lower left", fontsize=9, frameon=False, labelcolor=MUTED, borderaxespad=0.2)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Names to the right of the last points, moved apart so that none covers another."""
    low, high = axes.get_ylim()
    ordered = sorted((line for line in lines if line.points[-1].mean <= high), key=lambda line: line.points[-1].mean)
    span = math.log(high / low)
    heights = spread([math.log(line.points[-1].mean / low) / span for line in ordered], gap=0.046)
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4, "relpos": (0.0, 0.5)}
    place: dict[str, Any] = {"textcoords": axes.get_yaxis_transform(), "va": "center", "annotation_clip": False}
    for line, height in zip(ordered, heights, strict=True):
        weight, end = "bold" if line.main else "normal", line.points[-1]
        where = (end.nfe, end.mean), (1.02, low * math.exp(height * span))
        axes.annotate(line.name, *where, color=line.colour, fontweight=weight, fontsize=10, arrowprops=leader, **place)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending `heights` moved as little as needed (least squares) to be `gap` apart: pooled adjacent violators."""
    blocks: list[tuple[float, int]] = []  # mean of (height - i * gap), how many
    for i, height in enumerate(heights):
        mean, count = height - i * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    levels = [mean for mean, count in blocks for _ in range(count)]
    return [level + i * gap for i, level in enumerate(levels)]


def log_snr(plan: Plan) -> NDArray[np.float64]:
    """log(alpha / sigma) at each evaluation (S,), cut at +-LOG_SNR_LIMIT."""
    with np.errstate(divide="ignore"):
        lam = np.log(plan.alphas[:-1]) - np.log(plan.sigmas[:-1])
    return np.asarray(np.clip(lam, -LOG_SNR_LIMIT, LOG_SNR_LIMIT), dtype=np.float64)


def plot_path(report: Report, path: PathLike) -> Path:
    """When each fitted sampler asks the network, on the log-SNR axis, above the same number of uniform times."""
    fits = _best(report, OLSS)
    if not fits:
        raise InputError("the report has no fitted sampler whose path could be drawn")
    with picture(path, (8.2, 1.9 + 0.52 * len(fits) + 1.1)) as figure:
        levels, paths = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 0.52 * len(fits) + 0.5])
        _draw_levels(levels, report.teacher)
        for row, fit in enumerate(fits):
            _draw_path(paths, report, fit, row)
        _path_axes(paths, fits)
    return Path(path)


def _draw_levels(axes: Axes, teacher: Plan) -> None:
    lam = log_snr(teacher)
    total = np.hypot(teacher.alphas[:-1], teacher.sigmas[:-1])
    for values, colour, name, end in ((teacher.sigmas, BEST, "noise σ", 0), (teacher.alphas, INK, "signal α", -1)):
        share = values[:-1] / total
        axes.plot(lam, share, color=colour, linewidth=1.8)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "left" if end == 0 else "right", "va": "bottom"}
        axes.annotate(name, (lam[end], share[end]), (0, 4), color=colour, fontsize=10, **place)
    axes.plot(lam, np.zeros_like(lam), "|", color=MUTED, markersize=6, alpha=0.6, clip_on=False)
    axes.text(lam[0], -0.09, f"ticks: the teacher's {teacher.nfe} steps", color=MUTED, fontsize=9, va="top")
    axes.set_ylim(0.0, 1.12)
    axes.set_yticks([0.0, 0.5, 1.0])
    axes.tick_params(axis="x", bottom=False)
    axes.set_ylabel("level")
    _title(axes, "When the network is asked: planned (filled) against uniform (hollow)")


def _draw_path(axes: Axes, report: Report, fit: Candidate, row: int) -> None:
    planned = log_snr(fit.plan)
    axes.plot(planned, np.full_like(planned, row), "-", color=ACCENT, linewidth=1.0, alpha=0.35, zorder=1)
    for even in report.at(fit.nfe, "olss-uniform"):
        uniform = log_snr(even.plan)
        style: dict[str, Any] = {"color": MUTED, "markerfacecolor": "white", "markersize": 4.5, "zorder": 2}
        axes.plot(uniform, np.full_like(uniform, row + 0.24), "o", **style)
    axes.plot(planned, np.full_like(planned, row), "o", color=ACCENT, markeredgecolor="white", markersize=8.5, zorder=3)


def _path_axes(axes: Axes, fits: Sequence[Candidate]) -> None:
    axes.set_yticks(range(len(fits)), [f"{fit.nfe} NFE" for fit in fits])
    axes.set_ylim(len(fits) - 0.45, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("log-SNR  log(α/σ), from noise to data")


def plot_grid(
    rows: Mapping[str, ArrayLike],
    path: PathLike,
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
    titles: Sequence[str] | None = None,
    heading: str | None = None,
    accent: str | None = None,
) -> Path:
    """The same noises (columns) through several samplers (rows).

    `rows` maps a name to images (K, C, H, W) in [-1, 1]; `errors` gives some rows their K RMSEs, written below each
    image; `titles` name the columns; the row called `accent` is highlighted.
    """
    images = {name: to_uint8(value, name) for name, value in rows.items()}
    counts = {name: len(value) for name, value in images.items()}
    if not images or min(counts.values()) < 1 or len(set(counts.values())) > 1:
        raise InputError(f"a grid needs the same number of images in every row, at least one; got {counts}")
    columns = next(iter(counts.values()))
    with picture(path, (1.9 + 0.92 * columns, 1.1 * len(images) + (0.75 if heading else 0.3))) as figure:
        figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02, hspace=0.0, wspace=0.0, rect=_inside(figure))
        cells = figure.subplots(len(images), columns, squeeze=False)
        for line, (name, values) in zip(cells, images.items(), strict=True):
            _draw_row(line, name, values, (errors or {}).get(name), name == accent)
        for axes, title in zip(cells[0], titles or (), strict=False):
            axes.set_title(title, fontsize=9, fontweight="normal", color=MUTED, pad=4, loc="center")
        if heading:
            heading = within(heading, figure.get_figwidth() - 2 * MARGIN, 13.0)
            figure.suptitle(heading, x=MARGIN / figure.get_figwidth(), ha="left", fontsize=13, fontweight="bold")
    return Path(path)


def _inside(figure: Figure) -> tuple[float, float, float, float]:
    """The figure without its margin, in shares of it."""
    width, height = figure.get_size_inches()
    return MARGIN / width, MARGIN / height, 1.0 - 2.0 * MARGIN / width, 1.0 - 2.0 * MARGIN / height


def _draw_row(
    cells: Sequence[Axes], name: str, images: NDArray[np.uint8], errors: Sequence[float] | None, accented: bool
) -> None:
    colour = ACCENT if accented else INK
    for i, (axes, image) in enumerate(zip(cells, images, strict=True)):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=accented, color=colour, linewidth=1.4)
        if errors is not None:
            axes.set_xlabel(f"{errors[i]:.3f}", fontsize=9, color=colour if accented else MUTED, labelpad=2)
    weight = "bold" if accented else "normal"
    label = cells[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=10)
    label.set(color=colour, fontsize=10.5, fontweight=weight)
