"""Path planning: at which of the teacher's T evaluations a student of n evaluations should ask the network.

Duan et al., *Optimal Linear Subspace Search*, CIKM 2023, section 4.3. The teacher's states x_0 … x_T and outputs
e_0 … e_{T-1} are combinations of the recorded basis [x_T | f_0 … f_{T-1}] = Q R, so all lengths and distances are those
of short vectors: state j is R ρ_j, output i is column 1 + i of R. M is the number of recorded values in each tensor.

A path is 0 = s_1 < … < s_n < T. Its k-th stride leads from s_k to s_{k+1} (s_{n+1} = T) with the error

    err(j | s_1 … s_k) = min_w ‖[x_{s_k}, e_{s_1} … e_{s_k}] w − x_j‖ / √M,   j = s_{k+1}.

`plan_path` takes, from every prefix, the farthest next state whose error is at most D, for the least D that lets n
strides reach T. `refine_all` then looks near a path for a smaller *deployed* error: that of the sample, formed as a
student forms it,

    min_w ‖[x_0, e_{s_1} … e_{s_n}] w − x_T‖ / √M.

The work is done in C++ (`csrc/`), without the interpreter's lock. An error below 1e-12 of the state's length counts as
0, and a column of which less than 1e-10 is left beside the others as collinear with them: both are rounding.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from olss_fast import _C
from olss_fast.errors import InputError
from olss_fast.support.arguments import checked_count

__all__ = ["PathPlan", "measure_path", "plan_path", "refine_all", "uniform_path"]

Matrix = npt.NDArray[np.float64]

#: By default a plan is proven up to this many teacher steps, where it takes about a millisecond.
PROVEN_STEPS = 200
#: Values beyond this cannot be squared after a product of two.
LARGEST = 1e70
#: How many prefixes a proof visits at most by default: bounds the time on unusual trajectories.
PROOF_VISITS = 10_000


@dataclass(frozen=True)
class PathPlan:
    """A path and its errors, all root mean squares over the recorded values.

    path            (n,) indices of teacher evaluations, strictly increasing, the first one 0
    stride_errors   (n,) error of every stride
    deployed_error  error of the sample formed from the initial noise and all n outputs
    threshold       the least feasible D of `plan_path`; None for other paths
    proven          whether every smaller D was excluded. Otherwise only those just below are, and feasibility is taken
                    to be monotone, as it is on smooth trajectories
    """

    path: tuple[int, ...]
    stride_errors: tuple[float, ...]
    deployed_error: float
    threshold: float | None = None
    proven: bool = False

    @property
    def max_stride_error(self) -> float:
        """The error of the worst stride: D, unless the path had to be lengthened to n nodes."""
        return max(self.stride_errors)


def uniform_path(teacher_steps: int, steps: int) -> tuple[int, ...]:
    """The evenly spaced path ⌊i T / n⌋ (OLSS-P).

    Raises:
        InputError: if not 1 <= steps <= teacher_steps.
    """
    _checked_steps(steps, teacher_steps)
    return tuple(i * teacher_steps // steps for i in range(steps))


def plan_path(
    r: npt.ArrayLike, rows: npt.ArrayLike, steps: int, *, samples_count: int = 1, proof_visits: int | None = None
) -> PathPlan:
    """The path of n = `steps` evaluations whose worst stride is the least that greedy strides reach.

    D is exact: it is one of the stride errors compared. If fewer than n strides reach T at that D (an easy trajectory),
    the worst strides are divided until there are n.

    Args:
        r: (T+1, T+1) upper triangular factor R of the recorded basis.
        rows: (T+1, T+1) the teacher's rows ρ_j, strictly causal.
        steps: n.
        samples_count: M, by which squares are divided. 1 leaves errors as lengths.
        proof_visits: how many prefixes may be visited to prove that no smaller D is feasible; 0 for no proof. By
            default 10,000 up to T = 200 (about a millisecond at T = 100, n = 10) and 0 beyond, where a proof takes
            a second or so.

    Raises:
        InputError: for arrays of another shape, not finite, not triangular or not causal, or an unusable number.
    """
    r, rows = _checked_arrays(r, rows)
    teacher_steps = len(r) - 1
    _checked_steps(steps, teacher_steps)
    if proof_visits is None:
        proof_visits = PROOF_VISITS if teacher_steps <= PROVEN_STEPS else 0
    visits = checked_count("proof_visits", proof_visits, least=0)
    scale = _scale(samples_count)
    measured, threshold, proven = _C.plan(r, rows, operator.index(steps), visits)
    return _path_plan(measured, scale, threshold * scale, proven)


def measure_path(r: npt.ArrayLike, rows: npt.ArrayLike, path: Sequence[int], *, samples_count: int = 1) -> PathPlan:
    """The errors of a given path; arguments and errors raised as in `plan_path`."""
    r, rows = _checked_arrays(r, rows)
    return _path_plan(_C.measure(r, rows, _checked_path(path, len(r) - 1)), _scale(samples_count))


def refine_all(
    r: npt.ArrayLike,
    rows: npt.ArrayLike,
    path: Sequence[int],
    *,
    samples_count: int = 1,
    beam: int = 8,
    slack: float = 2.0,
    keep: int = 4,
) -> tuple[PathPlan, ...]:
    """Up to `keep` distinct paths near `path` by deployed error, the best first.

    A beam of prefixes grows node by node, each scored with the rest of `path` stretched behind it. What it finds, and
    `path` itself, is then improved by moving single nodes until no move gains.

    Args:
        r, rows, samples_count: as in `plan_path`.
        path: (n,) the path to start from.
        beam: how many prefixes are kept; 0 for moves alone.
        slack: no stride error may exceed `slack` times the largest one of `path`. Without such a bound the teacher's
            last outputs alone describe the sample well, but a student cannot get to where they are asked for.
        keep: how many paths to return at most.

    Raises:
        InputError: as `plan_path`; for a path that is not 0 = s_1 < … < s_n < T, or slack < 1.
    """
    r, rows = _checked_arrays(r, rows)
    start, scale = _checked_path(path, len(r) - 1), _scale(samples_count)
    width, most = checked_count("beam", beam, least=0), checked_count("keep", keep, least=1)
    if not slack >= 1:
        raise InputError(f"slack is {slack!r}, expected at least 1: the path to start from must be within the bound")
    bound = float(slack) * max(_C.measure(r, rows, start)[1])
    return tuple(_path_plan(found, scale) for found in _C.improve(r, rows, start, bound, width, most))


def _path_plan(
    measured: tuple[list[int], list[float], float], scale: float, threshold: float | None = None, proven: bool = False
) -> PathPlan:
    path, errors, deployed = measured
    return PathPlan(tuple(path), tuple(error * scale for error in errors), deployed * scale, threshold, proven)


def _scale(samples_count: int) -> float:
    return float(1 / np.sqrt(checked_count("samples_count", samples_count, least=1)))


def _checked_steps(steps: int, teacher_steps: int) -> None:
    if checked_count("steps", steps, least=1) > checked_count("teacher_steps", teacher_steps, least=1):
        raise InputError(
            f"steps is {steps}, expected at most {teacher_steps}, the teacher's: ask for fewer, or record more"
        )


def _checked_path(path: Sequence[int], teacher_steps: int) -> tuple[int, ...]:
    nodes = tuple(checked_count("a node of the path", node, least=0) for node in path)
    rising = all(a < b for a, b in itertools.pairwise(nodes))
    if not nodes or nodes[0] != 0 or nodes[-1] >= teacher_steps or not rising:
        raise InputError(
            f"path is {list(nodes)}, expected increasing teacher indices from 0 to at most {teacher_steps - 1}, 0 first"
        )
    return nodes


def _checked_arrays(r: npt.ArrayLike, rows: npt.ArrayLike) -> tuple[Matrix, Matrix]:
    checked = _square(r, "r"), _square(rows, "rows")
    if checked[0].shape != checked[1].shape:
        raise InputError(f"r has shape {checked[0].shape} and rows {checked[1].shape}, expected the same: (T+1, T+1)")
    if _lower_nonzero(checked[0]).any():
        raise InputError("r has values below its diagonal, expected the upper triangular factor of a QR: numpy.triu(r)")
    if (acausal := _lower_nonzero(checked[1].T)).any():
        column, j = np.argwhere(acausal)[0]
        raise InputError(
            f"rows[{j}, {column}] is {checked[1][j, column]:.6g}, expected 0: state {j} cannot use "
            f"output {column - 1}, which is computed from it or later"
        )
    return checked


def _lower_nonzero(array: Matrix) -> npt.NDArray[np.bool_]:
    below: npt.NDArray[np.bool_] = np.tri(len(array), k=-1, dtype=np.bool_) & (array != 0)
    return below


def _square(value: npt.ArrayLike, name: str) -> Matrix:
    try:
        array = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is not an array of numbers: {error}") from error
    if array.ndim != 2 or array.shape[0] != array.shape[1] or len(array) < 2:
        raise InputError(f"{name} has shape {array.shape}, expected (T+1, T+1), T >= 1: a column per recorded tensor")
    if not (largest := max(array.max(), -array.min())) <= LARGEST:
        if np.isfinite(largest):
            raise InputError(
                f"{name} has values up to {largest:.3g}, expected at most {LARGEST:g}: squares would overflow"
            )
        i, j = np.argwhere(~np.isfinite(array))[0]
        raise InputError(f"{name}[{i}, {j}] is {array[i, j]}, expected finite numbers: check what was recorded")
    return array
