"""`olss-fast`, and `python -m olss_fast`.

`inspect` of an engine file takes a short way, past the parser of the commands and past numpy, which take longer to
start than the file to read. Whatever is not exactly that goes to `olss_fast.cli.commands`, and so does a damaged file:
it has the messages.
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
        except BrokenPipeError:  # whoever reads has seen enough
            os._exit(1)
        return
    from olss_fast.cli.commands import app

    app()


def shown_at_once(words: Sequence[str]) -> str | None:
    """What `inspect FILE [--json]` prints where FILE is an engine; None for anything else."""
    given = [word for word in words[1:] if word != "--json"]
    if words[:1] != ["inspect"] or len(given) != 1 or given[0].startswith("-"):
        return None
    from olss_fast.engine import describe

    try:
        if describe.is_engine_file(given[0]):
            return describe.inspected(given[0], as_json="--json" in words)
    except OlssError:
        pass  # told by the command line
    return None


if __name__ == "__main__":
    main()
