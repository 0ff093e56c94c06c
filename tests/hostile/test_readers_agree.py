"""The Python and the C++ reader of engine files take and refuse the same files, for the same kind of reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_bytes import EngineBytes
from engine_faults import FAULTS
from engine_mutants import mutants
from runtime_build import check_files

from olss_fast.engine.machine import mismatches
from olss_fast.engine.verifying import verified
from olss_fast.errors import EngineFileError

KINDS = {"0": "file", "1": "file", "2": "machine", "ok": "ok"}  # of olss::Error; a newer version is a fault of the file


def python_says(path: Path) -> str:
    try:
        facts = verified(path).manifest.facts
    except EngineFileError as error:
        return "file" if path.name in str(error) else f"no file is named: {error}"
    return "machine" if mismatches(facts["built_with"], facts["machine"], "cpu") else "ok"


def disagreements(tmp_path: Path, contents: Sequence[bytes]) -> tuple[list[tuple[int, str, str]], Counter[str]]:
    """Number, what Python and what C++ says of each file about which they differ; and how often Python says what."""
    paths = [tmp_path / f"{i}.olss" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    here, there = list(map(python_says, paths)), check_files(paths, torch.__version__)
    differ = [
        (i, python, cpp)
        for i, (python, cpp) in enumerate(zip(here, there, strict=True))
        if python != KINDS[cpp.split()[0]]
    ]
    return differ, Counter(here)


def test_the_sound_file(tmp_path: Path) -> None:
    engine = EngineBytes()
    assert isinstance(engine.manifest, dict)
    engine.manifest["built_with"]["torch"] = torch.__version__
    differ, said = disagreements(tmp_path, [engine.file()])
    assert differ == []
    assert said.keys() <= {"ok", "machine"}  # on processors of another architecture


def test_every_fault(tmp_path: Path) -> None:
    differ, said = disagreements(tmp_path, [content for _, content in FAULTS.values()])
    assert [list(FAULTS)[i] for i, *_ in differ] == []
    assert said == {"file": len(FAULTS)}


@pytest.mark.slow
def test_mutants(tmp_path: Path) -> None:
    differ, said = disagreements(tmp_path, list(mutants(2400, seed=1)))
    assert differ == []
    assert said["file"] > 1200
    assert said["ok"] + said["machine"] > 100  # texts and figures that nothing depends on
