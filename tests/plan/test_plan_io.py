"""Plan files: round trip, same bytes, atomic writing, and named errors for everything a path or a disk can do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from olss_fast.errors import OlssError, PlanFileError, StoreError
from olss_fast.plan import file as plan_file
from olss_fast.plan.file import load_plan, plan_from_bytes, plan_to_bytes, save_plan
from olss_fast.plan.plan import Plan
from olss_fast.support.files import read_bounded, write_atomically

EXTREMES = np.array([0.0, 5e-324, -5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 1 / 3, np.pi])


def make_plan(
    seed: int = 0, steps: int = 3, branches: int = 1, noises: int = 0, metadata: dict[str, str] | None = None
) -> Plan:
    """A random plan, seasoned with the extremes of float64 so that no digit may be lost."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((steps + 1, 1 + steps * branches + noises))
    rows = np.where(generator.random(rows.shape) < 0.3, generator.choice(EXTREMES, rows.shape), rows)
    for row in range(steps + 1):
        rows[row, 1 + row * branches : 1 + steps * branches] = 0
    levels = np.geomspace(1e-300, 1, steps + 1)
    return Plan(
        timesteps=generator.standard_normal(steps) * 1000,
        rows=rows,
        alphas=levels,
        sigmas=levels[::-1],
        models=generator.integers(0, 2**62, steps),
        branches=branches,
        metadata={"method": "test"} if metadata is None else metadata,
    )


def assert_same(plan: Plan, other: Plan) -> None:
    """Equal in every field, also in those that take no part in equality."""
    assert plan == other
    assert plan.metadata == other.metadata
    assert plan.alphas.tobytes() == other.alphas.tobytes()
    assert plan.sigmas.tobytes() == other.sigmas.tobytes()


# --- round trip ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 6),
    branches=st.sampled_from([1, 2]),
    noises=st.integers(0, 3),
    metadata=st.dictionaries(st.text(max_size=12), st.text(max_size=40), max_size=4),
)
def test_bytes_round_trip(seed: int, steps: int, branches: int, noises: int, metadata: dict[str, str]) -> None:
    plan = make_plan(seed, steps, branches, noises, metadata)
    data = plan_to_bytes(plan)
    loaded = plan_from_bytes(data)
    assert_same(plan, loaded)
    assert plan_to_bytes(loaded) == data


@pytest.mark.parametrize(
    "metadata",
    [
        {"": "0" * 64, "a": "sha256"},  # the place of the checksum must not be confused with what looks like it
        {"sha256": "0" * 64, 'a","sha256":"': '{"sha256":"' + "0" * 64 + '"}'},
        {"emoji": "𝛼→∞", "quote": '\\"\n\x00\x7f'},
    ],
)
def test_metadata_that_looks_like_the_format_survives(metadata: dict[str, str]) -> None:
    plan = make_plan(metadata=metadata)
    assert_same(plan, plan_from_bytes(plan_to_bytes(plan)))


def test_checksum_of_the_file_stated_in_the_metadata_survives() -> None:
    digest = hashlib.sha256(b"anything").hexdigest()
    plan = make_plan(metadata={"error": digest, "teacher": digest})
    assert_same(plan, plan_from_bytes(plan_to_bytes(plan)))


def test_file_round_trip_and_it_is_ordinary_safetensors(tmp_path: Path) -> None:
    plan, path = make_plan(branches=2, noises=1), tmp_path / "five.safetensors"
    plan.save(path)
    assert_same(plan, Plan.load(str(path)))
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {"timesteps", "rows", "alphas", "sigmas", "models"}
    assert tensors["rows"].tobytes() == plan.rows.tobytes()
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.metadata()) == {"olss_fast.plan"}


