"""Diffusion processes: schedules, solvers and the sampling loop, independent of any network."""
