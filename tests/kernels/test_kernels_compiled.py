"""The machine code of the kernels, compiled ahead of time for GPUs that need not be here.

Compiled as a launch on data with aligned addresses and sizes would: addresses, sizes and strides divisible by 16.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from olss_fast.kernels._grid import Grid, grid

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from olss_fast.kernels import _lincomb_triton, _step_triton  # noqa: E402

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
SMALL, LARGE = 4 * 64 * 64, 1 << 27
# Registers a thread: with 65,536 on a multiprocessor, 96 keep two blocks of 8 warps there; the small blocks have room.
MOST_REGISTERS = {1: 160, 8: 96}


def compiled(kernel: Any, types: dict[str, Any], known: dict[str, Any], architecture: int, cut: Grid) -> Any:
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, kind) in enumerate(types.items()):
        if isinstance(kind, tuple):
            aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(len(kind))}
        elif kind.startswith("*") or name in ("size", "stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    signature = types | dict.fromkeys(known, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=_lincomb_triton.options(cut))


@cache
def step(architecture: int, dtype: str, size: int, branches: int = 1, doubled: bool = True, start: bool = False) -> Any:
    cut = grid(size, BYTES[dtype])
    data, single, whole = f"*{dtype}", "*fp32", "*i32"
    types = {"output": data, "history": data, "rows": single, "timesteps": single, "guidance": single}
    types |= {"finished": whole, "noise_counts": whole, "noise_start": whole, "anchored": whole}
    types |= {"x": data, "time": single}
    types |= dict.fromkeys(("size", "stride", "width", "height", "times"), "i32")
    known = {"START": start, "DOUBLED": doubled, "BRANCHES": branches, "BLOCK": cut.block, "CHUNK": cut.chunk}
    if start:
        known["output"] = None
    return compiled(_step_triton._step, types, known, architecture, cut)


@cache
def stacked(architecture: int, dtype: str, size: int) -> Any:
    cut = grid(size, BYTES[dtype])
    types = {"out": f"*{dtype}", "tensors": f"*{dtype}", "weights": "*fp32", "size": "i32", "stride": "i32"}
    known = {"BLOCK": cut.block, "CHUNK": cut.chunk}
    return compiled(_lincomb_triton._lincomb_stacked, types | {"count": "i32"}, known, architecture, cut)


@cache
def separate(architecture: int, dtype: str, size: int) -> Any:
    cut = grid(size, BYTES[dtype])
    types = {"out": f"*{dtype}", "tensors": (f"*{dtype}",) * 2 * cut.chunk, "weights": "*fp32", "size": "i32"}
    known = {"BLOCK": cut.block, "CHUNK": cut.chunk}
    return compiled(_lincomb_triton._lincomb_separate, types | {"count": "i32"}, known, architecture, cut)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """What one thread takes: REG registers, STACK and LOCAL bytes of memory for what did not fit into them."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [str(TOOL), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def instructions(kernel: Any, pattern: str) -> list[tuple[str, int]]:
    """The instructions that match, in order, each with how often it comes in a row."""
    found = re.findall(rf"\b(?:{pattern})\b", kernel.asm["sass"])
    return [(name, len(list(group))) for name, group in groupby(found)]


CASES = [
    pytest.param(kernel, architecture, dtype, size, id=f"{kernel.__name__}-sm_{architecture}-{dtype}-{size}")
    for kernel, architecture, dtype, size in [
        *[(step, a, d, n) for a in (80, 90) for d, n in (("fp16", SMALL), ("bf16", LARGE), ("fp32", LARGE))],
        (step, 90, "fp32", SMALL),
        *[(kernel, 90, d, n) for kernel in (stacked, separate) for d, n in (("bf16", SMALL), ("fp32", LARGE))],
    ]
]


@pytest.mark.skipif(not TOOL.exists(), reason="this Triton has no cuobjdump")
@pytest.mark.parametrize(("kernel", "architecture", "dtype", "size"), CASES)
def test_nothing_spills(kernel: Any, architecture: int, dtype: str, size: int, tmp_path: Path) -> None:
    code = kernel(architecture, dtype, size)
    used = resources(code, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert getattr(code.metadata, "shared", 0) == 0
    assert instructions(code, "LDL|STL") == []  # loads and stores of spilled registers
    assert used["REG"] <= MOST_REGISTERS[code.metadata.num_warps]


@pytest.mark.parametrize(("kernel", "architecture", "dtype", "size"), CASES)
def test_columns_are_read_128_bits_wide_and_all_asked_for_before_the_first_is_used(
    kernel: Any, architecture: int, dtype: str, size: int
) -> None:
    """The loads of one chunk stand side by side: no sum stands between them, which would wait for the first."""
    code = kernel(architecture, dtype, size)
    runs = instructions(code, r"LDG\.E\.128|FFMA|BAR\.SYNC")
    assert max(count for name, count in runs if name == "LDG.E.128") >= grid(size, BYTES[dtype]).chunk
    assert "ld.global.v4.b32" in code.asm["ptx"]
    assert "st.global.v4.b32" in code.asm["ptx"]
    # Single words are coefficients and counters; nothing is moved in halves of a word or in pairs.
    assert re.findall(r"(?:ld|st)\.global\S*\.(?:b16|v2\.\w+)", code.asm["ptx"]) == []


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("branches", "doubled", "stores"), [(1, False, 2), (1, True, 3), (2, True, 4)])
def test_a_step_reads_and_writes_everything_once(architecture: int, branches: int, doubled: bool, stores: int) -> None:
    """Stores: the history columns, and the next input once for each half of the batch. Loads: a chunk, four noises."""
    code = step(architecture, "fp16", LARGE, branches, doubled)
    assert sum(count for _, count in instructions(code, r"STG\.E\.128")) == stores
    loads = sum(count for _, count in instructions(code, r"LDG\.E\.128"))
    assert loads == 1 + doubled + grid(LARGE, 2).chunk + 4


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_step_counter_asks_for_no_answer(architecture: int) -> None:
    """One addition without a result, after a barrier behind which no thread can still read the old count."""
    ptx = step(architecture, "bf16", LARGE).asm["ptx"]
    assert len(re.findall(r"\bred\.global\S*\.add\.[us]32", ptx)) == 1
    assert re.search(r"\batom\.", ptx) is None
    assert re.search(r"\bmembar|\bfence", ptx) is None
    after_the_last_store = ptx[ptx.rindex("st.global") :]
    assert 0 < after_the_last_store.find("bar.sync") < after_the_last_store.find("red.global")


@pytest.mark.parametrize("architecture", [80, 90])
def test_start_touches_no_counter_but_to_clear_it(architecture: int) -> None:
    ptx = step(architecture, "fp16", SMALL, start=True).asm["ptx"]
    assert "red." not in ptx
    assert "atom." not in ptx


def test_a_multiplication_and_an_addition_are_one_rounding() -> None:
    assert instructions(stacked(90, "fp16", SMALL), "FADD|FMUL") == []


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, SMALL, 16 * 128 * 128, LARGE, 1 << 33])
def test_a_launch_covers_everything_once(size: int, itemsize: int) -> None:
    cut = grid(size, itemsize)
    assert cut.block * itemsize == cut.warps * 32 * 16  # 16 bytes a thread
    assert (cut.programs - 1) * cut.block < max(1, size) <= cut.programs * cut.block
    assert cut.warps in MOST_REGISTERS or cut.warps in (2, 4)
