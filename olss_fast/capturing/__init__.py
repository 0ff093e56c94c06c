"""Any linear diffusers scheduler as a Plan."""

from olss_fast.capturing.capturing import capture

__all__ = ["capture"]
