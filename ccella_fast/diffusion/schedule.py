"""The noise schedule (Ho et al. 2020, arXiv 2006.11239, section 2; docs/explanation/method.md, section 3).

`Schedule` holds read-only float64 tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ccella_fast.diffusion.prediction import DIFFUSION
from ccella_fast.diffusion.timesteps import (
    SIGMA_SPACINGS,
    NoiseLevels,
    check_spacing,
    check_steps,
    given_levels,
    spaced_sigmas,
    with_timesteps,
)
from ccella_fast.errors import ConfigError

if TYPE_CHECKING:
    from ccella_fast.config_scheduler import SchedulerConfig


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule of T timesteps.

    Attributes:
        betas: float64 (T,), read-only.
        alphas_cumprod: the paper's bar-alpha, float64 (T,), read-only.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray

    kind: ClassVar[str] = "a noise schedule"
    predictions: ClassVar[tuple[str, ...]] = DIFFUSION
    prediction: ClassVar[str | None] = "epsilon"
    timestep_spacing: ClassVar[str | None] = None

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195
    ) -> Schedule:
        """The scaled-linear schedule: beta = linspace(sqrt(beta_start), sqrt(beta_end), T)^2.

        The defaults are those of `SchedulerConfig`, which is not imported here because it needs pydantic.
        """
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        return cls(_read_only(betas), _read_only(np.cumprod(1.0 - betas)))

    @classmethod
    def from_config(cls, config: SchedulerConfig) -> Schedule:
        """The scaled-linear schedule of a configuration."""
        return cls.scaled_linear(config.num_train_timesteps, config.beta_start, config.beta_end)

    @classmethod
    def of(cls, source: Any = None) -> Schedule:
        """The schedule that `source` describes.

        Args:
            source: None (`scaled_linear()`); a Schedule; an array of betas or of alphas_cumprod, distinguished
                by their direction, because alphas_cumprod decreases; or any object with an attribute alphas_cumprod, such as
                the schedulers of diffusers and MONAI.

        Raises:
            ConfigError: `source` is not a schedule.
        """
        if source is None:
            return cls.scaled_linear()
        if isinstance(source, Schedule):
            return source
        what = "a schedule must be a 1-D array of betas or of alphas_cumprod, all strictly between 0 and 1"
        try:
            table = torch.as_tensor(getattr(source, "alphas_cumprod", source)).double().cpu().numpy()
        except (TypeError, ValueError, RuntimeError):
            why = f"{what}, got {source!r:.40}"
            raise ConfigError(why, field="schedule", fix="give such an array, or a scheduler that has one") from None
        if table.ndim != 1 or len(table) < 2:
            why = f"{what}, got {source!r:.40}"
            raise ConfigError(why, field="schedule", fix="give such an array, or a scheduler that has one")
        steps = np.diff(table)
        if not ((table > 0) & (table < 1)).all():
            fix = "give such an array"
            if len(table) > 2 and table[-1] == 0 and (steps < 0).all():
                fix = (
                    f"for zero terminal SNR replace the last alphas_cumprod by half of that before, {table[-2] / 2:.2g}"
                )
            raise ConfigError(what, field="schedule", fix=fix)
        if (steps >= 0).all():
            return cls(_read_only(table.copy()), _read_only(np.cumprod(1.0 - table)))
        if (steps < 0).all():
            return cls(_read_only(1.0 - table / np.append(1.0, table[:-1])), _read_only(table.copy()))
        why = "the schedule is not monotonic"
        raise ConfigError(why, field="schedule", fix="give non-decreasing betas or strictly decreasing alphas_cumprod")

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def sigma_over_signal(self) -> np.ndarray:
        """sqrt((1 - abar) / abar), the sigma of diffusers and k-diffusion, float64 (T,)."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def levels(self, num_inference_steps: int, spacing: str, *, includes_last: bool = False) -> NoiseLevels:
        """N levels, with int64 timesteps. Names and values of the spacings are those of diffusers.

        linspace, leading and trailing are those of Lin et al. 2024 (arXiv 2305.08891, table 2). karras, exponential and beta
        space sigma / signal between the ends of the schedule, see `spaced_sigmas`: the network receives the nearest timestep
        (karras) or the one below, the solver uses the exact level. For exponential and beta, the rounding errors of diffusers'
        fp32 tables decide whether its first timestep is T - 1 or T - 2; here it is T - 1.

        Args:
            num_inference_steps: N, from 1 to the number of training timesteps. With all of them, the first three spacings visit
                each timestep once.
            spacing: a `TimestepSpacing`.
            includes_last: whether linspace and leading end at timestep 0, as for one-step solvers. Multi-step solvers gain
                nothing from that evaluation, so they use the first N of N + 1 such points.

        Raises:
            ConfigError: `num_inference_steps` is out of range, or the spacing is unknown.
        """
        total = len(self)
        check_steps(num_inference_steps, total)
        check_spacing(spacing)
        if spacing in SIGMA_SPACINGS:
            known = self.sigma_over_signal
            sigmas = spaced_sigmas(known[-1], known[0], num_inference_steps, spacing)
            return self._levels_of_sigmas(sigmas, nearest=spacing == "karras")
        points = num_inference_steps if includes_last or num_inference_steps == total else num_inference_steps + 1
        match spacing:
            case "linspace":
                ascending = np.linspace(0, total - 1, points) if points > 1 else np.array([total - 1.0])
            case "leading":
                ascending = np.arange(points) * float(total // points)
            case _:  # trailing
                ascending = np.arange(total, 0, -total / num_inference_steps)[num_inference_steps - 1 :: -1].round() - 1
        return self._levels_of_timesteps(ascending.round()[::-1][:num_inference_steps].astype(np.int64))

    def levels_at(self, timesteps: Any, sigmas: Any) -> NoiseLevels:
        """The levels at the caller's timesteps or sigmas (sigma / signal); of both, the network receives the timesteps.

        Raises:
            ConfigError: a list is not valid.
        """
        if sigmas is not None:
            highest = 1.01 * self.sigma_over_signal[-1]  # published lists are rounded
            levels = self._levels_of_sigmas(given_levels(sigmas, "sigmas", highest, 0.0, end=0.0), nearest=True)
            return with_timesteps(levels, timesteps)
        given = given_levels(timesteps, "timesteps", len(self) - 1.0, 0.0)
        if (given != given.round()).any():
            why = f"the timesteps of a noise schedule are integers, got {given[given != given.round()][0]:g}"
            raise ConfigError(why, field="timesteps", fix="round them, or give sigmas=[...]")
        return self._levels_of_timesteps(given.astype(np.int64))

    def _levels_of_timesteps(self, timesteps: np.ndarray) -> NoiseLevels:
        abar = np.append(self.alphas_cumprod[timesteps], 1.0)
        return NoiseLevels(timesteps, np.sqrt(abar), np.sqrt(1 - abar))

    def _levels_of_sigmas(self, sigmas: np.ndarray, *, nearest: bool) -> NoiseLevels:
        """The levels at sigma / signal, which need not be levels of the schedule.

        The network receives the nearest timestep in log(sigma / signal), or the one below, as from diffusers' multi-step
        schedulers.
        """
        known = self.sigma_over_signal
        position = np.interp(np.log(sigmas), np.log(known), np.arange(len(known)))
        # The ends are whole numbers up to rounding.
        timesteps = (position.round() if nearest else np.floor(position + 1e-6)).astype(np.int64)
        signal = np.append(1 / np.sqrt(1 + sigmas**2), 1.0)
        return NoiseLevels(timesteps, signal, np.append(sigmas, 0.0) * signal)

    def mixture(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """The factors of x0 and of the noise at timesteps (B,) in [0, T), fp32 (B, 1, ...) with `ndim` dimensions (eq. 4)."""
        shape = (-1, *[1] * (ndim - 1))
        signal, sigma = self._roots(timesteps.device)
        return signal[timesteps].view(shape), sigma[timesteps].view(shape)

    @lru_cache(maxsize=8)  # noqa: B019  schedules live as long as the process; one entry per device
    def _roots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar), fp32 (T,) on `device`."""
        roots = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        signal, sigma = (torch.tensor(root, dtype=torch.float32, device=device) for root in roots)
        return signal, sigma


def _read_only(table: np.ndarray) -> np.ndarray:
    table.setflags(write=False)
    return table
