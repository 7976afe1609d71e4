"""One-step solvers of the noise schedule: ancestral sampling and DDIM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccella_fast.diffusion.solvers.base import Solver, Tableau


@dataclass(frozen=True)
class Ddpm(Solver):
    """Ancestral sampling, Ho et al. 2020 (arXiv 2006.11239), eq. 7, with the posterior variance ("fixed small").

    With every training timestep this is the sampler of the CCELLA reference implementation. With fewer, the posterior is the
    one between consecutive *chosen* levels (Nichol and Dhariwal 2021, arXiv 2102.09672, section 4), not the single-step
    posterior.

    Equal to diffusers' DDPMScheduler(variance_type="fixed_small", clip_sample=False, timestep_spacing="linspace").
    """

    name, order = "ddpm", 1
    timestep_spacing = "linspace"
    includes_last = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        ratio, added = added_noise(signal, sigma)
        from_x0 = signal[1:] * added / sigma[:-1] ** 2
        from_x = ratio * sigma[1:] ** 2 / sigma[:-1] ** 2
        noise = np.sqrt(added) * sigma[1:] / sigma[:-1]
        columns = {("next", "corrected"): from_x, ("next", "x0"): from_x0, ("next", "noise"): noise}
        return Tableau(np.arange(len(ratio)), columns)


@dataclass(frozen=True)
class Ddim(Solver):
    """DDIM, Song et al. 2021 (arXiv 2010.02502), eq. 12.

    Equal to diffusers' DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="linspace") if its steps follow
    its own list of timesteps. It assumes t - T // N as the next timestep, which agrees with the list for "leading" spacing.

    Args:
        eta: 0 is deterministic; 1 adds as much noise as `Ddpm` over the same timesteps.
        use_clipped_model_output: what follows from `clip_x0`. False: the noise is that of the network's output, as by default
            in diffusers and MONAI. True: the noise is computed again from the clipped x0, as in guided-diffusion and
            denoising-diffusion-pytorch, and in all other solvers.
    """

    eta: float = 0.0
    use_clipped_model_output: bool = False

    name, order = "ddim", 1
    timestep_spacing = "linspace"
    includes_last = True

    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels; see `Solver.table`."""
        _, added = added_noise(signal, sigma)
        noise = self.eta * sigma[1:] / sigma[:-1] * np.sqrt(added)
        from_eps = np.sqrt(sigma[1:] ** 2 - noise**2)
        # eps = (x - signal x0) / sigma
        from_x, from_x0 = from_eps / sigma[:-1], -from_eps * signal[:-1] / sigma[:-1]
        columns = {("next", "corrected"): from_x, ("next", "x0"): signal[1:], ("next", "noise"): noise}
        if self.use_clipped_model_output:
            columns["next", "x0"] = signal[1:] + from_x0
        else:
            columns["next", "unclipped"] = from_x0
        return Tableau(np.arange(len(noise)), columns)


def added_noise(signal: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The forward step from level i + 1 to i: the factor of x, and the variance that is added."""
    ratio = signal[:-1] / signal[1:]
    return ratio, sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2
