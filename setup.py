"""Builds the one compiled part, `olss_fast._C`; everything else is declared in pyproject.toml.

No torch is needed, nothing is probed or downloaded, and no flag ties the result to the machine that built it.
"""

from __future__ import annotations

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

FLAGS = ["/O2", "/W3"] if sys.platform == "win32" else ["-O3", "-ffp-contract=off", "-Wall", "-Wextra"]

ParallelCompile().install()

setup(
    ext_modules=[
        Pybind11Extension(
            "olss_fast._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=[*sorted(glob("csrc/*.h")), "csrc/runtime/run/step.h"],
            include_dirs=["csrc"],
            extra_compile_args=FLAGS,
            cxx_std=17,
        )
    ]
)
