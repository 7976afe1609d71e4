"""Solvers of a rectified flow, x = (1 - sigma) x0 + sigma eps (Liu et al. 2022, arXiv 2209.03003): dx/dsigma = eps - x0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Table


@dataclass(frozen=True)
class EulerFlow(Solver):
    """Euler's method. With "linspace" it equals diffusers' FlowMatchEulerDiscreteScheduler(); with "trailing", the same one
    after set_timesteps(sigmas=np.linspace(1, 1 / N, N))."""

    name = "euler_flow"
    timestep_spacing = "trailing"
    flow = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Table:
        ratio = sigma[1:] / sigma[:-1]
        columns = {("next", "corrected"): ratio, ("next", "x0"): 1 - ratio}  # the velocity is (x - x0) / sigma
        return Table(np.arange(len(ratio)), columns)


@dataclass(frozen=True)
class HeunFlow(Solver):
    """Heun's method, second order: two evaluations a step and one for the last, 2 N - 1 in all.

    With "linspace" it equals diffusers' FlowMatchHeunDiscreteScheduler(). Evaluations alternate: one predicts the next level
    by Euler; the next one sees that level, takes the step again with the mean of both velocities, and stays there."""

    name = "heun_flow"
    timestep_spacing = "trailing"
    flow = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Table:
        evaluated_at = np.repeat(np.arange(len(sigma) - 1), 2)[1:]
        predicts = np.arange(len(evaluated_at)) % 2 == 0
        here, following = sigma[evaluated_at], sigma[evaluated_at + 1]
        before = np.where(predicts, 1.0, sigma[evaluated_at - 1])
        half = np.where(predicts, 0.0, (here - before) / 2)
        columns = {
            # corrected_1 + half ((corrected_1 - x0_1) / before + (x - x0) / here)
            ("corrected", "x"): np.where(predicts, 1.0, half / here),
            ("corrected", "x0"): -half / here,
            ("corrected", "corrected_1"): np.where(predicts, 0.0, 1 + half / before),
            ("corrected", "x0_1"): -half / before,
            ("next", "corrected"): np.where(predicts, following / here, 1.0),
            ("next", "x0"): np.where(predicts, 1 - following / here, 0.0),
        }
        return Table(evaluated_at, columns)
