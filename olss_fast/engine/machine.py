"""This machine and its software, as relevant to compiled code. Imports nothing heavy."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from typing import Any

from olss_fast import __version__
from olss_fast.support.text import clipped, printable

# The flags of /proc/cpuinfo that name instructions which a compiler may use.
INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|vaes|vpclmul)\w*|fma4?|f16c|bmi[12]|abm|popcnt|movbe|adx|aes|pclmulqdq|gfni|sha_ni|xop|tbm"
    r"|asimd\w*|sve\w*|sme(?!p)\w*|i8mm|bf16|fphp|atomics|lrcpc|dotprod|crc32"
)


def versions() -> dict[str, str | None]:
    """Versions of the software that an engine is built with. Imports torch."""
    import torch

    cuda = torch.version.cuda
    return {
        "olss_fast": __version__,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": cuda,
        "driver": _driver() if cuda is not None and torch.cuda.is_available() else None,
    }


def describe(device: str) -> dict[str, Any]:
    """The machine, for code on `device` ("cpu", "cuda" or "cuda:1")."""
    place = {"system": platform.system(), "architecture": platform.machine()}
    if device.partition(":")[0] != "cuda":
        name = _cpuinfo("model name").strip() or platform.processor() or platform.machine()
        sets = sorted(filter(INSTRUCTIONS.fullmatch, set(_flags())))
        return {"device": "cpu", "name": name, **place, "capability": None, "instructions": sets}
    from torch import cuda

    capability = list(cuda.get_device_capability(device))
    name = cuda.get_device_name(device)
    return {"device": "cuda", "name": name, **place, "capability": capability, "instructions": []}


def _flags() -> list[str]:
    """The processor's flags, by their names in Linux; none if unknown."""
    return _cpuinfo("flags", "Features").split()


def mismatches(built_with: dict[str, Any], machine: dict[str, Any], device: str | None = None) -> list[str]:
    """Why an engine with these facts does not run here: what it needs, what there is, what to do. Empty if it does.

    device: where to run it; None: the kind of device that it was built for. Imports torch.
    """
    import torch

    found = []
    rebuild = "build the engine again here"
    for what, here in (("system", platform.system()), ("architecture", platform.machine())):
        if machine[what] != here:
            found.append(f"it was built for {what} {machine[what]}, this is {here}: {rebuild}")
    if _minor(built_with["torch"]) != _minor(torch.__version__):
        found.append(
            f"it was built with torch {built_with['torch']}, here is {torch.__version__}, and compiled code fits one "
            f"minor version alone: install torch {_minor(built_with['torch'])}, or {rebuild}"
        )
    kind = machine["device"]
    if device is not None and device.partition(":")[0] != kind:
        found.append(f"it was built for {kind} and is to run on {device}: build one for {device}")
    if kind == "cpu":
        if lacking := sorted(set(machine["instructions"]) - set(_flags())):
            found.append(
                f"its code may use the instructions {', '.join(lacking)}, which this processor lacks: {rebuild}"
            )
    else:
        found += _gpu_mismatches(built_with, machine, device or kind)
    return [clipped(printable(each), 500) for each in found]  # it quotes a file of unknown origin


def _gpu_mismatches(built_with: dict[str, Any], machine: dict[str, Any], device: str) -> list[str]:
    import torch

    if torch.version.cuda is None:
        return [f"it was built for CUDA, and torch {torch.__version__} is a build without: install one with CUDA"]
    if not torch.cuda.is_available():
        return ["it was built for CUDA, and torch finds no usable GPU here: look at the driver"]
    number, there = device.partition(":")[2] or "0", torch.cuda.device_count()
    if not number.isdecimal() or int(number) >= there:
        return [
            f"it is to run on {device}, and this machine has {there} GPU{'s' * (there != 1)}: name one that is there"
        ]
    found = []
    capability = list(torch.cuda.get_device_capability(device))
    if capability != machine["capability"]:
        found.append(
            f"it was built for compute capability {_dotted(machine['capability'])} ({machine['name']}), this is "
            f"{_dotted(capability)} ({torch.cuda.get_device_name(device)}): build the engine again here"
        )
    if str(built_with["cuda"]).partition(".")[0] != torch.version.cuda.partition(".")[0]:
        found.append(
            f"it was built with CUDA {built_with['cuda']}, torch here has {torch.version.cuda}: build it again"
        )
    return found


def _dotted(numbers: list[int] | None) -> str:
    return ".".join(map(str, numbers or []))


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """The CUDA version that the driver supports, as "12.8"."""
    import torch

    number = int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    return f"{number // 1000}.{number % 1000 // 10}"


def _cpuinfo(*names: str) -> str:
    """The first entry of /proc/cpuinfo with one of these names; "" if there is none."""
    if sys.platform != "linux":
        return ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in names:
                    return value
    except OSError:
        pass
    return ""
