"""Builds the C++ runtime of engine files (csrc/runtime): the library, its headers and the program `olss-run`."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from olss_fast import __version__
from olss_fast.errors import BuildError

PROGRAM = Path("bin/olss-run")


def build_runtime(out: str | os.PathLike[str]) -> Path:
    """Compiles the runtime against the libtorch of the installed torch; returns the program's path.

    `out` receives bin/olss-run, lib/libolss_runtime.so and the headers include/olss*.h. Files are moved there once all
    are made: a build that fails or is killed leaves `out` as it was (and at most a folder `.<random>.tmp`, which is
    safe to delete).

    Raises BuildError: no cmake, ninja or C++ compiler, no torch, `out` cannot be written, or a compiler error.
    """
    cmake, ninja = _tool("cmake"), _tool("ninja")
    _require_compiler()
    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_BUILD_TYPE": "Release",
        "TORCH_ROOT": str(_torch()),
        "OLSS_VERSION": __version__,
    }
    target = Path(out).absolute()
    staging = target / f".{secrets.token_hex(8)}.tmp"
    try:
        staging.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix="olss-") as work:
            settings["CMAKE_INSTALL_PREFIX"] = str(staging)
            options = [f"-D{name}={value}" for name, value in settings.items()]
            _run([cmake, "-G", "Ninja", "-S", str(sources()), "-B", work, *options])
            _run([ninja, "-C", work, "install"])
        for folder in ("include", "lib", "bin"):  # the program last, never before its library
            (target / folder).mkdir(exist_ok=True)
            for made in sorted((staging / folder).iterdir()):
                made.replace(target / folder / made.name)
    except OSError as cause:
        raise BuildError(f"cannot write the runtime to {str(out)!r}: {cause}; choose another folder") from cause
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target / PROGRAM


def sources() -> Path:
    """The folder with the runtime's sources: in an installed package, or in a clone. Raises BuildError."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "runtime", package.parent / "csrc" / "runtime"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise BuildError(f"the runtime's sources are not beside {package}; install olss-fast again")


def _tool(name: str) -> str:
    """A program on the PATH, or in this Python's environment, activated or not."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise BuildError(f"{name} is needed to build the runtime and was not found; pip install 'olss-fast[runtime]'")
    return found


def _require_compiler() -> None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise BuildError(
            f"no C++ compiler was found, looked for {', '.join(names)}; install g++ or clang++ that knows C++20 (on "
            "Debian and Ubuntu: apt install g++), or name one in CXX"
        )


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed, whose libraries the runtime is linked with; pip install torch")
    return Path(spec.origin).parent


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        said = done.stdout[-6000:].strip()
        raise BuildError(f"{Path(command[0]).name} failed to build the runtime; it said:\n{said}")
