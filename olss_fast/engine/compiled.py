"""Compiled code: an exported network compiled ahead of time (AOTInductor), and such code loaded again.

The code contains no weights. It reads them from the memory passed to it, so they can be overwritten, and code compiled
once serves every network of the same structure.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from olss_fast.compiling.quiet import quiet, shortened
from olss_fast.engine.manifest import CODE_FILE
from olss_fast.engine.weights import LAYOUT, NAMES, check_layout, layout_of
from olss_fast.errors import BuildError, EngineFileError, OlssError
from olss_fast.support.container import Refused
from olss_fast.support.files import reason

LIBRARY = "network.so"
MODEL, WRAPPER = "model", "network.wrapper"  # torch's names in a package
INSIDE = f"network/data/aotinductor/{MODEL}/"
OWNER = "network."  # of the weights' names in the code: FlatNetwork's attribute
SETTINGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # otherwise small weights become constants in the code
    "cpp.dynamic_threads": True,  # otherwise CPU code is fixed to the number of threads at build time
}


def compile_code(exported: torch.export.ExportedProgram, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Machine code for this machine, by file name: LIBRARY, and for CUDA its kernels. Raises BuildError."""
    _constants_as_buffers(exported)
    with _temporary(BuildError) as folder:
        package = str(folder / "network.pt2")
        try:
            with quiet():
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=package, inductor_configs={**settings, **SETTINGS}
                )
        except Exception as cause:
            raise BuildError(f"the network cannot be compiled: {shortened(cause)}") from cause
        return _unpacked(package)


def _constants_as_buffers(exported: torch.export.ExportedProgram) -> None:
    """Tensors that the network has without registering them (attributes, literals in forward) become its buffers: the
    compiler would read them under names of its own. BuildError for a tensor that the code cannot read from a file."""
    device, tensors = exported.example_inputs[0][0].device, {**exported.state_dict, **exported.constants}
    specs = exported.graph_signature.input_specs
    for spec, node in zip(specs, exported.graph.find_nodes(op="placeholder"), strict=True):
        if not isinstance(value := tensors.get(spec.target), Tensor) or not node.users:
            continue
        name = weight_name(str(spec.target))
        if value.dtype not in NAMES:
            known = ", ".join(map(str, NAMES))
            raise BuildError(f"the network's tensor {name} is {value.dtype}; expected one of {known}: keep it as such")
        if spec.kind == InputKind.CONSTANT_TENSOR and value.device == device:
            spec.kind, spec.persistent = InputKind.BUFFER, False
        elif spec.kind == InputKind.CONSTANT_TENSOR and value.numel() > 1:  # a single number becomes part of the code
            raise BuildError(
                f"the network's tensor {name} lies on {value.device} and the engine runs on {device}: make it a buffer "
                "with self.register_buffer(name, tensor, persistent=False)"
            )


def with_layout(
    code: Mapping[str, bytes], exported: torch.export.ExportedProgram, compiled_for: Mapping[str, Any]
) -> dict[str, bytes]:
    """The code with its LAYOUT file, which describes the inputs and weights it was compiled for. Raises BuildError."""
    constants, device = {**exported.state_dict, **exported.constants}, exported.example_inputs[0][0].device
    with _temporary(BuildError) as folder:
        try:
            names = set(_loader(_pack(code, device.type, folder), device).get_constant_fqns())
        except RuntimeError as cause:
            raise BuildError(f"the compiled network cannot be loaded: {shortened(cause)}") from cause
    read = {weight_name(name): each.detach().clone() for name, each in constants.items() if name in names}
    return {**code, LAYOUT: json.dumps({**compiled_for, "weights": layout_of(read)}).encode()}


