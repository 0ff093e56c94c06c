"""The Plan: a deterministic or stochastic sampler as data.

Symbols: S network evaluations (NFE), b branches (1, or 2 if the unconditional and the conditional output have separate
columns), Z fresh noises. The basis is

    [ x_T | f_0 … f_{S-1} | z_1 … z_Z ]          (b = 1)
    [ x_T | u_0 c_0 … u_{S-1} c_{S-1} | z_1 … ]  (b = 2)

x_T unit initial noise, f_i the raw output of evaluation i (u_i unconditional, c_i conditional), z_k unit noises.
Row i < S of `rows` forms the input of evaluation i, row S forms the sample; sampling computes only rows · basis.
Everything is float64, read-only, and checked when the plan is made.

Source: Duan et al., "Optimal Linear Subspace Search", CIKM 2023, section 3, where the coefficients are fitted; the
same form represents every linear sampler (DDIM, DPM-Solver++, UniPC, …).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from olss_fast.errors import InputError, PlanError
from olss_fast.support.text import a

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LARGEST_TIME = float(np.finfo(np.float32).max)  # networks get their timesteps as float32


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Plan:
    """A sampler of S network evaluations as timesteps and coefficients.

    Args (keyword only; anything `numpy.asarray` takes; copied, cast to float64, made read-only):
        timesteps: (S,) the timestep passed to the network at evaluation i, in the network's own unit. S >= 1. Within
            the range of float32, the dtype in which it is passed.
        rows: (S+1, 1 + S·branches + Z) coefficients over the basis. Strictly causal: row i is exactly 0 for every
            output of evaluation j >= i, which does not exist yet when row i is formed.
        alphas, sigmas: (S+1,) signal and noise level of each row, >= 0 and not both 0. For diagnosis and plots.
        models: (S,) integers >= 0: which network evaluates step i. Zeros if left out.
        branches: 1, or 2 for separate unconditional and conditional columns (1+2i and 2+2i of evaluation i).
        metadata: str -> str, facts for people and tools ("method", "spacing", "prediction_type", …).

    Raises:
        PlanError: a wrong shape or dtype, a non-finite value, a causality violation, unusable metadata.

    Two plans are equal if they are the same function: equal `timesteps`, `rows`, `models` and `branches`. The other
    fields are descriptive and ignored by equality and hash. Negative zeros become zeros, so equal means equal bytes.
    """

    timesteps: Floats
    rows: Floats
    alphas: Floats
    sigmas: Floats
    models: Integers
    branches: int
    metadata: Mapping[str, str]

    def __init__(
        self,
        *,
        timesteps: ArrayLike,
        rows: ArrayLike,
        alphas: ArrayLike,
        sigmas: ArrayLike,
        models: ArrayLike | None = None,
        branches: int = 1,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        times = _floats("timesteps", timesteps, dimensions=1)
        values: dict[str, object] = {
            "timesteps": times,
            "rows": _floats("rows", rows, dimensions=2),
            "alphas": _floats("alphas", alphas, dimensions=1),
            "sigmas": _floats("sigmas", sigmas, dimensions=1),
            "models": _integers("models", np.zeros(times.size, np.int64) if models is None else models),
            "branches": _branches(branches),
            "metadata": _metadata({} if metadata is None else metadata),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the only place where a frozen plan is written
        _check_shapes(self)
        _check_times(self)
        _check_levels(self)
        _check_causality(self)

    @property
    def nfe(self) -> int:
        """S, the number of network evaluations; a guided pair counts once."""
        return self.timesteps.size

    @property
    def columns(self) -> int:
        """Number of basis vectors: 1 + S·branches + Z."""
        return int(self.rows.shape[1])

    @property
    def noises(self) -> int:
        """Z, the number of fresh noises that a stochastic sampler draws; 0 for a deterministic one."""
        return self.columns - self.noise_slice.start

    @property
    def noise_slice(self) -> slice[int, int, None]:
        """The columns of z_1 … z_Z."""
        return slice(1 + self.nfe * self.branches, self.columns)

    def output_slice(self, evaluation: int) -> slice[int, int, None]:
        """The columns that hold the output of one evaluation, 0 <= evaluation < S. Raises PlanError outside."""
        if not hasattr(evaluation, "__index__") or not 0 <= evaluation < self.nfe:
            raise PlanError(f"evaluation {evaluation!r} was asked for; this plan has evaluations 0 to {self.nfe - 1}")
        start = 1 + evaluation * self.branches
        return slice(start, start + self.branches)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Name of every column: x_T, then f_i (or u_i, c_i with two branches), then z_k."""
        letters = "f" if self.branches == 1 else "uc"
        outputs = [f"{letter}_{i}" for i in range(self.nfe) for letter in letters]
        return ("x_T", *outputs, *(f"z_{k + 1}" for k in range(self.noises)))

    def replace(self, **changes: Any) -> Plan:
        """A copy with some fields changed, validated like any new plan: `plan.replace(metadata={...})`."""
        return Plan(**{**self._fields(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, which `Plan(**values)` takes."""
        values = self._fields().items()
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values}

    def describe(self, *, width: int = 120) -> str:
        """Facts and a table of times, noise levels and coefficients, for people. Lines are at most `width` long."""
        from olss_fast.plan.text import describe

        return describe(self, width=width)

    def point_mass_residual(self) -> Floats:
        """Deviation of each row's (signal, noise) from (alphas, sigmas) on point-mass data, (S+1, 2).

        About 1e-12 for every consistent analytic solver; fitted rows need not be small. See `plan.point_mass`.
        Raises PlanError where metadata["prediction_type"] is missing or unknown.
        """
        from olss_fast.plan.point_mass import point_mass_residual

        return point_mass_residual(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a plan file, atomically. Raises PlanFileError. The format is specified in `olss_fast.plan.file`."""
        from olss_fast.plan.file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan file. Raises PlanFileError."""
        from olss_fast.plan.file import load_plan

        return load_plan(path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        method = self.metadata.get("method", "unnamed")
        return f"Plan({method!r}, nfe={self.nfe}, columns={self.columns}, branches={self.branches})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies (copy, deepcopy, worker processes) go through the constructor: validated and read-only again.
        return partial(Plan, **self._fields()), ()

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"metadata": dict(self.metadata)}

    def _identity(self) -> tuple[int, bytes, bytes, bytes]:
        return self.branches, self.timesteps.tobytes(), self.rows.tobytes(), self.models.tobytes()


# --- conversion: every argument becomes a read-only array, or a PlanError ------------------------------------------


def _array(name: str, value: ArrayLike, kinds: str, dimensions: int) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise PlanError(f"{name} cannot be read as an array: {cause}; give a NumPy array or nested lists") from cause
    if array.dtype.kind not in kinds or array.ndim != dimensions:
        numbers = "integers" if "f" not in kinds else "real numbers"
        raise PlanError(
            f"{name} has dtype {array.dtype} and shape {array.shape}; expected {numbers} in {dimensions} dimension(s)"
        )
    return array


def _floats(name: str, value: ArrayLike, *, dimensions: int) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # a long double may become inf, which the next check names
        array = _array(name, value, "fiu", dimensions).astype(np.float64) + 0.0  # -0.0 + 0.0 == 0.0: canonical bytes
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise PlanError(f"{name}[{where}] is {array[tuple(bad[0])]}; every number of a plan must be finite")
    return _frozen(array)


def _integers(name: str, value: ArrayLike) -> Integers:
    array = _array(name, value, "iu", 1)
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int64).max):
        raise PlanError(f"{name} reaches from {array.min()} to {array.max()}; expected network numbers 0, 1, 2, …")
    return _frozen(array.astype(np.int64))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    # An array over `bytes` cannot be made writeable again, unlike one whose write flag was merely cleared.
    if array.size == 0:
        array.setflags(write=False)
        return array
    return np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)


def _branches(value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) not in (1, 2):
        raise PlanError(
            f"branches is {value!r}; expected 1 (guided output) or 2 (unconditional and conditional columns)"
        )
    return operator.index(value)


def _metadata(value: Mapping[str, str]) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise PlanError(f"metadata is a {type(value).__name__}; expected a mapping of str to str")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise PlanError(f"metadata[{key!r}] is {text!r}; keys and values must be str: write str(value)")
        try:
            (key + text).encode()
        except UnicodeEncodeError as cause:
            raise PlanError(f"metadata[{key!r}] is {text!r}, which is not valid Unicode text: {cause}") from cause
    return MappingProxyType(dict(sorted(value.items())))


# --- rules of the representation -----------------------------------------------------------------------------------


def _check_shapes(plan: Plan) -> None:
    steps = plan.timesteps.size
    if steps == 0:
        raise PlanError("timesteps is empty; a plan needs at least one network evaluation")
    expected = {"alphas": steps + 1, "sigmas": steps + 1, "models": steps}
    for name, length in expected.items():
        if (got := getattr(plan, name).size) != length:
            raise PlanError(f"{name} has {got} entries; expected {length} for {steps} timesteps")
    height, width = plan.rows.shape
    least = 1 + steps * plan.branches
    if height != steps + 1 or width < least:
        raise PlanError(
            f"rows has shape {(height, width)}; expected {steps + 1} rows and at least {least} columns for "
            f"{steps} timesteps and branches={plan.branches} (x_T, the outputs, then any noises)"
        )


def _check_times(plan: Plan) -> None:
    large = np.flatnonzero(np.abs(plan.timesteps) > LARGEST_TIME)
    if large.size:
        raise PlanError(
            f"timesteps[{large[0]}] is {plan.timesteps[large[0]]}; expected at most {LARGEST_TIME} in size, the "
            "largest float32, which networks are handed"
        )


def _check_levels(plan: Plan) -> None:
    for name, values in (("alphas", plan.alphas), ("sigmas", plan.sigmas)):
        if values.min() < 0:
            row = int(values.argmin())
            raise PlanError(f"{name}[{row}] is {values[row]}; signal and noise levels are never negative")
    empty = np.flatnonzero((plan.alphas == 0) & (plan.sigmas == 0))
    if empty.size:
        raise PlanError(f"alphas[{empty[0]}] and sigmas[{empty[0]}] are both 0; a row holds signal, noise or both")


def _check_causality(plan: Plan) -> None:
    outputs = plan.rows[:, 1 : plan.noise_slice.start]
    evaluation_of_column = np.arange(outputs.shape[1]) // plan.branches
    too_early = evaluation_of_column >= np.arange(plan.nfe + 1)[:, None]
    bad = np.argwhere(too_early & (outputs != 0))
    if len(bad):
        row, column = int(bad[0, 0]), int(bad[0, 1]) + 1
        evaluation = int(evaluation_of_column[column - 1])
        raise PlanError(
            f"rows[{row}, {column}] is {plan.rows[row, column]}; expected exactly 0: row {row} is formed before "
            f"evaluation {evaluation} has its output {plan.column_names[column]}"
        )


def checked_plan(plan: Any, name: str = "plan") -> Plan:
    """`plan`, or InputError unless it is a Plan."""
    if isinstance(plan, Plan):
        return plan
    hint = "read plan files with Plan.load" if isinstance(plan, (str, os.PathLike)) else "solvers.ddim(schedule, 20)"
    raise InputError(f"{name} is {a(plan)}; expected a Plan: {hint}")


def checked_plans(plans: Any, name: str) -> list[Plan]:
    """`plans` as a list, or InputError unless they are Plans."""
    try:
        listed = list(plans)
    except TypeError:
        raise InputError(f"{name} is {a(plans)}; expected a list of Plans") from None
    return [checked_plan(plan, f"{name}[{i}]") for i, plan in enumerate(listed)]
