"""Building the C++ runtime: what a build leaves, and what it says where it cannot be done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runtime_build import built_runtime

from olss_fast.engine import runtime
from olss_fast.errors import BuildError


@pytest.mark.slow
def test_what_a_build_leaves() -> None:
    built = built_runtime()
    files = sorted(str(path.relative_to(built)) for path in built.rglob("*") if path.is_file())
    assert files == ["bin/olss-run", "include/olss.h", "include/olss_description.h", "lib/libolss_runtime.so"]
    for header in (built / "include").iterdir():
        assert header.read_bytes() == (runtime.sources() / header.name).read_bytes()


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr("sys.executable", str(tools / "python"))
    monkeypatch.delenv("CXX", raising=False)
    for tool in ("cmake", "ninja"):
        with pytest.raises(BuildError, match=rf"{tool} is needed .* pip install 'olss-fast\[runtime\]'"):
            runtime.build_runtime(tmp_path / "out")
        shutil.copy("/bin/true", tools / tool)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found, looked for c\+\+, g\+\+, clang\+\+"):
        runtime.build_runtime(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_build_shows_what_was_said_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "bin").mkdir(parents=True)
    (tmp_path / "out" / "bin" / "olss-run").write_text("the old one")
    monkeypatch.setattr(runtime, "_torch", lambda: tmp_path)
    with pytest.raises(BuildError, match=r"cmake failed to build the runtime; it said:(.|\n)*TORCH_INCLUDE"):
        runtime.build_runtime(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["bin", "olss-run"]
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot write the runtime to"):
        runtime.build_runtime(tmp_path / "file")
