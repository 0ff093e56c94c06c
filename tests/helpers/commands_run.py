"""Commands of `olss-fast`, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from olss_fast.cli.commands import app


def run(*words: object, code: int = 0) -> str:
    """Output of the command, which must end with `code`."""
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    assert outcome.exit_code == code, outcome.output
    return outcome.output


def refusal(*words: object) -> str:
    """The messages of a refused command, as one line."""
    output = run(*words, code=2)
    assert "Traceback" not in output
    return " ".join(output.split())
