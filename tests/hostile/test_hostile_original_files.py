"""Damaged and malicious files of the original OLSS scheduler: a PlanFileError that says why, and nothing is run."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olss_fast.adapters.original_olss import MAX_FILE_BYTES, load_original
from olss_fast.errors import PlanFileError
from olss_fast.plan.plan import Plan

TIMES = torch.tensor([999, 500])
WX = torch.tensor([0.5, 0.25], dtype=torch.float64)
WE = torch.tensor([[0.75, 0.0], [0.5, -0.25]], dtype=torch.float64)


def stored(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


GOOD = stored((TIMES, WX, WE))


def files_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    return zipped({name: data if name.endswith("/data.pkl") else old for name, old in files_of(GOOD).items()})


class Bomb:
    """Unpickling this would raise SystemExit, which no reader catches."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the file was unpickled')",)


def nested(depth: int) -> list[Any]:
    """2^depth entries in a few bytes: whoever prints or copies it never ends."""
    value: list[Any] = [0, 0]
    for _ in range(depth):
        value = [value, value]
    return value


def with_value(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy[place] = value
    return copy


def bomb_archive() -> bytes:
    return zipped(files_of(GOOD) | {"archive/data/9": bytes(64 * 2**20)}, zipfile.ZIP_DEFLATED)


HOSTILE: dict[str, tuple[bytes, str]] = {
    # no archive, or not the usual one
    "empty": (b"", "not a zip archive of torch.save"),
    "text": (b"timesteps, wx, we\n" * 20, "not a zip archive of torch.save"),
    "truncated": (GOOD[:-1], "not a zip archive|cannot read"),
    "half": (GOOD[: len(GOOD) // 2], "not a zip archive"),
    "plain pickle": (pickle.dumps([1, 2, 3]), "not a zip archive"),
    "pickled bomb": (pickle.dumps(Bomb()), "not a zip archive"),
    "before torch 1.6": (stored((TIMES, WX, WE), _use_new_zipfile_serialization=False), "save it with a newer one"),
    "another archive": (zipped({"a.txt": b"hello"}), "torch cannot read it"),
    "zip bomb": (bomb_archive(), "a compressed archive of 671[0-9]* bytes"),
    # pickles
    "bomb": (stored((TIMES, WX, Bomb())), "holds pickled objects, which are never loaded"),
    "a class": (stored((TIMES, WX, Path("x"))), "holds pickled objects, which are never loaded"),
    "numpy arrays": (stored((np.array([999, 500]), WX.numpy(), WE.numpy())), "holds pickled objects"),
    "no pickle at all": (with_pickle(b"hello"), "pickled objects|torch cannot read it"),
    "empty pickle": (with_pickle(b""), "torch cannot read it"),
    # other content
    "nothing": (stored(None), "it holds a NoneType; expected the tuple"),
    "state dict": (stored(OrderedDict(wx=WX, we=WE)), "it holds a OrderedDict; expected the tuple"),
    "two entries": (stored((WX, WE)), "it holds a tuple of 2 entries; expected the tuple"),
    "other order": (stored((WX, WE, TIMES)), "timesteps is a tensor of torch.float64; expected a tensor or list"),
    "endless": (stored(nested(60)), "it holds a list of 2 entries"),
    "endless times": (stored((nested(60), WX, WE)), "timesteps is a list; expected a tensor or list of integers"),
    "endless weights": (stored((TIMES, WX, nested(60))), "we is a list; expected a tensor of real numbers"),
    # times
    "no times": (stored(([], torch.zeros(0), torch.zeros(0, 0))), r"timesteps has shape \(0,\); expected one row"),
    "boolean times": (stored((TIMES > 0, WX, WE)), "timesteps is a tensor of torch.bool"),
    "true": (stored(([True, False], WX, WE)), "timesteps is a list"),
    "huge integers": (stored(([10**400, 1], WX, WE)), "timesteps is a list"),
    "square times": (stored((TIMES[None], WX, WE)), r"timesteps has shape \(1, 2\)"),
    "a single number": (stored((TIMES[0], WX, WE)), r"timesteps has shape \(\)"),
    "too many": (stored((torch.arange(1000, -1, -1), WX, WE)), r"shape \(1001,\); expected one row of 1 to 1000"),
    "rising": (stored((TIMES.flip(0), WX, WE)), "timesteps 0 and 1 are 500 and 999; expected falling"),
    "equal times": (stored((torch.tensor([500, 500]), WX, WE)), "are 500 and 500; expected falling"),
    "beyond the schedule": (stored((torch.tensor([1000, 500]), WX, WE)), "pass the network's own schedule"),
    "negative": (stored((torch.tensor([999, -5]), WX, WE)), "pass the network's own schedule"),
    # weights
    "integer weights": (stored((TIMES, WX.long(), WE)), "wx is a tensor of torch.int64; expected a tensor of real"),
    "complex": (stored((TIMES, WX, WE.to(torch.complex128))), "we is a tensor of torch.complex128"),
    "short wx": (stored((TIMES, WX[:1], WE)), r"wx has shape \(1,\); expected \(2,\) for 2 timesteps"),
    "long we": (stored((TIMES, WX, torch.zeros(2, 3))), r"we has shape \(2, 3\); expected \(2, 2\)"),
    "sparse": (stored((TIMES, WX, WE.to_sparse())), "we is a torch.sparse_coo tensor on cpu; expected a dense"),
    "meta": (stored((TIMES, WX, WE.to("meta"))), "we is a torch.strided tensor on meta; expected a dense one"),
    "wide": (stored((TIMES, WX, torch.zeros(1).expand(2**40, 2**20))), r"we has shape .*; expected \(2, 2\)"),
    "nan": (stored((TIMES, with_value(WX, (1,), np.nan), WE)), r"wx\[1\] is nan; expected finite"),
    "infinite": (stored((TIMES, WX, with_value(WE, (1, 0), np.inf))), r"we\[1, 0\] is inf; expected finite"),
    "foresight": (stored((TIMES, WX, with_value(WE, (0, 1), 0.5))), r"we\[0, 1\] is 0.5; expected 0, because output 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[name]
    path = tmp_path / "olss.bin"
    path.write_bytes(data)
    with pytest.raises(PlanFileError, match=reason) as caught:
        load_original(path)
    assert "olss.bin" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "weights_only" not in str(caught.value)  # torch's advice to load it all the same is not handed on


def test_the_good_one_is_good(tmp_path: Path) -> None:
    path = tmp_path / "olss.bin"
    path.write_bytes(GOOD)
    assert load_original(path).rows.tolist() == [[1, 0, 0], [0.5, 0.75, 0], [0.25, 0.5, -0.25]]


def test_no_file_and_too_large_a_file(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="no such file"):
        load_original(tmp_path / "none.bin")
    with pytest.raises(PlanFileError, match="a folder"):
        load_original(tmp_path)
    large = tmp_path / "large.bin"
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(PlanFileError, match=f"{MAX_FILE_BYTES + 1} bytes; expected at most {MAX_FILE_BYTES}"):
        load_original(large)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, where the mutation hits that byte
def test_accidents_end_in_a_plan_or_a_named_error(tmp_path: Path) -> None:
    """Bytes of the pickle changed at random, in an archive that is right otherwise."""
    generator = random.Random(0)
    text = next(data for name, data in files_of(GOOD).items() if name.endswith("/data.pkl"))
    path = tmp_path / "olss.bin"
    refused = 0
    for _ in range(1500):
        changed = bytearray(text)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(with_pickle(bytes(changed)))
        try:
            assert isinstance(load_original(path), Plan)
        except PlanFileError:
            refused += 1
    assert refused > 1000
