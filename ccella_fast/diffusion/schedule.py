"""The noise schedule (Ho et al. 2020, arXiv 2006.11239, section 2; docs/explanation/method.md, section 3).

`Schedule` holds float64 tables that nobody can change. Arithmetic on samples is fp32 whatever their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccella_fast.config import SchedulerConfig
from ccella_fast.errors import ConfigError


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

    @classmethod
    def of(cls, source: Any = None) -> Schedule:
        """The schedule meant by `source`: None (the reference's), a Schedule, an array of betas or of alphas_cumprod (told
        apart by their direction: alphas_cumprod falls), or any object that has alphas_cumprod, as the schedulers of
        diffusers and MONAI do. ConfigError when it is none of these."""
        if source is None:
            return cls.from_config(SchedulerConfig())
        if isinstance(source, Schedule):
            return source
        table = torch.as_tensor(getattr(source, "alphas_cumprod", source)).double().cpu().numpy()
        steps = np.diff(table)
        if table.ndim != 1 or len(table) < 2 or not ((table > 0) & (table < 1)).all():
            raise ConfigError(
                "a schedule is one row of betas or of alphas_cumprod, each between 0 and 1",
                field="schedule",
                fix="for zero terminal SNR put 2**-24 in place of the last alphas_cumprod",
            )
        if (steps >= 0).all():
            return cls(_frozen(table.copy()), _frozen(np.cumprod(1.0 - table)))
        if (steps < 0).all():
            return cls(_frozen(1.0 - table / np.append(1.0, table[:-1])), _frozen(table.copy()))
        fix = "betas never fall from one timestep to the next, alphas_cumprod always do"
        raise ConfigError("this schedule goes up and down", field="schedule", fix=fix)

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
