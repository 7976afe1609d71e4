"""Sigma space: x = x0 + sigma noise, the convention of EDM (Karras et al. 2022, arXiv 2206.00364) and k-diffusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ccella_fast.diffusion.prediction import SIGMA_SPACE
from ccella_fast.diffusion.timesteps import (
    SIGMA_SPACINGS,
    NoiseLevels,
    check_spacing,
    check_steps,
    given_levels,
    spaced_sigmas,
)
from ccella_fast.errors import ConfigError


@dataclass(frozen=True)
class Edm:
    """The process of a denoiser D(x, sigma), which receives x = x0 + sigma noise and sigma, (B,), and returns x0.

    `sample` multiplies x_T, which is standard normal noise, by the first sigma.

    Args:
        sigma_min: the last level before 0.
        sigma_max: the first level.
        rho: of the Karras spacing.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    kind: ClassVar[str] = "sigma space"
    predictions: ClassVar[tuple[str, ...]] = SIGMA_SPACE
    prediction: ClassVar[str | None] = "x0"
    timestep_spacing: ClassVar[str | None] = "karras"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            why = f"sigma_min must be above 0 and below sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}"
            raise ConfigError(why, field="sigma_min", fix="give the range of noise that the network was trained on")

    def levels(self, num_inference_steps: int, spacing: str, *, includes_last: bool = False) -> NoiseLevels:
        """N levels from sigma_max to sigma_min, for any N.

        Raises:
            ConfigError: the number of steps is not a positive integer, or the spacing is none of noise levels.
        """
        check_steps(num_inference_steps, None)
        check_spacing(spacing, SIGMA_SPACINGS, f"{spacing} spaces timesteps, of which sigma space has none")
        return self._levels(spaced_sigmas(self.sigma_max, self.sigma_min, num_inference_steps, spacing, rho=self.rho))

    def levels_at(self, timesteps: Any, sigmas: Any) -> NoiseLevels:
        """The levels at the caller's sigmas. Raises ConfigError."""
        if timesteps is not None:
            why = "sigma space has no timesteps: the network receives sigma"
            raise ConfigError(why, field="timesteps", fix="use sigmas=[...]")
        return self._levels(given_levels(sigmas, "sigmas", np.inf, 0.0, end=0.0))

    def _levels(self, sigma: np.ndarray) -> NoiseLevels:
        return NoiseLevels(sigma, np.ones(len(sigma) + 1), np.append(sigma, 0.0))


def edm_denoiser(network: Callable[[Tensor, Tensor], Tensor], *, sigma_data: float = 0.5) -> Callable:
    """The denoiser D(x, sigma) of a network F(x, t) with EDM's preconditioning.

    D = c_skip x + c_out F(c_in x, log(sigma) / 4) (Karras et al. 2022, table 1), computed in the dtype of x.

    Args:
        network: F, without the preconditioning.
        sigma_data: the standard deviation of the training data.
    """

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, *[1] * (x.ndim - 1))
        total = (level**2 + sigma_data**2).sqrt()
        output = network((x / total).to(x.dtype), torch.log(sigma) / 4)
        return (sigma_data**2 / total**2 * x + level * sigma_data / total * output).to(x.dtype)

    return denoiser
