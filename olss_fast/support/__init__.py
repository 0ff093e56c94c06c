"""Shared helpers: files, text, devices, progress."""
