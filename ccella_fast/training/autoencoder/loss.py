"""The autoencoder's loss: reconstruction + KL, and the terms to which `vae_training` gives a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.config import VaeTrainingConfig
from ccella_fast.losses import kl_divergence
from ccella_fast.optional import require
from ccella_fast.training.autoencoder.adversary import Adversary
from ccella_fast.training.autoencoder.perceptual import PerceptualDistance


class AutoencoderLoss:
    """The terms of the loss. All are float32; networks compute in bf16 on GPUs.

    Attributes:
        weights: of each term, by its name.
        adversary: the discriminator, if there is one.

    Raises:
        ConfigError: a term needs MONAI, which is not installed.
        CheckpointError: the feature network cannot be loaded.
    """

    def __init__(self, settings: VaeTrainingConfig, device: torch.device):
        self._settings = settings
        self.weights = {settings.reconstruction_loss: 1.0, "kl": settings.kl_weight}
        self._pixelwise = F.l1_loss if settings.reconstruction_loss == "l1" else F.mse_loss
        self.adversary: Adversary | None = None
        if settings.spectral_weight:
            require("monai", "vae_training.spectral_weight")
            from monai.losses.spectral_loss import JukeboxLoss  # imported here: MONAI takes seconds to import

            self.weights["spectral"] = settings.spectral_weight
            self._spectral = JukeboxLoss(spatial_dims=3)
        if settings.perceptual_weight:
            self.weights["perceptual"] = settings.perceptual_weight
            self._perceptual = PerceptualDistance(settings, device)
        if settings.adversarial_weight:
            require("monai", "vae_training.adversarial_weight")
            self.weights["adversarial"] = settings.adversarial_weight
            self.adversary = Adversary(settings, device)

    def judges(self, step: int) -> bool:
        """Whether the discriminator takes part in `step`."""
        return self.adversary is not None and step >= self._settings.adversarial_start

    def __call__(self, reconstruction: Tensor, mean: Tensor, sigma: Tensor, x: Tensor, step: int) -> dict[str, Tensor]:
        """The value of each term, without its weight.

        Args:
            reconstruction: (B, 1, *patch).
            mean: of the posterior.
            sigma: its standard deviation.
            x: the patches.
            step: counted from 0.

        Returns:
            Float32 scalars by the names of `weights`. Before the discriminator's first step its term is missing.
        """
        reconstruction = reconstruction.float()
        terms = {
            self._settings.reconstruction_loss: self._pixelwise(reconstruction, x),
            "kl": kl_divergence(mean, sigma),
        }
        if "spectral" in self.weights:
            terms["spectral"] = self._spectral(reconstruction, x)
        if "perceptual" in self.weights:
            terms["perceptual"] = self._perceptual(reconstruction, x, step)
        if self.adversary is not None and self.judges(step):
            terms["adversarial"] = self.adversary.verdict(reconstruction)
        return terms

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms with their weights, which is minimized."""
        total = terms[self._settings.reconstruction_loss]
        for name in list(terms)[1:]:
            total = total + self.weights[name] * terms[name]
        return total
