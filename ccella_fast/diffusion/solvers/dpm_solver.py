"""DPM-Solver++ 2M, Lu et al. 2022 (arXiv 2211.01095): second order from the last two estimates of x0.

The default spacing is that of Karras et al. The last step, of first order down to sigma 0, contributes the largest error if it
starts at a coarse timestep: on a Gaussian mixture with known score, the error of 20 steps against the exact ODE is 2 %, and 14
% with "linspace".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Tableau, Term, log_snr_steps


@dataclass(frozen=True)
class DpmSolverPlusPlus2M(Solver):
    """The ODE solver, algorithm 2 (midpoint). The first step, and a last step that ends at sigma 0, are of first order.

    Equal to diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
    final_sigmas_type="zero", use_karras_sigmas=True), or with timestep_spacing of the same name.
    """

    name, order = "dpmpp_2m", 2
    timestep_spacing = "karras"

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        h = log_snr_steps(signal, sigma)
        return Tableau(np.arange(len(h)), two_step(signal, sigma, h))


@dataclass(frozen=True)
class DpmSolverPlusPlus2MSde(Solver):
    """SDE-DPM-Solver++(2M) of the same paper: the same multistep method, with new noise in each step.

    Equal to diffusers' DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint",
    final_sigmas_type="zero", use_karras_sigmas=True), or with timestep_spacing of the same name.
    """

    name, order = "dpmpp_2m_sde", 2
    timestep_spacing = "karras"

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        h = log_snr_steps(signal, sigma)
        second = second_order(h)
        weight = -signal[1:] * np.expm1(-2 * h)
        columns = {
            ("next", "corrected"): sigma[1:] / sigma[:-1] * np.exp(-h),
            ("next", "x0"): weight * (1 + second),
            ("next", "x0_1"): -weight * second,
            ("next", "noise"): sigma[1:] * np.sqrt(-np.expm1(-2 * h)),
        }
        return Tableau(np.arange(len(h)), columns)


def two_step(signal: np.ndarray, sigma: np.ndarray, h: np.ndarray) -> dict[Term, np.ndarray]:
    """The ODE step from the last two estimates of x0; also the predictor of UniPC."""
    second = second_order(h)
    weight = -signal[1:] * np.expm1(-h)
    return {
        ("next", "corrected"): sigma[1:] / sigma[:-1],
        ("next", "x0"): weight * (1 + second),
        ("next", "x0_1"): -weight * second,
    }


def second_order(h: np.ndarray) -> np.ndarray:
    """1 / (2 r), where r is the ratio of the previous h to this one; 0 if the step is of first order."""
    second = np.zeros_like(h)
    second[1:] = h[1:] / h[:-1] / 2
    return np.where(np.isinf(h), 0.0, second)
