"""The report: statistics, JSON, tables and pictures, on made-up candidates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from olss_fast.errors import InputError
from olss_fast.plan.plan import Plan
from olss_fast.report import plots
from olss_fast.report.images import save_images, tile, to_uint8
from olss_fast.report.plots import log_snr, plot_grid, spread
from olss_fast.report.report import Candidate, Report
from olss_fast.report.tables import families
from olss_fast.support.folders import make_folder

HELD_OUT = 24
SPACINGS = ("trailing", "logsnr", "karras")


def make_plan(timesteps: np.ndarray, method: str, seed: int = 0, **metadata: str) -> Plan:
    """A causal plan at VP times (cosine levels) with arbitrary coefficients."""
    nfe = len(timesteps)
    angle = np.append(timesteps, 0.0) / 1000.0 * (math.pi / 2.0) * 0.996 + 0.003
    rows = np.tril(np.random.default_rng(seed).normal(size=(nfe + 1, nfe + 1)))
    return Plan(
        timesteps=timesteps,
        rows=rows,
        alphas=np.cos(angle),
        sigmas=np.sin(angle),
        metadata={"method": method, **metadata},
    )


def uniform_times(nfe: int) -> np.ndarray:
    return np.linspace(1000.0, 0.0, nfe + 1)[:-1] - 1.0


def errors(scale: float, samples: int, seed: int) -> tuple[float, ...]:
    return tuple(scale * np.random.default_rng(seed).lognormal(-0.1, 0.45, size=samples))


def analytic(nfe: int) -> list[Candidate]:
    found = []
    for i, (method, name, level, order) in enumerate(
        [
            ("ddim", "DDIM", 0.9, 0.75),
            ("dpm_solver_pp", "DPM-Solver++ 2M", 1.5, 1.5),
            ("unipc", "UniPC 2 bh2", 1.7, 1.65),
            ("deis", "DEIS 3", 1.4, 1.55),
            ("heun", "Heun", 6.0, 1.6),
        ]
    ):
        for j, spacing in enumerate(SPACINGS):
            seed = 100 * nfe + 10 * i + j
            scale = level * nfe**-order * 1.6 * (1 + 0.25 * j)
            samples = HELD_OUT if method != "heun" or nfe > 6 else 4
            plan = make_plan(uniform_times(nfe), method, seed, spacing=spacing)
            found.append(Candidate(f"{name} ({spacing})", "analytic", spacing, plan, errors(scale, samples, seed)))
    return found


def fitted(nfe: int) -> list[Candidate]:
    planned = 999.0 * (1.0 - (np.arange(nfe) / nfe) ** 0.8)
    levels = {"olss": 1.1, "olss-uniform": 1.5, "olss-published": 2.6}
    return [
        Candidate(
            kind,
            kind,
            "planned" if kind != "olss-uniform" else "uniform",
            make_plan(planned if kind != "olss-uniform" else uniform_times(nfe), "olss", nfe + i),
            errors(level * nfe**-1.6, HELD_OUT, nfe + i),
            path=tuple(range(nfe)),
            accepted=kind == "olss",
        )
        for i, (kind, level) in enumerate(levels.items())
    ]


def make_report(nfes: tuple[int, ...] = (4, 5, 6, 8, 10)) -> Report:
    candidates = [each for nfe in nfes for each in (*analytic(nfe), *fitted(nfe))]
    teacher = make_plan(uniform_times(100), "ddim")
    return Report(tuple(candidates), teacher, HELD_OUT, {"seed": 0}, {"record": 3200}, {"record": 1.5})


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


def candidate(nfe: int = 4, scores: tuple[float, ...] = (0.1, 0.2), kind: str = "analytic") -> Candidate:
    return Candidate("x", kind, "trailing", make_plan(uniform_times(nfe), "ddim"), scores)


def test_candidate_statistics() -> None:
    found = candidate(scores=(0.1, 0.2, 0.6))
    assert (found.nfe, found.samples) == (4, 3)
    assert found.mean == pytest.approx(0.3)
    assert found.median == pytest.approx(0.2)
    low, high = found.interval()
    assert 0.1 <= low < found.mean < high <= 0.6


@pytest.mark.parametrize("scores", [(), (math.nan,), (0.1, -0.1)])
def test_candidate_refuses_impossible_errors(scores: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="expected at least one RMSE"):
        candidate(scores=scores)


def test_report_refuses_more_scores_than_samples() -> None:
    with pytest.raises(InputError, match="scored on 2 samples, but held_out is 1"):
        Report((candidate(),), make_plan(uniform_times(9), "ddim"), 1)


def test_best_looks_only_at_full_scores() -> None:
    lucky, honest = candidate(scores=(0.01,)), candidate(scores=(0.2, 0.2))
    report = Report((lucky, honest), make_plan(uniform_times(9), "ddim"), 2)
    assert report.best(4) is honest
    assert report.at(4, partial=True) == [lucky, honest]
    assert report.find(5) is None
    with pytest.raises(InputError, match="no 'olss' candidate of 4 NFE"):
        report.best(4, "olss")


def test_matching_nfe_is_exact_on_a_power_law() -> None:
    """With error 8 n^-2 the log-linear interpolation between 4 (0.5) and 8 (0.125) is 6 at 0.25."""
    scored = tuple(candidate(nfe, (8.0 * nfe**-2.0,) * 2) for nfe in (4, 8, 10))
    report = Report(scored, make_plan(uniform_times(9), "ddim"), 2)
    assert report.matching_nfe(0.25) == pytest.approx(6.0)
    assert report.matching_nfe(0.125) == 8.0
    assert report.matching_nfe(0.7) == 4.0
    assert report.matching_nfe(0.01) == math.inf


def test_json_round_trip_is_exact(report: Report, tmp_path: Path) -> None:
    diverged = candidate(scores=(0.5, math.inf))
    report = Report((*report.candidates, diverged), report.teacher, HELD_OUT, report.settings)
    path = report.to_json(tmp_path / "report.json")
    again = Report.from_json(path)
    assert again.to_dict() == report.to_dict()
    assert again.teacher == report.teacher
    assert [each.plan for each in again.candidates] == [each.plan for each in report.candidates]
    assert again.candidates[-1].errors == (0.5, math.inf)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[1, 2]", "no olss_fast.report"),
        ('{"format": "olss_fast.report", "version": 99}', "version 99"),
        ('{"format": "olss_fast.report", "version": 1}', "damaged"),
        ('{"format": "olss_fast.report", "version": 1, "candidates": [1]}', "damaged"),
    ],
)
def test_bad_report_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Report.from_json(path)


@pytest.mark.parametrize("told", ["x", "nan", "-1"])
def test_bad_errors_of_teachers_are_named(told: str, report: Report) -> None:
    data = report.to_dict()
    data["teacher"]["metadata"]["own_error"] = told
    with pytest.raises(InputError, match=f"damaged.*{told}"):
        Report.from_dict(data)


@pytest.mark.parametrize("told", [3, {}, {"steps": 50, "error": "x"}, {"steps": "x", "error": 0.1}])
def test_bad_long_runs_are_named(told: object, report: Report) -> None:
    data = report.to_dict()
    data["settings"]["own_run"] = told
    with pytest.raises(InputError, match="damaged"):
        Report.from_dict(data)


def test_missing_report_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        Report.from_json(tmp_path / "none.json")


def test_summary_table_states_the_comparison(report: Report) -> None:
    lines = report.table(width=110).splitlines()
    (line,) = (line for line in lines if line.strip().startswith("5 "))
    best, peer = report.best(5, "olss"), report.best(5, "analytic")
    for part in (f"{best.mean:.4f}", f"{peer.mean:.4f}", peer.name, f"{best.mean / peer.mean:.2f}", "15/18"):
        assert part in line
    assert "\x1b" not in report.table()


def test_solver_table_says_when_analytic_solvers_catch_up(report: Report) -> None:
    text = report.solver_table()
    assert "DPM-Solver++" in text
    assert "~" in text  # Heun, dropped early at 4 to 6 NFE
    (line,) = (line for line in text.splitlines() if "equals OLSS" in line)
    assert f"{report.matching_nfe(report.best(4, 'olss').mean):.1f}" in line
    assert "> 10" in line


def test_names_are_no_markup() -> None:
    plan = make_plan(uniform_times(4), "[/bold]")
    odd = [Candidate("[/dim]", kind, "trailing", plan, (0.1, 0.2)) for kind in ("analytic", "olss")]
    report = Report(tuple(odd), make_plan(uniform_times(9), "ddim"), 2)
    assert "[/bold]" in report.solver_table()
    assert "[/dim]" in report.solver_table()
    assert "[/dim]" in report.table()


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    assert list(make_folder(tmp_path / "a" / "b").iterdir()) == []  # the trial leaves nothing
    if not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(InputError, match="the folder /proc cannot be written"):
        make_folder("/proc")


def test_families_prefer_full_scores() -> None:
    lucky, honest = candidate(scores=(0.01,)), candidate(scores=(0.2, 0.2))
    assert families([lucky, honest])["DDIM"][4] is honest


def test_plots_are_written(report: Report, tmp_path: Path) -> None:
    paths = report.plot(tmp_path / "new")
    assert [path.name for path in paths] == ["error.png", "path.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert report.plot_error(tmp_path / "error.svg").read_text().startswith("<?xml")


def test_analytic_only_report_has_no_path(tmp_path: Path) -> None:
    report = Report(tuple(analytic(4)), make_plan(uniform_times(20), "ddim"), HELD_OUT)
    assert [path.name for path in report.plot(tmp_path)] == ["error.png"]
    with pytest.raises(InputError, match="no fitted sampler"):
        report.plot_path(tmp_path / "path.png")
    assert "OLSS" not in report.solver_table()


def test_unknown_picture_suffix(report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"suffix '.bmpx'"):
        report.plot_error(tmp_path / "error.bmpx")


def test_log_snr_is_finite_at_zero_terminal_snr() -> None:
    plan = Plan(timesteps=[999.0], rows=[[1.0, 0.0], [0.0, 1.0]], alphas=[0.0, 1.0], sigmas=[1.0, 0.0])
    assert np.isfinite(log_snr(plan)).all()


def test_spread_keeps_order_and_gap() -> None:
    heights = [0.1, 0.11, 0.12, 0.5, 0.9, 0.91]
    moved = spread(heights, gap=0.05)
    assert min(np.diff(moved)) >= 0.05 - 1e-12
    assert moved[3] == 0.5
    assert np.mean(moved[:3]) == pytest.approx(np.mean(heights[:3]))


def test_grid(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, size=(3, 1, 8, 8))
    path = plot_grid(
        {"teacher": images, "OLSS": images}, tmp_path / "grid.png", errors={"OLSS": [0.1] * 3}, accent="OLSS"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="same number of images"):
        plot_grid({"teacher": images, "OLSS": images[:2]}, tmp_path / "grid.png")


def test_titles_stay_inside_the_picture(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn lies within the figure: of a narrow grid with a long heading, and of both plots."""
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "Figure", lambda **how: drawn.append(Figure(**how)) or drawn[-1])
    images = {"DPM-Solver++ 3M exact\n(trailing)": np.zeros((2, 1, 8, 8))}
    plot_grid(images, tmp_path / "grid.png", heading="The same noises at 5 network evaluations; below each its RMSE")
    report.plot(tmp_path)
    assert len(drawn) == 3
    for figure in drawn:
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) >= 0.0
        assert box.x1 <= width
        assert box.y1 <= height
    heading, first = drawn[0]._suptitle, drawn[0].axes[0]  # type: ignore[attr-defined]
    assert heading.get_window_extent().y0 >= first.get_window_extent().y1


