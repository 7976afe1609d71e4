"""The noise schedule (Ho et al. 2020, arXiv 2006.11239, section 2; reference-method, section 3).

`Schedule` holds float64 tables that nobody can change. Arithmetic on samples is fp32 whatever their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ccella_fast.config import SchedulerConfig


@dataclass(frozen=True, eq=False)
class Schedule:
    """betas and alphas_cumprod (the bar-alpha of the paper), float64, shape (T,), read-only."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray

    @classmethod
    def from_config(cls, config: SchedulerConfig) -> Schedule:
        """The scaled-linear schedule: beta = linspace(sqrt(beta_start), sqrt(beta_end), T)^2."""
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        return cls(_frozen(betas), _frozen(np.cumprod(1.0 - betas)))

    def __len__(self) -> int:
        return len(self.betas)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (eq. 4), in fp32, returned in x0's dtype.

        x0, noise: (B, ...); timesteps: (B,) integers in [0, T), on the same device. No host synchronisation."""
        signal, sigma = self._roots(x0.device)
        shape = (-1, *[1] * (x0.ndim - 1))
        signal_t, sigma_t = signal[timesteps].view(shape), sigma[timesteps].view(shape)
        return (signal_t * x0.float() + sigma_t * noise.float()).to(x0.dtype)

    @lru_cache(maxsize=8)  # noqa: B019  a schedule lives as long as its process; one entry a device
    def _roots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        roots = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        signal, sigma = (torch.tensor(root, dtype=torch.float32, device=device) for root in roots)
        return signal, sigma


def _frozen(table: np.ndarray) -> np.ndarray:
    table.setflags(write=False)
    return table
