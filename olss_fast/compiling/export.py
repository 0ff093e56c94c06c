"""A network's graph for all sizes of a profile, by torch.export."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from olss_fast.compiling.quiet import quiet, shortened
from olss_fast.compiling.shapes import Profile
from olss_fast.errors import BuildError

ORDERS = {"StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"}  # sympy's <, <=, >, >=
COPIES = {torch.ops.aten.contiguous.default, torch.ops.aten.clone.default}  # they move values without changing them


def export(
    flat: torch.nn.Module, inputs: Sequence[Tensor], per_sample: Sequence[bool], profile: Profile, doubled: bool
) -> ExportedProgram:
    """The network's graph for all shapes of `profile`. inputs: x, time, and then the conditioning's tensors.

    Code that compares a size with some number ("copy, from 64 samples on") has two graphs. Both are exported, and count
    as one if they differ only in copies.

    Raises BuildError: control flow that depends on values, or code that computes something else at other sizes.
    """
    axes = {axis: _dimension(profile, axis, 1 + doubled) for axis in profile.dynamic}
    batch = {0: axes[0]} if 0 in axes else {}
    rest = tuple(batch if own else {} for own in per_sample)
    dynamic = (axes, batch, rest) if rest else (axes, batch)

    def traced(*, opposite: bool) -> tuple[ExportedProgram, set[str]]:
        with torch.no_grad(), quiet(), _CheckedIndices(), _questions(opposite) as asked:
            return torch.export.export(flat, tuple(inputs), dynamic_shapes=dynamic, strict=False), asked

    try:
        exported, asked = traced(opposite=False)
    except Exception as cause:
        raise BuildError(f"the network cannot be exported for noise of {profile}: {_reason(cause)}") from cause
    if asked and not _same_otherwise(exported, traced):
        raise BuildError(
            f"the network cannot be exported for noise of {profile}: it computes something else where a size is beyond "
            f"a bound, {'; '.join(sorted(asked)[:3])}: build an engine for the sizes on either side of it"
        )
    return exported


def _dimension(profile: Profile, axis: int, halves: int) -> Any:
    """The sizes of one axis; for the batch, those of the network input, with both halves of a guided pair."""
    step = profile.multiple[axis]
    name = "batch" if axis == 0 else f"axis{axis}"
    base = torch.export.Dim(name, min=profile.min[axis] // step, max=profile.max[axis] // step)
    step *= halves if axis == 0 else 1
    return base if step == 1 else step * base


class _CheckedIndices(TorchFunctionMode):
    """Adds checks to the graph that indices into embedding tables, such as class labels, are in range.

    Compiled code checks too, but in several threads at once, where an exception ends the process. On a GPU the check
    would synchronise in every call, which no CUDA graph can capture.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and args[0].device.type == "cpu":
            indices, table = args[:2]
            torch._check(((indices >= 0) & (indices < table.shape[0])).all().item())  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


@contextmanager
def _questions(opposite: bool) -> Iterator[set[str]]:
    """Records comparisons of variable sizes while a network is traced, if the profile leaves the answer open.

    Torch would bind the graph to the answer by a guard. Here tracing continues with the answer for the example, or with
    the opposite one, and the yielded set gets each comparison and its source line.
    """
    asked, usual = set[str](), torch.SymBool.__bool__

    def answer(question: torch.SymBool) -> bool:
        if type(question.node.expr).__name__ not in ORDERS or not question.node.has_hint() or _settled(question):
            return bool(question.node.bool_())
        with question.node.shape_env.suppress_guards():
            found = bool(question.node.bool_())
        asked.add(_asked_where(str(question.node.expr)))
        return found != opposite

    torch.SymBool.__bool__ = answer  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        torch.SymBool.__bool__ = usual  # type: ignore[method-assign]


def _settled(question: torch.SymBool) -> bool:
    return any(statically_known_true(each) for each in (question, torch.sym_not(question)))  # type: ignore[no-untyped-call]


def _asked_where(question: str) -> str:
    """`question`, and the line of code outside torch that makes the comparison."""
    ours = (__file__, str(Path(torch.__file__).parent))
    *_, frame = (each for each in traceback.extract_stack() if not each.filename.startswith(ours))
    return f"{question} ({frame.filename}, line {frame.lineno})"


def _same_otherwise(exported: ExportedProgram, traced: Any) -> bool:
    """True if the opposite answers lead to the same graph."""
    try:
        other, _ = traced(opposite=True)
    except Exception:  # code that refuses such sizes may raise anything
        return False
    return _operations(exported) == _operations(other)


def _operations(exported: ExportedProgram) -> list[str]:
    """The graph's operations in order, without copies: each operator and its numbered arguments."""
    graphs = [each.graph for each in exported.graph_module.modules() if isinstance(each, fx.GraphModule)]
    return [line for graph in graphs for line in _lines(graph)]


def _lines(graph: fx.Graph) -> list[str]:
    numbers: dict[Any, str] = {}
    lines: list[str] = []
    for node in graph.nodes:
        if node.target in COPIES:
            numbers[node] = numbers[node.args[0]]
            continue
        numbers[node] = f"%{len(lines)}"
        words = node.args[:1] if node.target is torch.ops.aten._assert_scalar.default else node.args
        lines.append(f"{node.op} {node.target} {fx.node.map_arg((words, node.kwargs), numbers.__getitem__)}")
    return lines


def _reason(cause: Exception) -> str:
    """Why torch cannot export, in plain words: its guards name internal symbols."""
    _, found, advice = str(cause).partition("Suggested fixes:\n")
    if not found:
        return shortened(cause)
    sizes = [re.sub(r"Dim\('\w+', (.*)\)", r"\1", line.strip()) for line in advice.split("\n\n")[0].splitlines()]
    return (
        f"its code works for fewer sizes than these, {', '.join(sizes)}: build an engine for those, or change the "
        "code where it fixes a size"
    )
