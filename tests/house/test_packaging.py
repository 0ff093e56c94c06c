"""What an install contains, who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "olss_fast"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
HEAVY = {"diffusers", "matplotlib", "PIL", "rich", "scipy", "torch", "torchmetrics", "transformers", "triton", "typer"}
# Plans can be written, read and looked at with numpy alone.
LIGHT = [
    "errors",
    "support.text",
    "support.files",
    "plan",
    "plan.file",
    "plan.text",
    "schedule.noise_schedule",
    "solvers",
]
LIGHT += ["tuning.path_planning"]


def imported(path: Path, *, lazily: bool) -> Iterator[str]:
    """Names of modules that a file imports when it is loaded, or at any time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                within = f"{node.module}.{alias.name}"
                yield within if within in MODULES else node.module


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


# --- what an install contains -----------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(settings()["packages"]) == folders | {"olss_fast.kernels", "olss_fast.runtime"}


@pytest.mark.parametrize(("package", "folder"), [("olss_fast", "olss_fast"), ("olss_fast.runtime", "csrc/runtime")])
def test_every_data_file_is_installed(package: str, folder: str) -> None:
    installed = {path for pattern in settings()["package-data"][package] for path in (ROOT / folder).glob(pattern)}
    made = {".py", ".pyc", ".so", ".pyd"}  # modules, and what compilers leave
    data = {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in made}
    assert data
    assert data - installed == set()


def test_the_kernels_folder_hides_no_package_of_that_name(tmp_path: Path) -> None:
    """With the repository on sys.path, as by `python -m` in a clone, transformers still finds what it looks for."""
    assert importlib.util.find_spec("olss_fast.kernels") is not None
    names = "names = {name for name in vars(kernels) if not name.startswith('_')}"
    assert run_python(f"import kernels; {names}; print(names & {{'step', 'lincomb'}})").strip() == "set()"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.inner import value\n", encoding="utf-8")
    (tmp_path / "kernels" / "inner.py").write_text("value = 5\n", encoding="utf-8")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.value, kernels.inner.value)"
    assert run_python(code).split() == ["5", "5"]


def test_only_the_bindings_see_pybind11() -> None:
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.h")]
    assert [path.name for path in sources if "pybind11" in path.read_text(encoding="utf-8")] == ["bindings.cpp"]


# --- who may import whom ----------------------------------------------------------------------------------------------


def test_lower_never_imports_higher() -> None:
    """Loading has an order: no module waits for one that waits for it."""
    graph = {
        name: {other for other in imported(path, lazily=False) if other in MODULES and other != "olss_fast"} - {name}
        for name, path in MODULES.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert set(order) == set(graph)


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name: str) -> None:
    code = f"import sys, olss_fast.{name}; print(*{{module.partition('.')[0] for module in sys.modules}})"
    assert set(run_python(code).split()) & HEAVY == set()


def test_import_of_the_package_loads_nothing_heavy() -> None:
    loaded = set(run_python("import sys, olss_fast; print(*sys.modules)").split())
    assert loaded & (HEAVY | {"numpy", "safetensors"}) == set()


@pytest.mark.parametrize("name", ["plan.plan", "schedule.noise_schedule", "errors", "tuning.path_planning"])
def test_foundations_know_numpy_alone(name: str) -> None:
    others = {module.partition(".")[0] for module in imported(MODULES[f"olss_fast.{name}"], lazily=True)}
    assert others - set(sys.stdlib_module_names) <= {"numpy", "olss_fast"}


def test_solvers_and_executors_meet_only_in_a_plan() -> None:
    for name, path in MODULES.items():
        for folder, other in (("solvers", "executors"), ("executors", "solvers")):
            if name.startswith(f"olss_fast.{folder}"):
                assert not any(each.startswith(f"olss_fast.{other}") for each in imported(path, lazily=True)), name
