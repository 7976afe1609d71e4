"""Rectified flows (Liu et al. 2022, arXiv 2209.03003): x = (1 - sigma) x0 + sigma noise, sigma from 1 to 0."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from ccella_fast.diffusion.prediction import FLOW
from ccella_fast.diffusion.timesteps import (
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


@dataclass(frozen=True)
class RectifiedFlow:
    """A rectified flow, and the time that its network receives: noise_at at pure noise, data_at at the data.

    The default is the convention of diffusers and MONAI. `RectifiedFlow(noise_at=1)` is a time from 1 to 0, and
    `RectifiedFlow(noise_at=0, data_at=1)` one that runs from noise to data, as in torchcfm and MOTFM. The sign of the velocity
    is independent of it, see `prediction` of {py:func}`ccella_fast.sample`.

    Args:
        noise_at: the network's time at sigma = 1.
        data_at: the network's time at sigma = 0.
        shift: s in sigma' = s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, arXiv 2403.03206, eq. 23), which spends more
            steps on noisy levels: diffusers' `shift`; exp(mu) for its dynamic shifting; (numel / base_img_size_numel) **
            (1 / spatial_dim) for MONAI's use_timestep_transform, whose transform_scale has no effect.
        sigma_min: the last level before 0 for every spacing but "trailing".
    """

    noise_at: float = 1000.0
    data_at: float = 0.0
    shift: float = 1.0
    sigma_min: float = 0.001

    kind: ClassVar[str] = "a rectified flow"
    predictions: ClassVar[tuple[str, ...]] = FLOW
    prediction: ClassVar[str | None] = None  # must be given: the sign differs between projects
    timestep_spacing: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.noise_at == self.data_at:
            why = f"noise_at and data_at must differ, both are {self.noise_at:g}"
            raise ConfigError(
                why, field="noise_at", fix="give the times that the network receives at noise and at data"
            )
        if not self.shift > 0:
            raise ConfigError(f"shift must be positive, got {self.shift:g}", field="shift", fix="use 1 for no shift")
        if not 0 < self.sigma_min < 1:
            why = f"sigma_min must be between 0 and 1, got {self.sigma_min:g}"
            raise ConfigError(why, field="sigma_min", fix="use 1 / num_train_timesteps")

    @classmethod
    def from_config(cls, config: SchedulerConfig, size: Sequence[int]) -> RectifiedFlow:
        """The flow of a configuration for latents of this spatial size, on which the shift depends as in MONAI."""
        shift, total = 1.0, config.num_train_timesteps
        if config.use_timestep_transform:
            shift = (prod(size) / config.base_img_size_numel) ** (1 / len(size)) * config.transform_scale
        return cls(noise_at=float(total), shift=shift, sigma_min=1 / total if total > 1 else cls.sigma_min)

    def levels(self, num_inference_steps: int, spacing: str, *, includes_last: bool = False) -> NoiseLevels:
        """N levels, for any N.

        trailing is sigma = 1, 1 - 1/N, ..., 1/N, then shifted. linspace is N values from 1 to the shifted sigma_min, then
        shifted: the last level is shifted twice, as in diffusers (huggingface/diffusers#13243), and without a shift it is
        sigma_min. karras, exponential and beta lie between the ends of linspace.

        Raises:
            ConfigError: the number of steps is not a positive integer, or the spacing is unknown or "leading".
        """
        check_steps(num_inference_steps, None)
        why = "leading timesteps do not include pure noise, where a rectified flow starts"
        check_spacing(spacing, ("trailing", "linspace", "karras", "exponential", "beta"), why)
        last = self.shifted(self.sigma_min)
        match spacing:
            case "trailing":
                sigma = self.shifted(np.linspace(1, 1 / num_inference_steps, num_inference_steps))
            case "linspace":
                sigma = self.shifted(np.linspace(1, last, num_inference_steps))
            case _:
                sigma = spaced_sigmas(1.0, self.shifted(last), num_inference_steps, spacing)
        return self._levels(sigma)

    def levels_at(self, timesteps: Any, sigmas: Any) -> NoiseLevels:
        """The levels at the caller's times or sigmas, as given; if both are given, the network receives the timesteps.

        Raises:
            ConfigError: a list is not valid, or the shift would have no effect.
        """
        if self.shift != 1:
            why = f"timesteps and sigmas are used as given, so the shift of {self.shift:g} would have no effect"
            raise ConfigError(why, field="shift", fix="shift the values yourself, or give num_inference_steps alone")
        if sigmas is not None:
            return with_timesteps(self._levels(given_levels(sigmas, "sigmas", 1.0, 0.0, end=0.0)), timesteps)
        received = given_levels(timesteps, "timesteps", self.noise_at, self.data_at, end=self.data_at)
        return self._levels((received - self.data_at) / (self.noise_at - self.data_at))

    def shifted(self, sigma: Any) -> Any:
        """The noise level, or levels, after the shift."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def time(self, sigma: Any) -> Any:
        """What the network receives at a noise level, or at several."""
        return self.data_at + (self.noise_at - self.data_at) * sigma

    def mixture(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """The factors of x0 and of the noise at the network's times (B,), fp32 (B, 1, ...) with `ndim` dimensions."""
        sigma = ((timesteps.float() - self.data_at) / (self.noise_at - self.data_at)).view(-1, *[1] * (ndim - 1))
        return 1 - sigma, sigma

    def _levels(self, sigma: np.ndarray) -> NoiseLevels:
        timesteps, sigma = self.time(sigma), np.append(sigma, 0.0)
        return NoiseLevels(timesteps, 1 - sigma, sigma)


@dataclass(frozen=True)
class MonaiFlow(RectifiedFlow):
    """The flow of a MONAI RFlowScheduler, at the timesteps that the scheduler itself chooses.

    Args:
        scheduler: the RFlowScheduler, which is not modified.
        size: the spatial size of the samples, for use_timestep_transform.
    """

    scheduler: Any = None
    size: Sequence[int] = ()

    prediction: ClassVar[str | None] = "x0_minus_noise"  # the sign of RFlowScheduler.step
    timestep_spacing: ClassVar[str | None] = "of the scheduler"

    def levels(self, num_inference_steps: int, spacing: str, *, includes_last: bool = False) -> NoiseLevels:
        """The scheduler's own timesteps. Raises ConfigError."""
        if spacing != self.timestep_spacing:
            why = f"timestep_spacing='{spacing}' cannot be combined with an RFlowScheduler, which has its own timesteps"
            raise ConfigError(why, field="timestep_spacing", fix=f"remove it, or use schedule={self._equal_flow()}")
        total = self.scheduler.num_train_timesteps
        check_steps(num_inference_steps, None)
        if num_inference_steps > total:
            why = f"an RFlowScheduler of {total} timesteps takes at most {total} steps, got {num_inference_steps}"
            raise ConfigError(
                why, field="num_inference_steps", fix=f"for more, use schedule={self._equal_flow()}, which has no limit"
            )
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, input_img_size_numel=prod(self.size))
        timesteps = scheduler.timesteps.numpy()
        return self._levels(timesteps.astype(np.float64) / self.noise_at)._replace(timesteps=timesteps)

    def levels_at(self, timesteps: Any, sigmas: Any) -> NoiseLevels:
        """See `RectifiedFlow.levels_at`. Raises ConfigError."""
        if self.scheduler.use_timestep_transform:
            why = "timesteps and sigmas are used as given, so use_timestep_transform would have no effect"
            raise ConfigError(
                why, field="schedule", fix="transform the values yourself, and use schedule=RectifiedFlow()"
            )
        return super().levels_at(timesteps, sigmas)

    def _equal_flow(self) -> str:
        """A flow with the same shift, as one would write it."""
        shift = 1.0
        if self.scheduler.use_timestep_transform:
            ratio = prod(self.size) / self.scheduler.base_img_size_numel
            shift = ratio ** (1 / self.scheduler.spatial_dim)  # the scheduler does not pass its transform_scale on
        return f"RectifiedFlow(noise_at={self.noise_at:g}, shift={shift:.6g})"


def is_monai_flow(scheduler: Any) -> bool:
    """Whether an object is MONAI's RFlowScheduler, which is not imported here."""
    return any(kind.__name__ == "RFlowScheduler" for kind in type(scheduler).__mro__)
