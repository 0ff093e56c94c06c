"""Registration and checks shared by the ops. InputError says what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and coefficients: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, as a view (numel,)."""
    return tensor.as_strided((tensor.numel(),), (1,))


def describe(tensor: object) -> str:
    """dtype, shape, strides and device of a tensor, for messages."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"


def define(name: str, schema: str, run: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Registers `torch.ops.olss_fast.<name>`, which torch.compile and torch.export see through.

    Not by `torch.library.custom_op`, whose bookkeeping for autograd costs a hundred microseconds a call. Gradients are
    refused before the operator is called, see `refuse_gradients`.
    """
    torch.library.define(f"olss_fast::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"olss_fast::{name}", "default", run)
    torch.library.register_fake(f"olss_fast::{name}", fake)


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """InputError unless `tensor` is contiguous and has this dtype, shape and device."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype != dtype
        or tensor.shape != shape
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        raise InputError(f"{name} is {describe(tensor)}; expected contiguous {dtype} {shape} on {device}")


def expect_like(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """InputError unless `tensor` has dtype, shape, device and memory order of `like`, whose name is `other`."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype != like.dtype
        or tensor.shape != like.shape
        or tensor.device != like.device
        or not _same_order(tensor, like)
    ):
        raise InputError(
            f"{name} is {describe(tensor)}, {other} is {describe(like)}; expected both alike: the same dtype, shape, "
            "strides and device"
        )


def _same_order(a: Tensor, b: Tensor) -> bool:
    """True for equal strides, ignoring dimensions of one element, whose strides mean nothing."""
    if a.stride() == b.stride():
        return True
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or first == second for size, first, second in pairs) or a.numel() == 0


def expect_dense(name: str, tensor: Tensor) -> None:
    """InputError unless the elements fill one block of memory, in any order of the dimensions."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
        raise InputError(f"{name} is {describe(tensor)}; expected a tensor of float16, bfloat16, float32 or float64")
    if tensor.numel() > 0 and not is_dense(tensor.shape, tensor.stride()):
        raise InputError(
            f"{name} is {describe(tensor)}, which leaves gaps or overlaps itself; call .contiguous() first"
        )


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True if the elements fill one block of memory, in some order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


def refuse_gradients(op: str, tensors: Sequence[Tensor]) -> None:
    """InputError if autograd would have to go through an op that has no gradient."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError(f"{op} has no gradient, but one of its tensors requires one; call it under torch.no_grad()")


def refuse_overlaps(written: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """InputError if a written tensor shares memory with another."""
    spans = {name: _span(tensor) for name, tensor in (written | others).items() if tensor.numel() > 0}
    for name in written:
        begin, end = spans.get(name, (0, 0))
        for other, (other_begin, other_end) in spans.items():
            if begin < other_end and other_begin < end and other != name:
                first, second = sorted((name, other))
                raise InputError(f"{first} and {second} share memory, and one of them is written; give each its own")


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the tensor's first byte and of its end."""
    begin, items = tensor.data_ptr(), tensor.numel()
    if not tensor.is_contiguous():
        items = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + items * tensor.element_size()
