"""Noise schedules: signal and noise level at each timestep, and where to evaluate the network."""
