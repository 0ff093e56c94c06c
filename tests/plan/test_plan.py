"""The Plan: what it accepts, what it refuses and how it says so, equality, copies."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_plans import small_plan

from olss_fast.errors import PlanError
from olss_fast.plan.plan import LARGEST_TIME, Plan

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TIMES = st.floats(min_value=-LARGEST_TIME, max_value=LARGEST_TIME)
LEVELS = st.floats(min_value=1e-300, max_value=1e300)
# No deadline: the machine that runs the tests may be busy.
PROPERTY = settings(deadline=None, max_examples=50)
ARRAYS = ("timesteps", "rows", "alphas", "sigmas")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan of the representation, with numbers over the whole range of float64."""
    steps, branches, noises = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2])), draw(st.integers(0, 3))
    rows = draw(arrays(np.float64, (steps + 1, 1 + steps * branches + noises), elements=FINITE))
    for row in range(steps + 1):
        rows[row, 1 + row * branches : 1 + steps * branches] = 0
    return Plan(
        timesteps=draw(arrays(np.float64, steps, elements=TIMES)),
        rows=rows,
        alphas=draw(arrays(np.float64, steps + 1, elements=LEVELS)),
        sigmas=draw(arrays(np.float64, steps + 1, elements=LEVELS)),
        models=draw(arrays(np.int64, steps, elements=st.integers(0, 2**62))),
        branches=branches,
        metadata=draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)),
    )


# --- making one ----------------------------------------------------------------------------------------------------


def test_fields_are_float64_copies_that_nobody_can_write() -> None:
    rows = np.array([[1, 0], [2, 3]], dtype=np.float32)
    plan = Plan(timesteps=[5], rows=rows, alphas=[1, 1], sigmas=[1, 0])
    rows[:] = 7
    assert plan.rows.dtype == plan.timesteps.dtype == plan.alphas.dtype == plan.sigmas.dtype == np.float64
    assert plan.models.dtype == np.int64
    assert plan.rows.tolist() == [[1, 0], [2, 3]]
    for name in (*ARRAYS, "models"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            getattr(plan, name).flags.writeable = True
    with pytest.raises(TypeError):
        plan.metadata["method"] = "other"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.branches = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("branches", "noises", "names"),
    [
        (1, 0, ("x_T", "f_0", "f_1")),
        (1, 2, ("x_T", "f_0", "f_1", "z_1", "z_2")),
        (2, 1, ("x_T", "u_0", "c_0", "u_1", "c_1", "z_1")),
    ],
)
def test_column_order(branches: int, noises: int, names: tuple[str, ...]) -> None:
    columns = 1 + 2 * branches + noises
    plan = small_plan(rows=np.eye(3, columns) * [[1], [0], [0]], branches=branches)
    assert (plan.nfe, plan.columns, plan.noises, plan.column_names) == (2, columns, noises, names)
    assert [plan.column_names[plan.output_slice(i)] for i in range(2)] == [
        names[1 : 1 + branches],
        names[1 + branches : 1 + 2 * branches],
    ]
    assert plan.column_names[plan.noise_slice] == names[1 + 2 * branches :]


@pytest.mark.parametrize("evaluation", [-1, 2])
def test_output_slice_outside_is_refused(evaluation: int) -> None:
    with pytest.raises(PlanError, match="evaluations 0 to 1"):
        small_plan().output_slice(evaluation)


@PROPERTY
@given(plans(), st.data())
def test_acausal_entry_is_refused_with_row_column_and_value(plan: Plan, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, plan.nfe - 1))
    column = data.draw(st.integers(1 + row * plan.branches, plan.nfe * plan.branches))
    value = data.draw(FINITE.filter(bool))  # as small as 5e-324: zero means exactly zero
    rows = plan.rows.copy()
    rows[row, column] = value
    with pytest.raises(PlanError) as caught:
        plan.replace(rows=rows)
    assert f"rows[{row}, {column}] is {value}; expected exactly 0" in str(caught.value)
    assert plan.column_names[column] in str(caught.value)


