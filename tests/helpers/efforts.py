"""Efforts for tests: the least there is, one that takes every step once, and one whose fits get better step by step."""

from __future__ import annotations

from olss_fast.tuning.study import Effort

LEAST = Effort(
    polish_iterations=1, jacobian_samples=1, jacobian_evaluations=1, path_samples=1, node_moves=(), split_up_to=0
)
LITTLE = Effort(
    polish_iterations=1, jacobian_samples=4, jacobian_evaluations=40, path_samples=4, node_moves=(2,), split_up_to=0
)
SOME = Effort(polish_iterations=2, jacobian_samples=8, path_samples=6, node_moves=(4,), split_up_to=3)