@contextmanager
def _temporary(error: type[OlssError], needed: int | None = None) -> Iterator[Path]:
    """A temporary folder that only this user can read. Raises `error` if it cannot be written.

    needed: number of bytes to be written, for the message.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="olss-") as folder:
            yield Path(folder)
    except OSError as cause:
        if isinstance(cause, OlssError):
            raise
        what = "write to" if needed is None else f"write {needed} bytes to"
        where = tempfile.tempdir or os.environ.get("TMPDIR", "")
        raise error(
            f"cannot {what} the folder for temporary files, {where!r}: {reason(cause)}; TMPDIR names another one"
        ) from cause


def _loader(package: str, device: torch.device) -> Any:
    """Torch's loader of a package, with the library mapped."""
    on_gpu = device.type == "cuda"
    return torch._C._aoti.AOTIModelPackageLoader(package, MODEL, on_gpu, 1, (device.index or 0) if on_gpu else -1)


def _unpacked(package: str) -> dict[str, bytes]:
    """The files of a package that are needed to run: the library and the GPU kernels it loads by name, no sources."""
    with zipfile.ZipFile(package) as archive:
        members = {Path(name).name: name for name in archive.namelist()}
        libraries = [name for name in members if name.endswith(".so")]
        if len(libraries) != 1:
            raise BuildError(f"the compiler left the libraries {libraries}; expected one")
        kernels = [name for name in members if name.endswith((".cubin", ".hsaco", ".fatbin"))]
        return {LIBRARY if name in libraries else name: archive.read(members[name]) for name in libraries + kernels}


def hash_code(code: Mapping[str, bytes]) -> str:
    """SHA-256 over names and content."""
    total = hashlib.sha256()
    for name in sorted(code):
        total.update(f"{name} {len(code[name])}\n".encode())
        total.update(code[name])
    return total.hexdigest()


class LoadedCode:
    """Compiled code in this process, which reads the given weights in place.

    `loaded(x, time, *tensors)` checks nothing: the caller must.

    Raises EngineFileError if the library cannot be mapped, or was compiled for other weights than `weights`.
    """

    def __init__(self, code: Mapping[str, bytes], weights: Mapping[str, Tensor], device: torch.device) -> None:
        # The bookkeeping of several threads asks for events, which a capture forbids: on a GPU one thread at a time.
        self._turn: AbstractContextManager[object] = threading.Lock() if device.type == "cuda" else nullcontext()
        with _temporary(EngineFileError, sum(map(len, code.values()))) as folder:
            package = _pack(code, device.type, folder)
            try:
                self._loader = _loader(package, device)
            except RuntimeError as cause:
                raise EngineFileError(
                    f"the engine's code cannot be loaded: {shortened(cause)}; if the folder for temporary files is "
                    "full, or programs may not run in it, name another one with TMPDIR"
                ) from cause
        names = {fqn: weight_name(fqn) for fqn in self._loader.get_constant_fqns()}
        missing = sorted(set(names.values()) - set(weights))
        if missing:
            raise EngineFileError(f"the engine's code reads weights that are not there: {', '.join(missing[:8])}")
        self.weights = {name: weights[name] for name in names.values()}
        try:
            check_layout(code.get(LAYOUT, b""), layout_of(self.weights))
        except Refused as cause:
            raise EngineFileError(f"the engine's code cannot be run: {cause}") from cause
        taken = {fqn: weights[name] for fqn, name in names.items()}
        self._loader.load_constants(taken, use_inactive=False, check_full_update=True, user_managed=True)

    def __call__(self, x: Tensor, time: Tensor, *tensors: Tensor) -> Tensor:
        with self._turn:
            output: Tensor = self._loader.boxed_run([x, time, *tensors])[0]
        return output


def _pack(code: Mapping[str, bytes], device: str, folder: Path) -> str:
    """The code as a package that torch loads. Raises EngineFileError for an unusable name."""
    package = folder / "network.pt2"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_STORED) as archive:
        for name, content in code.items():
            if name == LAYOUT:
                continue
            if not CODE_FILE.fullmatch(name):
                raise EngineFileError(f"a file of the code is named {name!r}; expected a plain name")
            archive.writestr(INSIDE + (WRAPPER + ".so" if name == LIBRARY else name), content)
        archive.writestr(INSIDE + WRAPPER + "_metadata.json", json.dumps({"AOTI_DEVICE_KEY": device}))
    return str(package)


def weight_name(fqn: str) -> str:
    """A weight's name in the file and in the network's state_dict, from its name in the code."""
    return fqn.removeprefix(OWNER)
