"""Choosing a device by the user's name for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from olss_fast.errors import InputError

_LOCK = threading.RLock()
Tensors = tuple[Tensor, ...]


@contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 and the CPU as torch's defaults, for foreign code that relies on them. One thread at a time, and only if
    they differ: the default dtype is global."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype == torch.float32 and device.type == "cpu":
        yield
        return
    with _LOCK, torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """`device`, or by default a GPU if there is one, else the CPU. `InputError` if torch cannot use it here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.empty(1, device=device)
        probe.cpu()  # refuses 'meta', whose tensors hold no numbers
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"device is {str(device)!r}, which torch cannot use: {reason}; use 'cpu' or 'cuda'") from error
    return probe.device


class Moved(dict[Any, Tensors]):
    """Tensors that were moved to a device, by what they are for. Copies and pickles hold none: they move their own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Moved, ()

    def of(self, key: Any, make: Callable[[], Tensors]) -> Tensors:
        """Made when first needed, and anew under another FakeTensorMode: fake and real tensors do not mix."""
        made = self.get(key)
        if made is None or not (torch.compiler.is_compiling() or _mode(made[0]) is _mode(torch.empty(0, device="cpu"))):
            made = self[key] = make()
        return made


def _mode(tensor: Tensor) -> object:
    return getattr(tensor, "fake_mode", None)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to its end on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
