"""Plan.describe: the table, what is left out of a wide one, and text that must not reach a terminal as it is."""

from __future__ import annotations

import numpy as np
import pytest
from made_plans import small_plan

from olss_fast.plan.plan import Plan


def test_describe() -> None:
    metadata = {"method": "ddim", "spacing": "trailing", "prediction_type": "epsilon", "schedule": "cosine"}
    assert small_plan(metadata=metadata, models=[0, 1]).describe() == "\n".join(
        [
            "ddim · 2 evaluations · epsilon · trailing · 1 fresh noise",
            "",
            "  step  model  timestep  lambda  alpha  sigma  x_T   f_0    f_1  z_1",
            "     0      0       900  -2.197    0.1    0.9    1                 ·",
            "     1      1       400   0.000    0.5    0.5    2  -1.5           ·",
            "sample                      inf      1      0    3    -2  -0.25  0.5",
            "",
            "schedule  cosine",
        ]
    )


def test_describe_shows_the_newest_outputs_where_not_all_fit() -> None:
    rows = np.tril(np.arange(1.0, 31)[:, None] * np.ones((30, 30)))
    plan = Plan(timesteps=np.arange(29), rows=rows, alphas=np.ones(30), sigmas=np.ones(30), metadata={"order": "2"})
    lines = plan.describe(width=80).splitlines()
    assert lines[0] == "unnamed plan order 2 · 29 evaluations"
    assert lines[2].split()[5:] == ["x_T", "…", "f[i-4]", "f[i-3]", "f[i-2]", "f[i-1]"]
    assert lines[5].split()[5:] == ["3", "…", "3", "3"]
    assert lines[-1].split()[4:] == ["30", "…", "30", "30", "30", "30"]


@pytest.mark.parametrize("width", [70, 100, 200])
@pytest.mark.parametrize(("steps", "branches", "noises"), [(1, 1, 0), (2, 2, 3), (5, 1, 5), (40, 2, 0), (12, 1, 40)])
@pytest.mark.parametrize("scale", [1.0, -1e-300, 1e300])
def test_describe_keeps_to_the_width_and_shows_every_step(
    steps: int, branches: int, noises: int, scale: float, width: int
) -> None:
    rows = np.random.default_rng(0).standard_normal((steps + 1, 1 + steps * branches + noises)) * scale
    for row in range(steps + 1):
        rows[row, 1 + row * branches : 1 + steps * branches] = 0
    levels = np.geomspace(1e-4, 1, steps + 1)
    plan = Plan(timesteps=np.arange(steps) / 7, rows=rows, alphas=levels, sigmas=levels[::-1], branches=branches)
    plan = plan.replace(metadata={"method": "m" * 300, "path": "p" * 300})
    lines = plan.describe(width=width).split("\n")
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[3 : 4 + steps]] == [*map(str, range(steps)), "sample"]


def test_describe_escapes_what_would_drive_a_terminal() -> None:
    text = small_plan(metadata={"method": "\x1b[2J", "note\n": "a\r\nb", "name": "Jürgen"}).describe()
    assert "\x1b" not in text
    assert "\r" not in text
    assert r"\x1b[2J" in text
    assert r"a\r\nb" in text
    assert "Jürgen" in text
