"""GPU kernels, installed as `olss_fast.kernels`: two files per op.

`step.py` and `lincomb.py` hold the callable parts: checks, the plain-torch reference that is also the CPU path, and the
registration as a torch operator. `_step_triton.py` and `_lincomb_triton.py` hold the GPU code; they, and with them
Triton, are imported at the first launch on a GPU.

The folder is at the root of the repository. With that root on sys.path it would hide the package named `kernels` that
transformers and diffusers look for: under that name it gives way to that package, and is otherwise empty.
"""

from __future__ import annotations

if __name__ == "olss_fast.kernels":
    from olss_fast.kernels.lincomb import lincomb
    from olss_fast.kernels.step import StepState, start, step

    __all__ = ["StepState", "lincomb", "start", "step"]
else:
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _elsewhere = [path for path in sys.path if os.path.realpath(path or os.curdir) != _root]
    _spec = PathFinder.find_spec(__name__, _elsewhere)
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
