"""Torch's compiler without its warnings, and its errors in one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def shortened(cause: BaseException) -> str:
    """The error in one short line, without torch's own stack."""
    text = str(cause).split("Exception raised from")[0].split("For more information")[0]
    return f"{type(cause).__name__}: {' '.join(text.split())[:600]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings and notes of torch's compiler, which concern its internals."""
    logger = logging.getLogger("torch")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)
