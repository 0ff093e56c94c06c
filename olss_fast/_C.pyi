from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_Matrix: TypeAlias = npt.NDArray[np.float64]
_Measured: TypeAlias = tuple[list[int], list[float], float]

def measure(r: _Matrix, rows: _Matrix, path: Sequence[int]) -> _Measured: ...
def plan(r: _Matrix, rows: _Matrix, steps: int, most_visits: int) -> tuple[_Measured, float, bool]: ...
def improve(r: _Matrix, rows: _Matrix, path: Sequence[int], bound: float, width: int, keep: int) -> list[_Measured]: ...