def test_the_plot_says_what_is_in_it(report: Report, tmp_path: Path) -> None:
    with rc_context({"svg.fonttype": "none"}):  # text as text
        text = report.plot_error(tmp_path / "error.svg").read_text()
    for words in ("RMSE to the teacher", "band: 95% interval of the mean", "small dot: its other orders and spacings"):
        assert words in text


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 32, 32)), (5, (3, 16, 24)), (2, (1, 600, 600))])
def test_grids_are_large_enough_to_look_at(count: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    labels = ["a label that is longer than its image is wide, which takes some words"] * count
    path = save_images(np.zeros((count, *shape)), tmp_path, labels)[-1]
    width, height = Image.open(path).size
    columns = math.ceil(math.sqrt(count))
    factor = 1 if shape[-1] >= 512 else math.ceil(512 / (columns * shape[-1]))
    assert width == columns * (factor * shape[-1] + 4) - 4 >= 512
    assert height == math.ceil(count / columns) * (factor * shape[1] + 16 + 4) - 4
    strip = np.asarray(Image.open(path).convert("L"))[factor * shape[1] : factor * shape[1] + 16]
    assert (strip < 100).any()


def test_pixels_are_clamped_and_rounded() -> None:
    images = np.array([-9.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    assert to_uint8(images).tolist() == [[[0, 0], [128, 255]]]
    assert to_uint8(np.zeros((2, 3, 4, 5))).shape == (2, 4, 5, 3)
    with pytest.raises(InputError, match="grey or RGB"):
        to_uint8(np.zeros((2, 4, 5, 5)))


def test_images_are_saved_one_by_one_and_tiled(tmp_path: Path) -> None:
    paths = save_images(np.zeros((5, 1, 4, 4)), tmp_path / "out")
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(5)] + ["grid.png"]
    sheet = tile(np.zeros((5, 4, 4), dtype=np.uint8))
    assert sheet.shape == (2 * 6 - 2, 3 * 6 - 2)
    assert (sheet == 0).sum() == 5 * 16
