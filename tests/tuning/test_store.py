"""Stores: whoever asks the same resumes, whoever asks something else is refused, and what was damaged is noticed."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tunings import LITTLE
from torch import Tensor, nn

import olss_fast
from olss_fast.errors import StoreError
from olss_fast.support import container
from olss_fast.support.progress import evaluation_bar
from olss_fast.tuning import clock
from olss_fast.tuning import store as stores
from olss_fast.tuning.compare import compare

SAMPLES = 24
SCHEDULE = olss_fast.NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000), label="one")
NAMESAKE = olss_fast.NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000) ** 1.01, label="one")


class Net(nn.Module):
    """A buffer that acts on some samples only, one that acts late, and a counter."""

    def __init__(self, *, shift: float = 0.0, late: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        self.late = late
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        given = x + self.shift * (x[:, :1] < 0)
        return torch.tanh(given) + self.late * (t < 500).to(x)[:, None]


@dataclass
class Settings:
    level: float = 1.0


class Unseen:
    """A network whose inside no identity sees, as that of compiled code."""

    def __init__(self, **changes: float) -> None:
        self.network = Net(**changes)

    def what_is_asked(self) -> dict[str, Any]:
        return {}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)


def tune(network: Any, store: Path | None = None, **changes: Any) -> olss_fast.TuneResult:
    how = {
        "noise": torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0)),
        "schedule": SCHEDULE,
        "steps": 2,
        "teacher_steps": 10,
        "effort": LITTLE,
        "progress": False,
        **changes,
    }
    return olss_fast.tune(network, store=store, **how)


ASKED = {
    "conditioning": {"y": {"settings": Settings(), "table": torch.arange(3.0)}},
    "unconditional": {"y": {"settings": Settings(), "table": torch.zeros(3)}},
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize(
    ("place", "network", "changes"),
    [
        ("network.shift", lambda: Net(shift=0.5), {}),
        ("network.late", lambda: Net(late=0.5), {}),
        ("network", lambda: lambda x, t, y: Net()(x, t), {}),
        ("guidance_scale", Net, {"guidance_scale": 2.5}),
        ("conditioning.y", Net, {"conditioning": {"y": {**ASKED["conditioning"]["y"], "settings": Settings(2.0)}}}),  # type: ignore[index]
        ("unconditional.y", Net, {"unconditional": {"y": {"settings": Settings(), "table": torch.ones(3)}}}),
        ("schedule.curve", Net, {"schedule": NAMESAKE}),
        ("teacher", Net, {"teacher_steps": 11}),
        ("split", Net, {"batch_size": 6}),
        ("noise", Net, {"noise": torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))}),
    ],
)
def test_another_question_is_refused_and_the_difference_named(
    tmp_path: Path, place: str, network: Any, changes: dict[str, Any]
) -> None:
    tune(Net(), tmp_path, **ASKED)
    with pytest.raises(StoreError, match=rf"another recording: what was asked differs in .*['\"]{place}"):
        tune(network(), tmp_path, **{**ASKED, **changes})


def test_a_network_behind_a_function_is_looked_at(tmp_path: Path) -> None:
    def behind(net: Net) -> Any:
        return lambda x, t: net(x, t)

    tune(behind(Net()), tmp_path)
    again = Net()
    tune(behind(again), tmp_path)
    assert again.calls == 3  # the probe
    with pytest.raises(StoreError, match=r"'network\.net\.late'"):
        tune(behind(Net(late=0.5)), tmp_path)


def test_what_no_identity_sees_is_asked(tmp_path: Path) -> None:
    tune(Unseen(), tmp_path)
    tune(Unseen(late=1e-6), tmp_path)  # as other kernels round
    for changes in ({"late": 0.1}, {"shift": 0.5}):
        with pytest.raises(StoreError, match="another recording: the network"):
            tune(Unseen(**changes), tmp_path)


def test_a_finished_run_is_kept_with_its_report(tmp_path: Path) -> None:
    network = Net()
    first = tune(network, tmp_path)
    network.calls = 0
    second = tune(network, tmp_path)
    assert network.calls == 3
    assert [each.errors for each in second.report.candidates] == [each.errors for each in first.report.candidates]
    network.calls = 0
    rival = olss_fast.solvers.ddim(SCHEDULE, timesteps=[900.0, 300.0])
    assert len(tune(network, tmp_path, rivals=[rival]).report.candidates) == len(first.report.candidates) + 1
    assert network.calls > 3  # another table of candidates is another judgement


def test_bars_count_what_the_network_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    monkeypatch.setattr(clock, "evaluation_bar", lambda *how: bars.append(evaluation_bar(*how)) or bars[-1])
    for kept in (0, SAMPLES * 10):  # the teacher's evaluations that an earlier run made
        evaluations = tune(Net(), tmp_path, progress=True).report.evaluations
        assert sum(bar.n for bar in bars) == sum(evaluations.values()) + kept
        bars.clear()
    assert sum(evaluations.values()) == 3 * 4  # the probe's questions about four samples


def damaged(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def test_an_altered_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    store = stores.Store(tmp_path)
    store.write("chunk", {"states": torch.randn(3, 5), "result": torch.randn(5)})
    path = store.path("chunk")
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(damaged(content, place))
        with pytest.raises(StoreError, match=r"chunk.*Delete this file and resume"):
            stores.Store(tmp_path).read("chunk", "result")
    path.write_bytes(content)
    assert stores.Store(tmp_path).read("chunk", "result").shape == (5,)


def test_a_damaged_store_is_refused_or_mended(tmp_path: Path) -> None:
    expected = tune(Net(), tmp_path)
    kinds = {path.name.split("-")[0]: path for path in sorted(tmp_path.iterdir()) if path.is_file()}
    assert kinds.keys() == {"manifest.safetensors", "chunk", "fit", "scores"}
    for kind, path in kinds.items():
        sound = path.read_bytes()
        for place in (9, len(sound) // 2, len(sound) - 1):
            path.write_bytes(damaged(sound, place))
            if kind == "fit":  # made again
                assert tune(Net(), tmp_path).plans == expected.plans
                assert path.read_bytes() == sound
            else:
                with pytest.raises(StoreError, match=str(tmp_path)):
                    tune(Net(), tmp_path)
            path.write_bytes(sound)


def test_chunks_without_their_manifest_belong_to_nobody(tmp_path: Path) -> None:
    tune(Net(), tmp_path)
    (tmp_path / "manifest.safetensors").unlink()
    other = Net(late=0.5)
    assert tune(other, tmp_path).plans == tune(Net(late=0.5)).plans
    assert other.calls > 30


@pytest.mark.parametrize("name", ["manifest", "chunk", "scores"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "truncated", "empty"])
def test_files_of_another_kind_are_named(tmp_path: Path, name: str, kind: str) -> None:
    tune(Net(), tmp_path)
    path = sorted(tmp_path.glob(f"{name}*"))[0]
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content[: len(content) // 2 if kind == "truncated" else 0])
    with pytest.raises(StoreError, match=path.name):
        tune(Net(), tmp_path)


def test_a_store_of_an_older_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "olss-fast-recording", "version": 2}')
    with pytest.raises(StoreError, match=r"of an older olss_fast, with a manifest\.json\. Give another folder"):
        tune(Net(), tmp_path)


def full(*_: Any, **__: Any) -> None:
    raise StoreError("cannot write: the disk is full; free some space or choose another folder")


def test_a_full_disk_ends_in_advice_that_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "write_atomically", full)
    with pytest.raises(StoreError, match=r"disk is full.*\. Or give store=, a folder on another disk"):
        tune(Net())
    monkeypatch.undo()
    tune(Net(), tmp_path)
    sorted(tmp_path.glob("chunk-*"))[0].unlink()
    monkeypatch.setattr(container, "write_atomically", full)
    with pytest.raises(StoreError, match=r"disk is full.*\. Then start again with the same store"):
        tune(Net(), tmp_path)


def test_no_room_for_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "TemporaryDirectory", none)
    with pytest.raises(StoreError, match=r"cannot make a folder.*No space left.*give store="):
        tune(Net())
    with pytest.raises(StoreError, match="cannot make a folder"):
        compare(Net(), noise=torch.randn(8, 4), schedule=SCHEDULE, steps=[2], teacher_steps=4, progress=False)


def test_a_store_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot use .*file as a store"):
        tune(Net(), tmp_path / "file")
