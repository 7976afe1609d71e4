"""The objective of the training: the noise process, what the network predicts, how times are drawn, how levels are weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ccella_fast.diffusion.flow import RectifiedFlow
from ccella_fast.diffusion.prediction import training_target
from ccella_fast.diffusion.schedule import Schedule

if TYPE_CHECKING:
    from ccella_fast.config import Config
    from ccella_fast.config_scheduler import SchedulerConfig


def noise_process(config: SchedulerConfig, size: Sequence[int]) -> Schedule | RectifiedFlow:
    """The noise process of a configuration, in training and in sampling, for latents of this spatial size."""
    return RectifiedFlow.from_config(config, size) if config.is_flow else Schedule.from_config(config)


def process_in_words(config: SchedulerConfig, size: Sequence[int]) -> str:
    """The noise process for readers of a model's documents."""
    total, process = config.num_train_timesteps, noise_process(config, size)
    if isinstance(process, Schedule):
        return f"{total} steps, {config.schedule} from {config.beta_start} to {config.beta_end}"
    shift = "" if process.shift == 1 else f", shifted by {process.shift:.4g} for this size of the latent"
    return f"rectified flow, (1 - t / {total}) latent + t / {total} noise for times t from {total} to 0{shift}"


@dataclass(frozen=True, eq=False)
class Objective:
    """What is drawn and compared in a training step. The default is the reference's.

    Attributes:
        process: the noise process.
        prediction: what the network predicts.
        sample_method: how the times of a rectified flow are drawn, before its shift: "uniform", or "logit-normal" for the
            sigmoid of a normal number (Esser et al. 2024, arXiv 2403.03206, section 3.1). A noise schedule's are uniform.
        loc: the mean of that number.
        scale: its standard deviation.
        min_snr_gamma: gamma of the weights of the noise levels; None: no weights.
    """

    process: Schedule | RectifiedFlow = field(default_factory=Schedule.scaled_linear)
    prediction: str = "epsilon"
    sample_method: str = "uniform"
    loc: float = 0.0
    scale: float = 1.0
    min_snr_gamma: float | None = None

    @classmethod
    def from_config(cls, config: Config) -> Objective:
        """The objective of a configuration, for latents of its grid."""
        scheduler = config.scheduler
        return cls(
            noise_process(scheduler, config.check_grid()), scheduler.prediction, scheduler.sample_method, scheduler.loc,
            scheduler.scale, config.training.min_snr_gamma,
        )  # fmt: skip

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps; of a rectified flow, the time at pure noise."""
        return len(self.process) if isinstance(self.process, Schedule) else int(self.process.noise_at)

    def as_timesteps(self, times: Tensor) -> Tensor:
        """Times from 0 to `num_timesteps` as the network receives them: whole for a noise schedule."""
        return times.long() if isinstance(self.process, Schedule) else times.float()

    def draw_timestep(self, rng: torch.Generator) -> Tensor:
        """The network's time for one sample, (): int64 for a noise schedule, float32 for a rectified flow."""
        if isinstance(self.process, Schedule):
            return torch.randint(len(self.process), (), generator=rng)
        if self.sample_method == "logit-normal":
            sigma = torch.sigmoid(self.loc + self.scale * torch.randn((), generator=rng))
        else:
            sigma = torch.rand((), generator=rng)
        return self.process.time(self.process.shifted(sigma))

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = signal x0 + sigma noise, without host synchronization.

        Args:
            x0: (B, ...).
            noise: (B, ...), on the same device.
            timesteps: (B,), on the same device, as the network receives them.

        Returns:
            x_t, computed in fp32 and returned in the dtype of `x0`.
        """
        signal, sigma = self.process.mixture(timesteps, x0.ndim)
        return (signal * x0.float() + sigma * noise.float()).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should output for these samples, like x0. The reference's is the noise itself, at no cost."""
        if self.prediction == "epsilon":
            return noise
        return training_target(self.prediction, x0, noise, *self.process.mixture(timesteps, x0.ndim))

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """The min-SNR weight of each sample, fp32 (B,); None: all are 1.

        With SNR = abar / (1 - abar), it is min(SNR, gamma) for the error of x0 (Hang et al. 2023, arXiv 2303.09556, section
        3.4). The squared error of x0 is that of the noise over SNR, and that of v over SNR + 1.
        """
        return None if self.min_snr_gamma is None else self._snr_weights(timesteps.device)[timesteps]

    @lru_cache(maxsize=8)  # noqa: B019  objectives live as long as the process; one entry per device
    def _snr_weights(self, device: torch.device) -> Tensor:
        """The weights of all timesteps, fp32 (T,)."""
        assert isinstance(self.process, Schedule) and self.min_snr_gamma is not None
        snr = self.process.alphas_cumprod / (1 - self.process.alphas_cumprod)
        weights = np.minimum(snr, self.min_snr_gamma) / {"epsilon": snr, "v": snr + 1, "x0": 1.0}[self.prediction]
        return torch.tensor(weights, dtype=torch.float32, device=device)
