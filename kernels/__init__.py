"""GPU kernels, installed as `olss_fast.kernels`.

The folder lies at the root of the repository. Were it importable as plain `kernels`, it would hide the package of that
name which diffusers and transformers import; hence the guard.
"""

from __future__ import annotations

if __name__ != "olss_fast.kernels":
    raise ImportError(f"this package was imported as {__name__!r}: it is olss_fast.kernels, import it by that name")
