"""Any linear diffusers scheduler as a Plan."""
