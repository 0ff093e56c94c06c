"""Torch's compiler without its chatter, and its errors in one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def shortened(cause: BaseException) -> str:
    """What went wrong, in one line of bearable length, without torch's own stack."""
    text = str(cause).split("Exception raised from")[0].split("For more information")[0]
    return f"{type(cause).__name__}: {' '.join(text.split())[:600]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and notes of torch's compiler, which are about its own insides."""
    logger = logging.getLogger("torch")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)
