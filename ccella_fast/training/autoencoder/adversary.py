"""The patch discriminator: a second network, trained next to the autoencoder, that tells patches from their reconstructions.

Least squares on a PatchGAN, as MAISI's autoencoder is trained: MONAI's `PatchDiscriminator` with instance normalization and its
`PatchAdversarialLoss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccella_fast.config import VaeTrainingConfig
from ccella_fast.diffusion.noise import generator
from ccella_fast.training.autoencoder.precision import network_precision


class Adversary:
    """The discriminator and its optimizer. The initial weights depend only on the seed."""

    def __init__(self, settings: VaeTrainingConfig, device: torch.device):
        # Imported here: MONAI takes seconds to import.
        from monai.losses.adversarial_loss import PatchAdversarialLoss
        from monai.networks.nets.patchgan_discriminator import PatchDiscriminator

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(settings.seed, "discriminator").initial_seed())
            network = PatchDiscriminator(
                spatial_dims=3, channels=settings.discriminator_channels, in_channels=1, out_channels=1,
                num_layers_d=settings.discriminator_layers, norm="INSTANCE",
            )  # fmt: skip
        self.network = network.to(device).requires_grad_(False)  # but in `train_step`
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.lr, betas=settings.adam_betas, weight_decay=settings.weight_decay
        )
        self._loss = PatchAdversarialLoss(criterion="least_squares")
        self._max_grad_norm = settings.max_grad_norm
        self._relative_rate = (settings.discriminator_lr or settings.lr) / settings.lr

    def verdict(self, reconstruction: Tensor) -> Tensor:
        """The autoencoder's loss: how far the discriminator is from taking a reconstruction for an image; a float32 scalar."""
        return self._loss(self._logits(reconstruction), target_is_real=True, for_discriminator=False)

    def train_step(self, reconstruction: Tensor, x: Tensor, rate: float) -> Tensor:
        """Update the discriminator once.

        Args:
            reconstruction: (B, 1, *patch); no gradient flows back to it.
            x: the patches.
            rate: the autoencoder's learning rate.

        Returns:
            The discriminator's loss on the device.
        """
        self.network.requires_grad_(True)
        fake = self._loss(self._logits(reconstruction.detach()), target_is_real=False, for_discriminator=True)
        real = self._loss(self._logits(x), target_is_real=True, for_discriminator=True)
        loss = 0.5 * (fake + real)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.network.requires_grad_(False)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self._relative_rate
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _logits(self, x: Tensor) -> Tensor:
        with network_precision(x):
            return self.network(x)[-1].float()
