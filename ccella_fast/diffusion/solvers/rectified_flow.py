"""Solvers of a rectified flow, x = (1 - sigma) x0 + sigma eps (Liu et al. 2022, arXiv 2209.03003): dx/dsigma = eps - x0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Tableau


@dataclass(frozen=True)
class EulerFlow(Solver):
    """Euler's method, first order.

    With "linspace", equal to diffusers' FlowMatchEulerDiscreteScheduler(); with "trailing", to the same scheduler after
    set_timesteps(sigmas=np.linspace(1, 1 / N, N)).
    """

    name, order = "euler_flow", 1
    timestep_spacing = "trailing"
    flow = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        step = np.diff(sigma)
        columns = {("next", "corrected"): np.ones_like(step), ("next", "velocity"): step}
        return Tableau(np.arange(len(step)), columns)


@dataclass(frozen=True)
class HeunFlow(Solver):
    """Heun's method, second order: two evaluations per step and one for the last step, 2 N - 1 in total.

    Equal to diffusers' FlowMatchHeunDiscreteScheduler(). The default is "linspace" because it makes the last step, an Euler
    step, short. Evaluations alternate between predictor and corrector: the predictor takes an Euler step to the next level; the
    corrector evaluates the network there and repeats the step with the mean of both velocities.
    """

    name, order = "heun_flow", 2
    timestep_spacing = "linspace"
    flow = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        evaluated_at = np.repeat(np.arange(len(sigma) - 1), 2)[1:]
        predicts = np.arange(len(evaluated_at)) % 2 == 0
        step = np.diff(sigma)
        half = np.where(predicts, 0.0, step[evaluated_at - 1] / 2)  # of the step that the corrector repeats
        columns = {
            ("corrected", "x"): predicts.astype(float),
            ("corrected", "corrected_1"): (~predicts).astype(float),
            ("corrected", "velocity"): half,
            ("corrected", "velocity_1"): half,
            ("next", "corrected"): np.ones_like(half),
            ("next", "velocity"): np.where(predicts, step[evaluated_at], 0.0),
        }
        return Tableau(evaluated_at, columns)
