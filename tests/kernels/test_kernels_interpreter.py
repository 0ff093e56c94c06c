"""The Triton code, element by element, in Triton's interpreter: no GPU needed.

TRITON_INTERPRET is looked at when Triton is first imported, so the checks run in one other process that has it set.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import kernel_checks
import pytest

from olss_fast.kernels._grid import grid

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")

Interpret = Callable[..., None]
BLOCK = grid(0, 2).block  # of small data in half precision
HALF, SINGLE = "bfloat16", "float32"


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")

        def run(name: str, *arguments: Any, **options: Any) -> None:
            pool.submit(getattr(kernel_checks, name), *arguments, **options).result()

        yield run


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_every_size(interpret: Interpret, size: int) -> None:
    interpret("interpreted_run", (1, size), HALF, steps=2, doubled=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("branches", "doubled"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize(("noises", "anchored"), [(0, True), (3, False), (3, True)])
def test_every_dtype_and_kind(
    interpret: Interpret, dtype: str, branches: int, doubled: bool, noises: int, anchored: bool
) -> None:
    options = {"branches": branches, "doubled": doubled, "noises": noises, "anchored": anchored}
    interpret("interpreted_run", (2, 77), dtype, steps=3, **options)


@pytest.mark.parametrize(("steps", "begin"), [(17, 0), (127, 126), (128, 127), (199, 198)])
@pytest.mark.parametrize("noises", [0, 6])
def test_any_number_of_columns(interpret: Interpret, steps: int, begin: int, noises: int) -> None:
    """Around the number of columns in flight (16), a history of 128, and more than that."""
    interpret("interpreted_run", (1, 9), HALF, steps=steps, begin=begin, noises=noises)


@pytest.mark.parametrize("doubled", [False, True])
def test_channels_last_and_spare_room(interpret: Interpret, doubled: bool) -> None:
    """The columns are further apart than they are long, and rows and columns are left over."""
    options = {"doubled": doubled, "channels_last": True, "spare": 3, "noises": 2}
    interpret("interpreted_run", (2, 3, 5, 4), SINGLE, steps=2, **options)


def test_unaligned_memory_and_many_times(interpret: Interpret) -> None:
    interpret("interpreted_run", (1, 300), HALF, steps=2, offset=1, times=71)
    interpret("interpreted_run", (1, 300), HALF, steps=2, times=0)


def test_a_step_too_many_changes_nothing(interpret: Interpret) -> None:
    interpret("interpreted_step_too_many", (1, 300), HALF, steps=2)


@pytest.mark.parametrize(("columns", "dtype"), [(1, SINGLE), (5, "float16"), (17, HALF), (128, SINGLE), (200, HALF)])
@pytest.mark.parametrize("size", [1, BLOCK + 3])
def test_lincomb(interpret: Interpret, columns: int, dtype: str, size: int) -> None:
    interpret("interpreted_lincomb", columns, size if columns < 100 else 7, dtype)


def test_lincomb_of_nothing(interpret: Interpret) -> None:
    interpret("interpreted_lincomb", 3, 0, SINGLE)
