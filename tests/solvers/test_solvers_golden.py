"""The plans of all analytic solvers, pinned: a refactor must leave every coefficient where it is.

tests/golden/solvers.safetensors holds rows and timesteps of every solver on every kind of schedule. After a change that
is meant to move coefficients, write it anew and look at what moved before committing it:

    python tests/solvers/test_solvers_golden.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from olss_fast import solvers
from olss_fast.plan.plan import Plan
from olss_fast.schedule.noise_schedule import SPACINGS, NoiseSchedule

GOLDEN = Path(__file__).parents[1] / "golden" / "solvers.safetensors"
SD = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "vp_epsilon": NoiseSchedule.named("scaled_linear", **SD),
    "vp_zero_snr_v": NoiseSchedule.named("scaled_linear", **SD, prediction_type="v_prediction", zero_terminal_snr=True),
    "cosine_sample": NoiseSchedule.named("squaredcos_cap_v2", prediction_type="sample"),
    "ve_epsilon": NoiseSchedule.ve(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(shift=3.0),
}
Make = tuple[Callable[..., Plan], dict[str, Any]]
PLANS: dict[str, Make] = {
    "ddim": (solvers.ddim, {"steps": 5}),
    "ddim_eta": (solvers.ddim, {"steps": 5, "eta": 0.5}),
    "euler": (solvers.euler, {"steps": 5}),
    "euler_ancestral": (solvers.euler_ancestral, {"steps": 5}),
    "heun": (solvers.heun, {"steps": 5}),
    "heun_even": (solvers.heun, {"steps": 4}),
    "pndm": (solvers.pndm, {"steps": 6}),
    "pndm_runge_kutta": (solvers.pndm, {"steps": 13, "runge_kutta": True}),
    **{f"dpm_solver_{p}": (solvers.dpm_solver, {"steps": 5, "order": p}) for p in (2, 3)},
    **{f"dpm_solver_{p}_data": (solvers.dpm_solver, {"steps": 5, "order": p, "space": "data"}) for p in (2, 3)},
    **{f"dpm_solver_pp_{p}": (solvers.dpm_solver_pp, {"steps": 5, "order": p}) for p in (1, 2, 3)},
    **{
        f"dpm_solver_pp_{p}_exact": (solvers.dpm_solver_pp, {"steps": 5, "order": p, "variant": "exact"})
        for p in (2, 3)
    },
    **{
        f"unipc_{p}_{v}": (solvers.unipc, {"steps": 5, "order": p, "variant": v})
        for p in (1, 2, 3)
        for v in ("bh1", "bh2")
    },
    **{f"deis_{p}": (solvers.deis, {"steps": 5, "order": p}) for p in (1, 2, 3)},
    **{f"ipndm_{p}": (solvers.ipndm, {"steps": 5, "order": p}) for p in (1, 2, 3, 4)},
    **{f"ddim_{spacing}": (solvers.ddim, {"steps": 4, "spacing": spacing}) for spacing in SPACINGS},
}


def test_the_golden_file_holds_exactly_these_plans() -> None:
    keys = {f"{schedule}/{name}/{part}" for schedule in SCHEDULES for name in PLANS for part in ("rows", "timesteps")}
    assert set(load_file(GOLDEN)) == keys


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plans_are_those_of_the_golden_file(schedule: str) -> None:
    pinned = load_file(GOLDEN)
    for name, (solver, settings) in PLANS.items():
        plan = solver(SCHEDULES[schedule], **settings)
        rows, timesteps = pinned[f"{schedule}/{name}/rows"], pinned[f"{schedule}/{name}/timesteps"]
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=1e-12, atol=1e-12, err_msg=name)
        # Room for another libm and BLAS only.
        np.testing.assert_allclose(plan.rows, rows, rtol=0, atol=1e-12 * max(1.0, np.abs(rows).max()), err_msg=name)


def write() -> None:
    """Writes the golden file from the solvers as they are now."""
    tensors = {}
    for schedule_name, schedule in SCHEDULES.items():
        for name, (solver, settings) in PLANS.items():
            plan = solver(schedule, **settings)
            tensors[f"{schedule_name}/{name}/rows"] = np.array(plan.rows)
            tensors[f"{schedule_name}/{name}/timesteps"] = np.array(plan.timesteps)
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    write()