@PROPERTY
@given(plans(), st.sampled_from(ARRAYS), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_value_that_is_not_finite_is_refused_with_its_place(
    plan: Plan, name: str, value: float, data: st.DataObject
) -> None:
    array = getattr(plan, name).copy()
    place = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    array[place] = value
    with pytest.raises(PlanError) as caught:
        plan.replace(**{name: array})
    assert f"{name}[{', '.join(map(str, place))}] is {value}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": []}, "at least one network evaluation"),
        ({"timesteps": [[900.0, 400.0]]}, r"timesteps has dtype float64 and shape \(1, 2\); expected real numbers"),
        ({"timesteps": [1.0, 2.0, 3.0]}, "alphas has 3 entries; expected 4"),
        ({"sigmas": [0.5, 0.5]}, "sigmas has 2 entries; expected 3 for 2 timesteps"),
        ({"models": [0]}, "models has 1 entries; expected 2"),
        ({"models": [0, -1]}, "models reaches from -1 to 0"),
        ({"models": np.array([0, 2**63], np.uint64)}, "expected network numbers"),
        ({"models": [0.0, 1.0]}, "models has dtype float64 and shape .*expected integers"),
        ({"rows": np.eye(3, 2)}, r"rows has shape \(3, 2\); expected 3 rows and at least 3 columns"),
        ({"rows": np.eye(4, 3)}, r"rows has shape \(4, 3\); expected 3 rows"),
        ({"rows": np.eye(3, 4), "branches": 2}, "at least 5 columns"),
        ({"rows": [[1, 0], [1]]}, "rows cannot be read as an array"),
        ({"rows": np.eye(3, 3) * 1j}, "rows has dtype complex128"),
        ({"rows": np.eye(3, 3, dtype=bool)}, "rows has dtype bool"),
        ({"rows": [["1", "0", "0"]] * 3}, "rows has dtype <U1"),
        ({"rows": None}, "rows has dtype object"),
        ({"timesteps": [1.0, -3.5e38]}, r"timesteps\[1\] is -3.5e\+38; expected at most .* largest float32"),
        ({"alphas": [0.1, -0.5, 1]}, r"alphas\[1\] is -0.5; signal and noise levels are never negative"),
        ({"sigmas": [0.9, 0.5, -1e-9]}, r"sigmas\[2\] is -1e-09"),
        ({"alphas": [0.1, 0.5, 0]}, r"alphas\[2\] and sigmas\[2\] are both 0"),
        ({"branches": 3}, "branches is 3; expected 1"),
        ({"branches": True}, "branches is True"),
        ({"branches": 1.0}, "branches is 1.0"),
        ({"metadata": {"order": 2}}, r"metadata\['order'\] is 2; keys and values must be str"),
        ({"metadata": {3: "order"}}, r"metadata\[3\]"),
        ({"metadata": [("a", "b")]}, "metadata is a list; expected a mapping"),
        ({"metadata": {"a": "\ud800"}}, "not valid Unicode"),
    ],
)
def test_bad_fields_are_refused_with_what_came_and_what_was_expected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        small_plan(**changes)


def test_number_beyond_float64_is_refused() -> None:
    if np.finfo(np.longdouble).max == np.finfo(np.float64).max:
        pytest.skip("this machine's long double is a float64")
    with pytest.raises(PlanError, match=r"timesteps\[0\] is inf"):
        small_plan(timesteps=np.array([np.finfo(np.longdouble).max, 1]))


# --- equality, hash, copies ----------------------------------------------------------------------------------------


@PROPERTY
@given(plans(), st.sampled_from(["timesteps", "rows"]))
def test_equality_sees_one_unit_in_the_last_place(plan: Plan, name: str) -> None:
    array = getattr(plan, name).copy()
    array.flat[0] = np.nextafter(array.flat[0], 0 if array.flat[0] else 1)
    other = plan.replace(**{name: array})
    assert plan != other
    assert plan == other.replace(**{name: getattr(plan, name)})


@PROPERTY
@given(plans())
def test_description_takes_no_part_in_equality_and_hash(plan: Plan) -> None:
    other = plan.replace(alphas=plan.alphas + 1, sigmas=plan.sigmas + 1, metadata={"method": "other"})
    assert plan == other
    assert hash(plan) == hash(other)
    assert len({plan, other}) == 1


def test_models_and_branches_take_part_in_equality() -> None:
    plan = small_plan()
    assert plan != plan.replace(models=[0, 1])
    rows = np.zeros((3, 5))
    rows[:, 0] = 1  # valid as two outputs and two noises, and as two pairs of outputs
    assert small_plan(rows=rows) != small_plan(rows=rows, branches=2)
    assert plan != "plan"
    assert plan.__eq__("plan") is NotImplemented


def test_negative_zero_is_zero() -> None:
    plan, other = small_plan(), small_plan(rows=[[1, -0.0, 0, 0], [2, -1.5, 0, -0.0], [3, -2, -0.25, 0.5]])
    assert plan == other
    assert hash(plan) == hash(other)
    assert other.rows.tobytes() == plan.rows.tobytes()


@PROPERTY
@given(plans())
def test_copies_are_equal_in_every_field_and_read_only(plan: Plan) -> None:
    pickled = [pickle.loads(pickle.dumps(plan, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (copy.copy(plan), copy.deepcopy(plan), dataclasses.replace(plan), plan.replace(), *pickled):
        assert other == plan
        assert other.metadata == plan.metadata
        for name in (*ARRAYS, "models"):
            assert getattr(other, name).tobytes() == getattr(plan, name).tobytes()
            assert not getattr(other, name).flags.writeable


def test_replace_checks_like_the_constructor() -> None:
    with pytest.raises(PlanError, match="alphas has 2 entries"):
        small_plan().replace(alphas=[1, 1])
    with pytest.raises(TypeError, match="colour"):
        small_plan().replace(colour="red")


def test_repr_is_short() -> None:
    assert repr(small_plan()) == "Plan('test', nfe=2, columns=4, branches=1)"


def test_plan_needs_numpy_alone() -> None:
    heavy = "{'torch', 'safetensors', 'diffusers', 'scipy', 'matplotlib'}"
    code = f"import sys, olss_fast.plan; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