def test_format_has_not_moved() -> None:
    """A file of version 1, byte for byte as this release wrote it first. If this fails, the format has changed."""
    entry = (
        '{"sha256":"DIGEST","branches":1,"format":"olss_fast.plan","metadata":{"method":"ddim"},"version":1}'
    ).replace('"', '\\"')
    table = (
        '"models":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        '"alphas":{"dtype":"F64","shape":[2],"data_offsets":[8,24]},'
        '"rows":{"dtype":"F64","shape":[2,2],"data_offsets":[24,56]},'
        '"sigmas":{"dtype":"F64","shape":[2],"data_offsets":[56,72]},'
        '"timesteps":{"dtype":"F64","shape":[1],"data_offsets":[72,80]}}'
    )
    header = ('{"__metadata__":{"olss_fast.plan":"' + entry + '"},' + table).replace("DIGEST", "0" * 64)
    header += " " * (-len(header) % 8)
    values = np.array([0.5, 1, 1, 0, 2, -1, 0.75, 0, 999.0], "<f8").tobytes()
    blank = len(header).to_bytes(8, "little") + header.encode() + bytes(8) + values
    written = blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)
    plan = Plan(timesteps=[999], rows=[[1, 0], [2, -1]], alphas=[0.5, 1], sigmas=[0.75, 0], metadata={"method": "ddim"})
    assert_same(plan_from_bytes(written), plan)
    # The order of the tensors is the safetensors library's; a release that changes it is worth knowing about.
    assert plan_to_bytes(plan) == written


def test_files_of_earlier_releases_are_read_and_written_again_to_the_bit() -> None:
    """The golden file was written at commit e2964f2, by the safetensors library."""
    golden = Path(__file__).parents[1] / "golden" / "plan_v1.safetensors"
    plan = load_plan(golden)
    assert (plan.nfe, plan.columns, plan.branches, plan.noises) == (4, 12, 2, 3)
    assert plan.timesteps.tolist() == [901.5, 600, 310.25, 1 / 3]
    assert plan.models.tolist() == [0, 1, 1, 0]
    assert plan.rows[2, 0] == 5e-324
    assert plan.metadata == {"method": "golden", "note": '𝛼→∞ "quoted" \\ \x7f\n', "sha256": "0" * 64}
    assert plan_to_bytes(plan) == golden.read_bytes()


@pytest.mark.parametrize("steps", [600, 1000])  # 2.8 and 7.7 MiB
def test_large_files_of_earlier_releases_are_read_and_written_again_to_the_bit(steps: int) -> None:
    """As that release wrote them: by the safetensors library, one SHA-256 of all with 64 zeros in its place."""
    plan = make_plan(steps=steps)
    entry = {
        "sha256": "0" * 64,
        "branches": 1,
        "format": "olss_fast.plan",
        "metadata": dict(plan.metadata),
        "version": 1,
    }
    arrays = {name: np.array(getattr(plan, name)) for name in ("timesteps", "rows", "alphas", "sigmas", "models")}
    blank = safetensors.numpy.save(arrays, metadata={"olss_fast.plan": json.dumps(entry, separators=(",", ":"))})
    written = blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)
    assert_same(plan_from_bytes(written), plan)
    assert plan_to_bytes(plan) == written


def test_same_plan_gives_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib; from olss_fast.plan import Plan; from olss_fast.plan.file import plan_to_bytes\n"
        "plan = Plan(timesteps=[9], rows=[[1, 0], [2, 3]], alphas=[1, 1], sigmas=[1, 0], metadata={M})\n"
        "print(hashlib.sha256(plan_to_bytes(plan)).hexdigest())"
    )
    entries = ["'a': 'x', 'b': 'y', 'c': 'z'", "'c': 'z', 'b': 'y', 'a': 'x'"]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code.replace("M", text)],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, text in enumerate(entries)
    }
    assert len(digests) == 1


