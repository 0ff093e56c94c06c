"""Noise schedules: how much signal and noise there is at each time, and where to ask the network."""
