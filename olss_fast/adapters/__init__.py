"""Bridges to other libraries, each of which is imported on first use."""
