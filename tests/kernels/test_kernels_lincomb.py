"""`lincomb` as it is called: the CPU path, memory orders, compilers, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import check_lincomb, random

from olss_fast.errors import InputError
from olss_fast.kernels import lincomb
from olss_fast.kernels.lincomb import CPU_BLOCK

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "size"), [(1, 1), (5, 0), (7, 257), (200, 33), (9, CPU_BLOCK + 1)])
def test_is_the_sum(dtype: torch.dtype, columns: int, size: int) -> None:
    check_lincomb(lincomb, columns, size, dtype)


def test_halves_are_summed_in_float32() -> None:
    """2048 + 1 is not a half; the sum of all is."""
    tensors = torch.tensor([[2048.0], [1.0], [1.0]], dtype=torch.float16)
    assert lincomb(tensors, [1, 1, 1]).tolist() == [2050.0]
    assert lincomb(list(tensors), [1, 1, 1]).tolist() == [2050.0]


def test_numbers_are_weights() -> None:
    tensors = random(3, 4, seed=0)
    expected = 0.1 * tensors[0] - 2 * tensors[1] + 3 * tensors[2]
    torch.testing.assert_close(lincomb(tensors, [0.1, -2, 3]), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lincomb(tuple(tensors), (0.1, -2, 3)), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("stacked", [True, False])
def test_keeps_the_memory_order(stacked: bool) -> None:
    tensors = [random(2, 3, 4, 5, seed=k).to(memory_format=torch.channels_last) for k in range(3)]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = tensors[0] - 2 * tensors[1] + 0.5 * tensors[2]
    given: Any = torch.stack([t.permute(0, 2, 3, 1) for t in tensors]).permute(0, 1, 4, 2, 3) if stacked else tensors
    result = lincomb(given, weights)
    assert result.stride() == tensors[0].stride()
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)


def test_stacked_at_a_distance() -> None:
    """A window of a larger buffer: dense each, apart from one another."""
    memory = random(3, 10, seed=0)
    torch.testing.assert_close(lincomb(memory[:, 2:6], [1, 2, 3]), lincomb(memory[:, 2:6].contiguous(), [1, 2, 3]))


def test_compilers_see_through() -> None:
    tensors, weights = random(3, 8, seed=0).float(), torch.tensor([1.0, 2.0, 3.0])

    class Sums(torch.nn.Module):
        def forward(self, tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return lincomb(tensors, weights) + lincomb([tensors[0], tensors[1]], weights[:2])

    expected = Sums()(tensors, weights)
    compiled = torch.compile(Sums(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors, weights), expected, rtol=0, atol=0)
    program = torch.export.export(Sums(), (tensors, weights))
    torch.testing.assert_close(program.module()(tensors, weights), expected, rtol=0, atol=0)


def test_the_operators_are_what_their_schemas_say() -> None:
    tensors, weights = random(3, 8, seed=0).float(), torch.tensor([1.0, 2.0, 3.0])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.olss_fast.lincomb_stacked.default, (tensors, weights), test_utils=tests)
    torch.library.opcheck(torch.ops.olss_fast.lincomb_separate.default, (list(tensors), weights), test_utils=tests)


@pytest.mark.parametrize(
    ("tensors", "weights", "message"),
    [
        ([], [], "no tensors"),
        (None, [1], "tensors is a NoneType; expected a tensor"),
        (torch.tensor(3.0), [1], r"tensors is torch.float32 \(\)"),
        ({"a": torch.zeros(3)}, [1], "tensors is a dict"),
        (torch.zeros(2, 3), None, "weights is None; expected a number for each tensor"),
        (torch.zeros(2, 3), 3, r"weights is .*\(\).* expected contiguous torch.float32 \(2,\)"),
        (torch.zeros(2, 3), ["a", "b"], r"weights is \['a', 'b'\]"),
        (torch.zeros(2, 3), [10**400, 1], "weights is .*expected a number"),
        (torch.zeros(0, 3), [], "no tensors"),
        ([torch.zeros(3, dtype=torch.int64)], [1], r"tensors\[0\] is torch.int64"),
        ([torch.zeros(3), torch.zeros(4)], [1, 1], r"tensors\[1\] is .*\(4,\)"),
        ([torch.zeros(3), torch.zeros(3).half()], [1, 1], r"tensors\[1\] is torch.float16"),
        ([torch.zeros(2, 3), torch.zeros(3, 2).t()], [1, 1], r"tensors\[1\] is .*strides \(1, 2\)"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], [1, 1], "on meta"),
        ([torch.zeros(3), 2.0], [1, 1], r"tensors\[1\] is a float"),
        ([torch.zeros(6)[::2]], [1], "gaps"),
        (torch.zeros(2, 6)[:, ::2], [1, 1], "gaps"),
        (torch.zeros(2, 3), [1], r"weights is .*\(1,\).* expected contiguous torch.float32 \(2,\)"),
        (torch.zeros(2, 3), torch.ones(2).double(), "weights is torch.float64"),
        (torch.zeros(2, 3), torch.ones(4)[::2], r"weights is .*strides \(2,\)"),
        (torch.zeros(2, 3).requires_grad_(), [1, 1], "no gradient"),
        ([torch.zeros(3)], torch.ones(1).requires_grad_(), "no gradient"),
    ],
)
def test_bad_input_is_named(tensors: Any, weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lincomb(tensors, weights)


def test_tensors_that_require_a_gradient_are_fine_without_one() -> None:
    with torch.no_grad():
        assert lincomb(torch.ones(2, 3).requires_grad_(), [1, 2]).tolist() == [3.0] * 3
