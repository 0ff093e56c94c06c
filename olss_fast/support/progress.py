"""Progress bars: drawn in place on a terminal; in a log file, at most one line every ten seconds."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 10.0


class LogLines:
    """A stream that turns a bar's redraws into whole lines, and drops those that come too soon."""

    last = -SECONDS  # when any bar wrote a line

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Writes `text` as a line, unless one was written within the last `SECONDS`."""
        line = text.replace("\x1b[A", "").strip()
        now = time.monotonic()
        if line and now - LogLines.last >= SECONDS:
            LogLines.last = now
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def can_draw() -> bool:
    """True if stderr can be redrawn in place: on a terminal and in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def evaluation_bar(title: str, total: int | None, progress: bool) -> tqdm[None]:
    """A bar that counts network evaluations of one sample; hidden for short work."""
    how = bar_options(progress)
    return tqdm(total=total, desc=f"{title:<26}", unit="eval", unit_scale=True, delay=0.5, **how)


def bar_options(progress: bool) -> dict[str, Any]:
    """The arguments of a tqdm bar that say whether it is shown, and where."""
    if not progress or can_draw():
        return {"disable": not progress}
    return {"disable": False, "file": LogLines(sys.stderr), "mininterval": SECONDS, "ncols": 80}
