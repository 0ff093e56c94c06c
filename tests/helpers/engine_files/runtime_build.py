"""The C++ runtime, and its reader of foreign files under sanitizers; each is compiled once a run of the tests."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared_builds import FOLDER, once

from olss_fast.engine import runtime
from olss_fast.errors import BuildError

CHECKER = Path(__file__).parents[2] / "hostile" / "check_files.cpp"
READERS = ("files", "engine")  # these folders know nothing of torch
SANITIZED = ["-std=c++20", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@functools.cache
def _built() -> Path | BuildError:
    try:
        return once("runtime", runtime.build_runtime)
    except BuildError as error:  # kept: each test would spend a minute to find it again
        return error


def built_runtime() -> Path:
    """The folder with bin, lib and include."""
    built = _built()
    if isinstance(built, BuildError):
        raise built
    return built


def olss_run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the program; whatever it is given, it must not end by a signal."""
    command = [str(built_runtime() / "bin" / "olss-run"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode >= 0, f"ended by signal {-done.returncode}: {done.stderr}"
    return done


def refusal(*words: object, cwd: Path | None = None) -> str:
    """The one line on which olss-run says why it refuses."""
    done = olss_run(*words, cwd=cwd)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("olss-run: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@functools.cache
def checker() -> Path:
    """The program of tests/hostile/check_files.cpp."""
    return once("check-files", _compile_checker)


def _compile_checker(program: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    sources = [CHECKER, *(file for folder in READERS for file in sorted((runtime.sources() / folder).glob("*.cpp")))]
    objects = [FOLDER / f"{source.stem}.o" for source in sources]
    base = [compiler, *SANITIZED, "-I", str(runtime.sources()), "-isystem", str(runtime.sources() / "third_party")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        commands = [[*base, "-c", str(source), "-o", str(made)] for source, made in zip(sources, objects, strict=True)]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    subprocess.run([*base, *map(str, objects), "-o", str(program), "-lpthread"], check=True)


def check_files(paths: Sequence[Path], torch: str | None = None) -> list[str]:
    """What the reader says to each file: "ok", or the number of the error's kind and its message.

    torch: a version, to look whether engines fit this machine with it.
    """
    done = subprocess.run(
        [str(checker()), *([torch] if torch else [])],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = done.stdout.splitlines()
    assert len(answers) == len(paths)
    return answers


@functools.cache
def user_program() -> Path:
    """The program of use_runtime.cpp, against the library; its headers are among the sources, together with others."""
    return once("use-runtime", _compile_user)


def _compile_user(program: Path) -> None:
    built, torch = built_runtime(), runtime._torch()
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    flags = ["-std=c++20", "-O0", "-I", str(runtime.sources()), "-isystem", f"{torch}/include"]
    folders = [f"{built}/lib", f"{torch}/lib"]
    links = [*(f"-L{each}" for each in folders), *(f"-Wl,-rpath,{each}" for each in folders)]
    source = Path(__file__).with_name("use_runtime.cpp")
    libraries = ["-lolss_runtime", "-ltorch_cpu", "-lc10", "-lpthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program), *links, *libraries], check=True)
