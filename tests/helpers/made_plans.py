"""Plans made for tests: one small enough to be written out, and others split in two branches."""

from __future__ import annotations

import numpy as np

from olss_fast import Plan


def small_plan(**changes: object) -> Plan:
    """Two evaluations, one noise: rows over [x_T, f_0, f_1, z_1]."""
    values = {
        "timesteps": [900.0, 400.0],
        "rows": [[1, 0, 0, 0], [2, -1.5, 0, 0], [3, -2, -0.25, 0.5]],
        "alphas": [0.1, 0.5, 1],
        "sigmas": [0.9, 0.5, 0],
        "metadata": {"method": "test"},
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def split(plan: Plan, scale: float) -> Plan:
    """The same deterministic sampler with u and c in columns of their own, each output f = (1 - scale) u + scale c."""
    halves = plan.rows[:, 1:, None] * np.array([1.0 - scale, scale])
    return plan.replace(rows=np.concatenate([plan.rows[:, :1], halves.reshape(len(halves), -1)], axis=1), branches=2)