def test_teacher_of_a_thousand_steps_fits_and_what_the_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    plan = Plan(timesteps=np.arange(1000), rows=np.eye(1001), alphas=np.ones(1001), sigmas=np.ones(1001))
    assert_same(plan, plan_from_bytes(plan_to_bytes(plan)))
    too_large = Plan(timesteps=np.arange(1500), rows=np.eye(1501), alphas=np.ones(1501), sigmas=np.ones(1501))
    too_wide = make_plan(noises=plan_file.MAX_COLUMNS)
    talkative = make_plan(metadata={"error": "x" * plan_file.FORMAT.most_header})
    for plan, message in [(too_large, "bytes"), (too_wide, "columns"), (talkative, "bytes of header and metadata")]:
        with pytest.raises(PlanFileError, match=f"{message}; a plan file holds at most"):
            plan.save(tmp_path / "plan.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "function"), [(os, "fsync"), (os, "open"), (Path, "replace")])
def test_full_disk_is_named_and_the_old_file_stays(
    where: object, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(make_plan(1), path)

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, function, full)
    with pytest.raises(PlanFileError, match=r"cannot write \d+ bytes to '.*plan.safetensors': the disk is full; free"):
        save_plan(make_plan(2), path)
    monkeypatch.undo()
    assert_same(load_plan(path), make_plan(1))
    assert list(tmp_path.iterdir()) == [path]


def test_write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A true failure of the system in the middle of the data, by a limit on the size of files."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys\n"
        "from olss_fast.support.files import write_atomically\n"
        "from olss_fast.errors import OlssError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(sys.argv[1], bytes(5000))\n"
        "except OlssError as error: print(type(error).__name__, error)"
    )
    path = tmp_path / "large"
    path.write_bytes(b"old")
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("PlanFileError cannot write 5000 bytes")
    assert "size limit" in run.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_reach_the_disk_before_the_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(descriptor: int) -> None:
        events.append("flush " + ("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path else "file"))
        fsync(descriptor)

    def log_replace(source: Path, target: Path) -> Path:
        events.append("rename")
        return replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    write_atomically(tmp_path / "file", b"data")
    assert events == ["flush file", "rename", "flush folder"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_caller_may_name_the_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file or folder"):
        write_atomically(tmp_path / "none" / "file", b"", error=StoreError)
    with pytest.raises(StoreError, match="no such file or folder"):
        read_bounded(tmp_path / "none", 10, error=StoreError)


# --- paths ---------------------------------------------------------------------------------------------------------


def link(path: Path, target: Path) -> Path:
    try:
        path.symlink_to(target)
    except (OSError, NotImplementedError):
        pytest.skip("no symbolic links here")
    return path


def test_unusable_paths_are_named_when_saving(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    cases: list[tuple[object, str]] = [
        (tmp_path / "none" / "plan", "no such file or folder; check the path, and create the folder first"),
        (tmp_path, "it is a folder; give the path of a file"),
        (tmp_path / "file" / "plan", "a part of the path is a file"),
        (tmp_path / ("x" * 300), "the name is too long"),
        (link(tmp_path / "link", tmp_path / "file"), "it is a symbolic link"),
        ("nul\0byte", "null"),
        (3, "int"),
    ]
    for path, message in cases:
        with pytest.raises(PlanFileError, match=f"cannot write .*{message}"):
            save_plan(make_plan(), path)  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_unusable_paths_are_named_when_loading(tmp_path: Path) -> None:
    loop = link(tmp_path / "loop", tmp_path / "loop")
    cases: list[tuple[object, str]] = [
        (tmp_path / "none", "no such file or folder; check the path"),
        (tmp_path, "it is a folder; give the path of a file"),
        (link(tmp_path / "dangling", tmp_path / "none"), "no such file or folder"),
        (loop, "loop of symbolic links"),
        (tmp_path / ("x" * 300), "the name is too long"),
        ("nul\0byte", "null"),
        (0, "int"),
    ]
    for path, message in cases:
        with pytest.raises(PlanFileError, match=f"cannot read .*{message}"):
            load_plan(path)  # type: ignore[arg-type]


def test_link_to_a_plan_is_followed(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "plan")
    assert_same(load_plan(link(tmp_path / "link", tmp_path / "plan")), make_plan())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanFileError, match="device, pipe or socket"):
        load_plan(tmp_path / "pipe")  # reading would wait for ever
    with pytest.raises(PlanFileError, match="device, pipe or socket"):
        save_plan(make_plan(), tmp_path / "pipe")


def test_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    size = 2**42  # a sparse file; reading 4 TiB into memory would fail
    try:
        with path.open("wb") as file:
            file.truncate(size)
    except OSError:
        pytest.skip("no sparse files of this size here")
    with pytest.raises(PlanFileError, match=f"it has {size} bytes; expected at most {plan_file.FORMAT.most_bytes}"):
        load_plan(path)


def test_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(11))
    small = os.stat_result((0o100644, 0, 0, 1, 0, 0, 10, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda number: small)
    with pytest.raises(PlanFileError, match="grew beyond 10 bytes"):
        read_bounded(path, 10)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_missing_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    save_plan(make_plan(), path)
    path.chmod(0)
    with pytest.raises(PlanFileError, match="permission denied"):
        load_plan(path)


def test_error_is_also_an_oserror() -> None:
    with pytest.raises(OSError, match="no such file") as caught:
        load_plan("no such folder/plan")
    assert isinstance(caught.value, OlssError)
