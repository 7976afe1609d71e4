"""One-step solvers of the noise schedule: ancestral sampling and DDIM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Tableau


@dataclass(frozen=True)
class Ddpm(Solver):
    """Ancestral sampling, Ho et al. 2020 (arXiv 2006.11239), eq. 7, with the posterior variance ("fixed small").

    With every training timestep this is the reference's sampler. With fewer, the posterior between *consecutive chosen*
    levels is used (Nichol and Dhariwal 2021, arXiv 2102.09672, section 4), not the single-step one.

    Equals diffusers' DDPMScheduler(variance_type="fixed_small", clip_sample=False, timestep_spacing="linspace")."""

    name, order = "ddpm", 1
    timestep_spacing = "linspace"
    includes_last = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        alpha = (signal[:-1] / signal[1:]) ** 2
        from_x0 = signal[1:] * (1 - alpha) / sigma[:-1] ** 2
        from_x = np.sqrt(alpha) * sigma[1:] ** 2 / sigma[:-1] ** 2
        noise = np.sqrt(1 - alpha) * sigma[1:] / sigma[:-1]
        columns = {("next", "corrected"): from_x, ("next", "x0"): from_x0, ("next", "noise"): noise}
        return Tableau(np.arange(len(alpha)), columns)


@dataclass(frozen=True)
class Ddim(Solver):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12. eta 0: deterministic; eta 1: the noise of the respaced `Ddpm`.

    Equals diffusers' DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="linspace") where that walks
    its own list of timesteps: it takes t - T // N for the next one, which is the list's with `leading` spacing."""

    eta: float = 0.0

    name, order = "ddim", 1
    timestep_spacing = "linspace"
    includes_last = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        noise = self.eta * sigma[1:] / sigma[:-1] * np.sqrt(1 - (signal[:-1] / signal[1:]) ** 2)
        from_eps = np.sqrt(sigma[1:] ** 2 - noise**2)
        # eps = (x - signal x0) / sigma
        from_x, from_x0 = from_eps / sigma[:-1], signal[1:] - from_eps * signal[:-1] / sigma[:-1]
        columns = {("next", "corrected"): from_x, ("next", "x0"): from_x0, ("next", "noise"): noise}
        return Tableau(np.arange(len(noise)), columns)
