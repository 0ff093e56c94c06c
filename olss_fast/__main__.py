"""`olss-fast`, and `python -m olss_fast`.

`inspect` of an engine file bypasses the command parser and numpy, which take longer to import than the file to read.
Everything else goes to `olss_fast.cli.commands`, and so does a damaged file, for the error message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from olss_fast.errors import OlssError


def main() -> None:
    """Entry point of the command."""
    text = shown_at_once(sys.argv[1:])
    if text is not None:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader has closed the pipe
            os._exit(1)
        return
    from olss_fast.cli.commands import app

    app()


def shown_at_once(words: Sequence[str]) -> str | None:
    """The output of `inspect FILE [--json]` if FILE is an engine; None for anything else."""
    given = [word for word in words[1:] if word != "--json"]
    if words[:1] != ["inspect"] or len(given) != 1 or given[0].startswith("-"):
        return None
    from olss_fast.engine import describe

    try:
        if describe.is_engine_file(given[0]):
            return describe.inspected(given[0], as_json="--json" in words)
    except OlssError:
        pass  # the command line reports it
    return None


if __name__ == "__main__":
    main()
