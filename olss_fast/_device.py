"""Where to run, as users name it."""

from __future__ import annotations

import torch

from olss_fast.errors import InputError


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """`device`, or a GPU if there is one and none is named. `InputError` for one that torch cannot use here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.empty(1, device=device)
        probe.cpu()  # refuses 'meta', whose tensors hold no numbers
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"device is {str(device)!r}, which torch cannot use: {reason}; use 'cpu' or 'cuda'") from error
    return probe.device
