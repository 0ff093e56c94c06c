"""GPU kernels, installed as `olss_fast.kernels`: one op a pair of files.

`step.py` and `lincomb.py` hold what is called: the checks, the plain-torch reference that also is the CPU path, and the
registration as a torch operator. `_step_triton.py` and `_lincomb_triton.py` hold the GPU code; they, and with them
Triton, are loaded at the first launch on a GPU.

The folder lies at the root of the repository. Were it importable as plain `kernels`, it would hide the package of that
name which diffusers and transformers import; hence the guard.
"""

from __future__ import annotations

if __name__ != "olss_fast.kernels":
    raise ImportError(f"this package was imported as {__name__!r}: it is olss_fast.kernels, import it by that name")

from olss_fast.kernels.lincomb import lincomb
from olss_fast.kernels.step import StepState, start, step

__all__ = ["StepState", "lincomb", "start", "step"]
