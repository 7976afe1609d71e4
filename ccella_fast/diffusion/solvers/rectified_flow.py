"""Solvers of dx/dsigma = (x - x0) / sigma, the equation of rectified flows and of sigma space.

For a rectified flow, x = (1 - sigma) x0 + sigma eps (Liu et al. 2022, arXiv 2209.03003), it is the velocity eps - x0; for x =
x0 + sigma eps it is the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Tableau


@dataclass(frozen=True)
class EulerFlow(Solver):
    """Euler's method, first order. In sigma space, equal to k-diffusion's sample_euler.

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
class MonaiEulerFlow(EulerFlow):
    """Euler's method as in MONAI's RFlowScheduler, whose `step` truncates the next timestep to an integer.

    After a step to a timestep with a fraction, the sample has gone further than to the level of that timestep. With integer
    timesteps it is the same as `EulerFlow`.
    """

    num_train_timesteps: int = 1000

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        table = super().table(signal, sigma)
        following = np.floor(sigma[1:] * self.num_train_timesteps + 1e-6)  # up to the rounding of sigma
        step = following / self.num_train_timesteps - sigma[:-1]
        return table._replace(columns={**table.columns, ("next", "velocity"): step})


@dataclass(frozen=True)
class HeunFlow(Solver):
    """Heun's method, second order: two evaluations per step and one for the last step, 2 N - 1 in total.

    Equal to diffusers' FlowMatchHeunDiscreteScheduler(), and in sigma space to algorithm 1 of Karras et al. 2022 (arXiv
    2206.00364), k-diffusion's sample_heun. The default is "linspace" because it makes the last step, an Euler
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
