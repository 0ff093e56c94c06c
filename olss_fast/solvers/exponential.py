"""Exponential integration, shared by every solver that is exact when the network's answer is constant.

Between levels s and t, with h = lam_t - lam_s (Lu et al., DPM-Solver and DPM-Solver++, 2022; Zhang & Chen, DEIS, 2023):

    data   x_t = (sigma_t / sigma_s) x_s + alpha_t  int_0^h e^(u - h) x0(u)  du
    noise  x_t = (alpha_t / alpha_s) x_s - sigma_t  int_0^h e^(h - u) eps(u) du

With a constant integrand both are the same step, `transfer`. Higher orders add `factor(t) * sum_j w_j (v_j - v_0)`:
v_0 is the value at s, v_j the values at other nodes r_j (in units of h, 0 = s, 1 = t), and a *rule* gives the weights.
Writing them on differences keeps a point mass (all v equal) exact whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from olss_fast.solvers.tape import Level, Output, Tape, Vector

Rule: TypeAlias = "Callable[[float, Sequence[float], Space], Vector]"
"""rule(h, ratios, space) -> one weight for every ratio r_j."""

Node: TypeAlias = "tuple[Level, Vector]"
"""A level and the value (x0 or eps) found there."""

GROWTH_LIMIT = 25.0
"""Largest sum of |weights| relative to their sum; beyond it (nodes much closer together than the step) a step drops its
oldest node. Spacings of variance-preserving schedules stay below, but for third-order DPM-Solver++ in 15 and more steps
on spacings that end at the last timestep (36 to 56 in the last but one step)."""

SIGNAL_RATIO_LIMIT = 200.0
"""Largest alpha_t / alpha_s for which a noise-space step uses more than one node: its weights grow with this ratio.
Ho et al.'s schedule reaches 157; only starts (next to) without signal, as of the cosine schedule, lie beyond."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_QUADRATURE = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS


class Space(Enum):
    """Which of the two answers is held polynomial in lam. The value is the sign in the kernel e^(sign (u - h))."""

    DATA = 1.0
    NOISE = -1.0

    def of(self, output: Output) -> Vector:
        """x0 or eps of an evaluation."""
        return output.x0 if self is Space.DATA else output.eps

    def factor(self, target: Level) -> float:
        """The factor in front of the integral."""
        return target.alpha if self is Space.DATA else -target.sigma


def transfer(state: Vector, x0: Vector, source: Level, target: Level) -> Vector:
    """The step that is exact for a constant answer; DDIM (Song et al. 2021, eq. 12 with eta = 0)."""
    ratio = target.sigma / source.sigma
    return np.asarray(ratio * state + (target.alpha - source.alpha * ratio) * x0)


def moments(h: float, space: Space, count: int) -> Vector:
    """(count,) int_0^h e^(sign (u - h)) (u / h)^n du for n = 0 .. count-1."""
    nodes, weights = _QUADRATURE
    kernel = h * weights * np.exp(space.value * h * (nodes - 1.0))
    return np.asarray(np.power(nodes, np.arange(count)[:, None]) @ kernel)


def fit_weights(ratios: Sequence[float], targets: Vector) -> Vector:
    """Weights w with sum_j w_j r_j^n = targets[n-1], n = 1 .. len(ratios); inf where two ratios coincide."""
    r = np.asarray(ratios)
    if r.size == 1:
        return np.asarray(targets / r)
    try:
        return np.asarray(np.linalg.solve(r ** np.arange(1, r.size + 1)[:, None], targets))
    except np.linalg.LinAlgError:  # two nodes coincide in float64
        return np.full(r.size, np.inf)


def lagrange_rule(h: float, ratios: Sequence[float], space: Space) -> Vector:
    """The exact integral of the polynomial through 0 and all ratios."""
    return fit_weights(ratios, moments(h, space, len(ratios) + 1)[1:])


def midpoint_rule(h: float, ratios: Sequence[float], space: Space) -> Vector:
    """One other node: I_0 / 2 in place of I_1, the "midpoint" type of DPM-Solver-2. More nodes: exact."""
    if len(ratios) == 1:
        return fit_weights(ratios, 0.5 * moments(h, space, 1))
    return lagrange_rule(h, ratios, space)


def correction(target: Level, nodes: Sequence[Node], rule: Rule, space: Space) -> Vector | float:
    """The correction to `transfer` from the nodes beyond the first; nodes[0] is the source, the rest by preference.

    Drops nodes from the end while the weights would grow out of bounds, so unevenly spaced times stay well-conditioned.
    """
    (source, value), others = nodes[0], nodes[1:]
    if target.sigma == 0.0 or (space is Space.NOISE and target.alpha > SIGNAL_RATIO_LIMIT * source.alpha):
        return 0.0
    h = target.lam - source.lam
    while others:
        weights = rule(h, [(level.lam - source.lam) / h for level, _ in others], space)
        if _growth(weights, h, space) <= GROWTH_LIMIT:
            differences = np.stack([v - value for _, v in others])
            return np.asarray(space.factor(target) * (weights @ differences))
        others = others[:-1]
    return 0.0


def _growth(weights: Vector, h: float, space: Space) -> float:
    total = abs(np.expm1(-space.value * h))
    return float((abs(total - weights.sum()) + np.abs(weights).sum()) / total)


def multistep(tape: Tape, levels: Sequence[Level], orders: Sequence[int], rule: Rule, space: Space) -> Vector:
    """A linear multistep run over `levels` and on to the clean sample; step i uses the last orders[i] answers."""
    state = tape.start(levels[0])
    nodes: list[Node] = []
    for (level, target), order in zip(tape.path(levels), orders, strict=True):
        output = tape.evaluate(state, level)
        nodes = [(level, space.of(output)), *nodes]
        state = transfer(state, output.x0, level, target) + correction(target, nodes[:order], rule, space)
    return state


def falling_orders(steps: int, order: int) -> list[int]:
    """1, 2, .. order, .. order, 1: the last step is of order 1, in runs of fewer than 15 steps the one before of 2.

    The convention of DPM-Solver++ (Lu et al. 2022): extrapolating on to the clean sample is unstable.
    """
    orders = [min(i + 1, order) for i in range(steps)]
    if 1 < steps < 15:
        orders[-2] = min(orders[-2], 2)
    orders[-1] = 1
    return orders
