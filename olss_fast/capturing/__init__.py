"""Any linear diffusers scheduler as a Plan."""

from __future__ import annotations

from olss_fast.capturing.capturing import capture

__all__ = ["capture"]
