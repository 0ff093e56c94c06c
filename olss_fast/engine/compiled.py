"""Compiled code: a network exported and compiled ahead of time (AOTInductor), and such code loaded again.

Weights stay out of the code. It reads them where they are handed to it, so they can be changed by writing over them,
and code compiled once serves every network of the same structure.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olss_fast.engine.manifest import CODE_FILE
from olss_fast.engine.shapes import Profile
from olss_fast.errors import BuildError, EngineFileError

LIBRARY = "network.so"
OWNER = "network."  # of the weights' names in the code: FlatNetwork's attribute
SETTINGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # else small weights become numbers in the code
}


def export(
    flat: torch.nn.Module, inputs: Sequence[Tensor], per_sample: Sequence[bool], profile: Profile, doubled: bool
) -> torch.export.ExportedProgram:
    """The network's graph for all shapes of `profile`. inputs: x, time, and then the conditioning's tensors.

    Raises BuildError with torch's reason: control flow that depends on values, or code that takes not all the shapes.
    """
    axes = {axis: _dimension(profile, axis, 1 + doubled) for axis in profile.dynamic}
    batch = {0: axes[0]} if 0 in axes else {}
    rest = tuple(batch if own else {} for own in per_sample)
    dynamic = (axes, batch, rest) if rest else (axes, batch)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(flat, tuple(inputs), dynamic_shapes=dynamic, strict=False)
    except Exception as cause:
        raise BuildError(f"the network cannot be exported for noise of {profile}: {shortened(cause)}") from cause


def _dimension(profile: Profile, axis: int, halves: int) -> Any:
    """The sizes of one axis; of the batch, as the network sees it: both halves of a guided pair."""
    step = profile.multiple[axis]
    name = "batch" if axis == 0 else f"axis{axis}"
    base = torch.export.Dim(name, min=profile.min[axis] // step, max=profile.max[axis] // step)
    step *= halves if axis == 0 else 1
    return base if step == 1 else step * base


def graph_text(exported: torch.export.ExportedProgram) -> str:
    """The graph with all shapes and ranges, the same for equal networks: where its lines came from is left out."""
    return "\n".join(line for line in str(exported).splitlines() if not line.strip().startswith("# File: "))


def compile_code(exported: torch.export.ExportedProgram, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Machine code for this machine by file name: LIBRARY, and for CUDA its kernels. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="olss-") as folder:
        package = Path(folder) / "network.pt2"
        try:
            with quiet():
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(package), inductor_configs={**settings, **SETTINGS}
                )
        except Exception as cause:
            raise BuildError(f"the network cannot be compiled: {shortened(cause)}") from cause
        return _unpacked(package)


def _unpacked(package: Path) -> dict[str, bytes]:
    """What a package needs to run: the library and the GPU kernels that it loads by name, without their sources."""
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
    """Compiled code in this process, reading the weights that it was given where they lie.

    `loaded(x, time, *tensors)` checks nothing: whoever calls it has.

    Raises EngineFileError where the library cannot be mapped, or needs weights that are not among `weights`.
    """

    def __init__(self, code: Mapping[str, bytes], weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="olss-")  # readable by this user alone
        for name, content in code.items():
            if not CODE_FILE.fullmatch(name):
                raise EngineFileError(f"a file of the code is named {name!r}; expected a plain name")
            Path(self._folder.name, name).write_bytes(content)
        library = os.path.join(self._folder.name, LIBRARY)
        try:
            self._runner = _runner(library, device)
        except RuntimeError as cause:
            raise EngineFileError(
                f"the engine's code cannot be loaded: {shortened(cause)}; if programs may not run in the folder for "
                "temporary files, name another one with TMPDIR"
            ) from cause
        names = {inner: weight_name(fqn) for inner, fqn in self._runner.get_constant_names_to_original_fqns().items()}
        self.weights = self._taken(weights, list(names.values()))
        self._runner.update_constant_buffer(
            {inner: self.weights[name] for inner, name in names.items()}, False, True, True
        )

    @staticmethod
    def _taken(weights: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        missing = sorted(set(names) - set(weights))
        if missing:
            raise EngineFileError(f"the engine's code reads weights that are not there: {', '.join(missing[:8])}")
        return {name: weights[name] for name in names}

    def __call__(self, x: Tensor, time: Tensor, *tensors: Tensor) -> Tensor:
        output: Tensor = self._runner.run([x, time, *tensors])[0]
        return output


def weight_name(fqn: str) -> str:
    """What a weight of the code is called in the file, and in the network's state_dict."""
    return fqn.removeprefix(OWNER)


def _runner(library: str, device: torch.device) -> Any:
    runners = torch._C._aoti
    if device.type == "cpu":
        return runners.AOTIModelContainerRunnerCpu(library, 1)
    return runners.AOTIModelContainerRunnerCuda(library, 1, str(device), os.path.dirname(library))


def shortened(cause: BaseException) -> str:
    """What went wrong, in one line of bearable length, without torch's own stack."""
    text = str(cause).split("Exception raised from")[0].split("For more information")[0]
    return f"{type(cause).__name__}: {' '.join(text.split())[:600]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and notes of torch's compiler, which are about its own insides."""
    logger = logging.getLogger("torch")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)
