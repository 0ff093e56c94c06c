"""Bytes that a step moves, as counts, and the CPU path against torch operations: `pytest bench/bench_kernels.py`.

The counts hold on any machine. `in_torch` is the step as one writes it down in torch; its bytes are those of what each
operation reads and writes, counted as torch dispatches them. Times are those of one thread of the processor, ours and
torch's measured in turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from olss_fast.kernels import StepState, lincomb, start, step

SHAPES = {"SD 1.5": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128), "16 channels": (1, 16, 128, 128)}
STEPS = [("SD 1.5", 3, torch.float32), ("SD 1.5", 19, torch.bfloat16), ("16 channels", 19, torch.float32)]
IN_TORCH = "torch operations one by one"


def in_torch(output: Tensor, history: list[Tensor], weights: list[float], scale: float) -> Tensor:
    """Guidance, the next row, and both halves of the next input."""
    unconditional, conditional = output.chunk(2)
    history.append(unconditional + scale * (conditional - unconditional))
    row = weights[0] * history[0]
    for weight, column in zip(weights[1:], history[1:], strict=True):
        row = row + weight * column
    return torch.cat([row, row])


class Traffic(TorchDispatchMode):
    """Counts operations that compute, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            self.operations += 1
        return result


@pytest.mark.parametrize("k", [0, 2, 19])
@pytest.mark.parametrize("model", SHAPES)
def bench_bytes_of_a_step(exactly: Callable[..., Any], benchmark: Any, model: str, k: int) -> None:
    """Step k of a guided run in half precision."""
    shape = SHAPES[model]
    x = torch.empty((2 * shape[0], *shape[1:]), dtype=torch.float16, device="meta")
    state = StepState.empty(x, torch.empty(2, device="meta"), steps=20, doubled=True)
    columns = [torch.empty(shape, dtype=x.dtype, device="meta") for _ in range(k + 1)]
    with Traffic() as torch_traffic:
        in_torch(x, columns, [1.0] * (k + 2), 7.5)
    ours = exactly(lambda: {"bytes": state.bytes_of_step(k)})["bytes"]
    elements = x.numel() // 2
    assert ours == 2 * elements * (6 + k)  # read u, c, x_T and k outputs; write f and x twice
    benchmark.extra_info.update(
        bytes_in_torch=torch_traffic.bytes, operations=1, operations_in_torch=torch_traffic.operations
    )
    print(
        f"\n{model}, step {k}: {ours / 1e3:.0f} kB in 1 kernel; in torch {torch_traffic.bytes / 1e3:.0f} kB in "
        f"{torch_traffic.operations}, {torch_traffic.bytes / ours:.1f} times as much"
    )


@pytest.mark.parametrize(("model", "k", "dtype"), STEPS, ids=str)
def bench_step_on_the_cpu(versus: Callable[..., Any], model: str, k: int, dtype: torch.dtype) -> None:
    """Step k of a guided run against torch operations, one by one."""
    shape = SHAPES[model]
    x = torch.zeros((2 * shape[0], *shape[1:]), dtype=dtype)
    state = StepState.empty(x, torch.zeros(2), steps=k + 1, doubled=True)
    state.rows.normal_()
    state.history.normal_()
    state.guidance.fill_(7.5)
    start(state)
    output = torch.randn(x.shape).to(dtype)
    columns = [state.column(j).clone() for j in range(k + 1)]
    weights = state.rows[-1].tolist()

    def ours() -> None:
        state.finished.fill_(k * state.programs)
        step(output, state)

    versus(ours, lambda: in_torch(output, list(columns), weights, 7.5), name=IN_TORCH)


@pytest.mark.parametrize(("k", "stacked"), [(4, True), (40, False)], ids=["4 stacked", "40 separate"])
def bench_lincomb_on_the_cpu(versus: Callable[..., Any], k: int, stacked: bool) -> None:
    """k tensors of 16 x 128 x 128 in float32."""
    tensors = torch.randn(k, 16 * 128 * 128)
    weights = torch.randn(k)
    given = tensors if stacked else list(tensors)

    def in_turn() -> Tensor:
        total = weights[0] * tensors[0]
        for j in range(1, k):
            total = total + weights[j] * tensors[j]
        return total

    torch.testing.assert_close(lincomb(given, weights), in_turn(), rtol=1e-4, atol=1e-4)
    versus(lambda: lincomb(given, weights), in_turn, name=IN_TORCH)
