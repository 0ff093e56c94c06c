"""One folder for what the tests of a run compile: the first process makes it, all of its workers use it."""

from __future__ import annotations

import os
import tempfile

import pytest
from shared_builds import VARIABLE


def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="olss-tests-")
        os.environ[VARIABLE] = folder.name
        config.add_cleanup(lambda: os.environ.pop(VARIABLE))
        config.add_cleanup(folder.cleanup)
