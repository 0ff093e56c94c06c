"""The tables of a report, for a terminal or as plain text."""

from __future__ import annotations

import io
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from olss_fast.methods import ANALYTIC, is_olss, with_lines
from olss_fast.solvers.table import family_name

if TYPE_CHECKING:
    from olss_fast.report.report import Candidate, Report


def families(candidates: Iterable[Candidate]) -> dict[str, dict[int, Candidate]]:
    """For each family of the analytic candidates and each NFE the best of them, families in order of appearance.

    Those scored on more samples come before those dropped early, whose means are on too few to compare.
    """
    best: dict[str, dict[int, Candidate]] = {}
    for candidate in candidates:
        if candidate.kind != ANALYTIC:
            continue
        members = best.setdefault(family_name(candidate.plan), {})
        current = members.get(candidate.nfe)
        if current is None or (-candidate.samples, candidate.mean) < (-current.samples, current.mean):
            members[candidate.nfe] = candidate
    return best


def summary_table(report: Report) -> Table:
    """For each NFE OLSS, the best analytic solver, their ratio, at how many NFE analytic solvers are as good."""
    others = [method.title.removeprefix("OLSS, ").replace(" ", "\n", 1) for method in with_lines().values()]
    columns = ["NFE", "OLSS", "best\nanalytic", "which", "ratio", "analytic\nneeds", *others, "scored"]
    caption = (
        f"analytic needs: NFE at which the best analytic solver equals OLSS. scored: on all {report.held_out} "
        "samples, of those tried; the others were dropped after a few."
    )
    if near := report.near_teacher:
        caption += (
            f" At {', '.join(map(str, near))} NFE errors come near to the teacher's own: they could as well be smaller "
            "or larger. Give a longer teacher."
        )
    table = _table(_title(report), columns, caption, words="which")
    for nfe in report.nfes:
        if any(candidate.kind != ANALYTIC for candidate in report.at(nfe, partial=True)):
            table.add_row(*_summary_row(report, nfe))
    return table


def _table(title: str, columns: Sequence[str], caption: str, *, words: str = "") -> Table:
    """Columns of figures; the one called `words` is of words."""
    headings = [Column(name, justify="left" if name == words else "right") for name in columns]
    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    return Table(*headings, box=box.SIMPLE_HEAD, title=title, title_style="bold", caption=caption or None, **left)


def _summary_row(report: Report, nfe: int) -> list[str]:
    fitted, analytic = report.olss(nfe), report.find(nfe, ANALYTIC)
    ratio = fitted.mean / analytic.mean if fitted and analytic and analytic.mean > 0.0 else math.nan
    tried = report.at(nfe, partial=True)
    return [
        str(nfe),
        f"[bold]{number(fitted)}[/]" if fitted else "-",
        number(analytic),
        escape(analytic.name) if analytic else "-",
        "-" if math.isnan(ratio) else f"{ratio:.2f}",
        equivalent(report, fitted),
        *(number(report.find(nfe, kind)) for kind in with_lines()),
        f"{sum(each.samples == report.held_out for each in tried)}/{len(tried)}",
    ]


def guidance_table(report: Report) -> Table:
    """Guidance scales down; for each NFE the error of the accepted plan and its ratio to the best analytic one's."""
    rows = {(row.scale, row.nfe): row for row in report.guidance}
    nfes = sorted({row.nfe for row in report.guidance})
    columns = ["guidance", *(f"{nfe} NFE" for nfe in nfes)]
    table = _table("RMSE at guidance scales", columns, "(ratio to the best analytic plan)")
    for scale in sorted({row.scale for row in report.guidance}):
        cells = [rows.get((scale, nfe)) for nfe in nfes]
        table.add_row(f"{scale:g}", *(f"{c.tuned:.4f} ({c.tuned / c.analytic:.2f})" if c else "-" for c in cells))
    return table


def solver_table(report: Report) -> Table:
    """Solver families down, NFE across, each at its best order and spacing; the best of a column in bold."""
    words = "solver (best order and spacing)"
    dropped = any(candidate.samples < report.held_out for candidate in report.candidates)
    caption = f"~ dropped after a few samples; all others are on {report.held_out}." if dropped else ""
    table = _table(_title(report), [words, *(f"{nfe} NFE" for nfe in report.nfes)], caption, words=words)
    best = {nfe: min(each.mean for each in report.at(nfe, partial=True)) for nfe in report.nfes}
    for name, members in [*families(report.candidates).items(), *_fitted_rows(report)]:
        table.add_row(escape(name), *(_cell(members.get(nfe), report, best[nfe]) for nfe in report.nfes))
    if any(is_olss(candidate.kind) for candidate in report.candidates):
        table.add_section()
        table.add_row("best analytic equals OLSS at", *(equivalent(report, report.olss(nfe)) for nfe in report.nfes))
    return table


def _fitted_rows(report: Report) -> list[tuple[str, dict[int, Candidate]]]:
    fits = [each for each in report.candidates if each.kind != ANALYTIC]
    names = {each.kind: each.name for each in reversed(fits)}
    kinds = dict.fromkeys(each.kind for each in fits)
    return [(names[kind], {nfe: best for nfe in report.nfes if (best := report.find(nfe, kind))}) for kind in kinds]


def _cell(candidate: Candidate | None, report: Report, best: float) -> str:
    if candidate is None:
        return "-"
    if candidate.samples < report.held_out:
        return f"[dim]~{number(candidate)}[/]"
    return f"[bold]{number(candidate)}[/]" if candidate.mean == best else number(candidate)


def number(candidate: Candidate | None) -> str:
    """The mean error in as many digits as its size deserves, "-" for None."""
    if candidate is None:
        return "-"
    mean = candidate.mean
    return f"{mean:.4f}" if mean < 10.0 else f"{mean:.3g}"


def equivalent(report: Report, fitted: Candidate | None) -> str:
    """At how many NFE the best analytic solver is as good as `fitted`, "> most" beyond what was scored."""
    scored = [nfe for nfe in report.nfes if report.find(nfe, ANALYTIC)]
    if fitted is None or not scored:
        return "-"
    nfe = report.matching_nfe(fitted.mean)
    if math.isinf(nfe):
        return f"> {scored[-1]}"
    return f"≤ {scored[0]}" if nfe == scored[0] else f"{nfe:.1f}"


def render(table: Table, *, width: int | None = None) -> str:
    """The table as text: coloured on a terminal, plain elsewhere. `width` defaults to the terminal's."""
    terminal = sys.stdout.isatty()
    width = width or max(80, shutil.get_terminal_size((110, 24)).columns)
    how: dict[str, Any] = {"force_terminal": terminal, "no_color": not terminal, "highlight": False}
    console = Console(file=io.StringIO(), width=width, legacy_windows=False, **how)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _title(report: Report) -> str:
    own = "" if report.own_error is None else f" (its own error {report.own_error:.4f})"
    another, long = "", ""
    if report.own_run:
        another, long = " of another network", ". The network's own {} steps have {:.4f}".format(*report.own_run)
    teacher = f"{report.teacher.nfe}-step teacher{another}{own}"
    return f"RMSE to the {teacher} from the same noise, mean over {report.held_out} samples{long}"
