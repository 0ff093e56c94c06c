"""One folder for what the tests of a run compile: the first process makes it, all of its workers use it. And at the end
of a run, how long each folder of tests took."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from typing import Any

import pytest
from shared_builds import VARIABLE


def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="olss-tests-")
        os.environ[VARIABLE] = folder.name
        config.add_cleanup(lambda: os.environ.pop(VARIABLE))
        config.add_cleanup(folder.cleanup)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long each folder took, all processes together."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for each in reports:
            if isinstance(each, pytest.TestReport):
                seconds["/".join(each.nodeid.split("::")[0].split("/")[:2])] += each.duration
    text = ", ".join(f"{folder} {round(spent)} s" for folder, spent in seconds.most_common())
    terminalreporter.section("time by folder")
    terminalreporter.write_line(text)
