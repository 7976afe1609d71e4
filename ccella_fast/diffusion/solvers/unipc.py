"""UniPC, Zhao et al. 2023 (arXiv 2302.04867): a predictor and a corrector that reuses the next step's evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Tableau, Term, log_snr_steps
from ccella_fast.diffusion.solvers.dpm_solver import second_order, two_step


@dataclass(frozen=True)
class UniPc2(Solver):
    """UniPC-2 in terms of x0, with B(h) = e^h - 1 ("bh2"): predictor UniP-2 (algorithm 2), corrector UniC-2 (algorithm 1).

    Its order is 3, because the corrector adds one. Equal to diffusers' UniPCMultistepScheduler(solver_order=2,
    solver_type="bh2", predict_x0=True, final_sigmas_type="zero", use_karras_sigmas=True), or with timestep_spacing of the same
    name.
    """

    name, order = "unipc", 3
    timestep_spacing = "karras"

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        h = log_snr_steps(signal, sigma)
        columns = {**_corrector(signal, sigma, h, second_order(h)), **two_step(signal, sigma, h)}
        return Tableau(np.arange(len(h)), columns)


def _corrector(signal: np.ndarray, sigma: np.ndarray, h: np.ndarray, second: np.ndarray) -> dict[Term, np.ndarray]:
    """The step to evaluation i, repeated from `corrected_1` with the x0 of evaluation i; the identity at i = 0.

    corrected = (sigma ratio) corrected_1 + w (x0_1 + rho_1 (x0_2 - x0_1) / r + rho_2 (x0 - x0_1)),  w = -signal (e^-h - 1),
    where r = -(previous h) / h, and rho solves the two order conditions; rho_1 = 0, rho_2 = 1/2 after a first-order step.
    """
    count = len(h)
    from_x, from_x0, from_corrected, from_x0_1, from_x0_2 = (np.zeros(count) for _ in range(5))
    from_x[0] = 1.0
    steps = h[:-1]  # step i - 1 leads to evaluation i
    weight = -signal[1:-1] * np.expm1(-steps)
    b_1 = 1 / -steps - 1 / np.expm1(-steps)
    b_2 = 2 * ((np.expm1(-steps) / -steps - 1) / -steps - 0.5) / np.expm1(-steps)
    inverse_r = -2 * second[:-1]  # 1 / r; 0 after a first-order step
    with np.errstate(divide="ignore", invalid="ignore"):
        rho_1 = np.where(inverse_r == 0, 0.0, (b_1 - b_2) / (1 - 1 / inverse_r))
    rho_2 = np.where(inverse_r == 0, 0.5, b_1 - rho_1)
    from_corrected[1:] = sigma[1:-1] / sigma[:-2]
    from_x0[1:] = weight * rho_2
    from_x0_1[1:] = weight * (1 - rho_1 * inverse_r - rho_2)
    from_x0_2[1:] = weight * rho_1 * inverse_r
    return {
        ("corrected", "x"): from_x,
        ("corrected", "x0"): from_x0,
        ("corrected", "corrected_1"): from_corrected,
        ("corrected", "x0_1"): from_x0_1,
        ("corrected", "x0_2"): from_x0_2,
    }
