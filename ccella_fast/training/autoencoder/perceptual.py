"""The perceptual distance: how far two volumes are apart in the features of a pretrained network.

As MONAI's `PerceptualLoss`: the last map of a ResNet-50, normalized over its channels, squared difference, summed over channels
and averaged over places. MedicalNet sees the patch in 3D. RadImageNet sees a random share of the slices in each of three
directions, whose distances are added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.config import VaeTrainingConfig
from ccella_fast.diffusion.noise import generator
from ccella_fast.models.feature_networks import check_hash, load_feature_network
from ccella_fast.training.autoencoder.precision import network_precision

_FIELD = "vae_training.perceptual_network"
_MEAN = (0.406, 0.456, 0.485)  # of the images that the converted RadImageNet was trained on: blue, green, red


class PerceptualDistance:
    """The distance in the features of the network in the file `vae_training.perceptual_network`.

    Raises:
        CheckpointError: the file is missing or damaged, has another SHA-256 than `vae_training.perceptual_sha256`, or is of
            another network.
    """

    def __init__(self, settings: VaeTrainingConfig, device: torch.device):
        assert settings.perceptual_network is not None and settings.perceptual_sha256 is not None
        known = {settings.perceptual_sha256: "vae_training.perceptual_sha256"}
        fix = "copy the file again; if it is meant to be another one, change vae_training.perceptual_sha256"
        check_hash(settings.perceptual_network, known, field=_FIELD, fix=fix)
        network, self._kind = load_feature_network(settings.perceptual_network, field=_FIELD)
        self._network = network.to(device)
        self._share, self._seed = settings.perceptual_slices, settings.seed

    def __call__(self, reconstruction: Tensor, x: Tensor, step: int) -> Tensor:
        """The distance of two batches (B, 1, X, Y, Z), a float32 scalar. The slices depend only on the seed and the step."""
        if self._kind == "medicalnet":
            return self._distance(_standardized(reconstruction), _standardized(x))
        distances = []
        for axis in (2, 3, 4):
            a, b = (
                volume.movedim(axis, 1).flatten(0, 1) for volume in (reconstruction, x)
            )  # (slices, 1, height, width)
            order = torch.randperm(len(a), generator=generator(self._seed, "slices", step, axis))
            chosen = order[: max(1, int(len(a) * self._share))].to(a.device)
            distances.append(self._distance(self._image(a[chosen]), self._image(b[chosen])))
        return torch.stack(distances).sum()

    def _image(self, slices: Tensor) -> Tensor:
        """Slices (n, 1, height, width) in [0, 1] as the network's three channels, in the range of its training."""
        if self._kind == "radimagenet-official":
            return (2 * slices - 1).expand(-1, 3, -1, -1)
        return slices - torch.tensor(_MEAN, device=slices.device).view(1, 3, 1, 1)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        with network_precision(a):
            found = self._network.last_map(a)
            with torch.no_grad():
                expected = self._network.last_map(b)
        difference = F.normalize(found.float(), dim=1) - F.normalize(expected.float(), dim=1)
        return difference.square().sum(1).mean()


def _standardized(x: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over the batch; a constant batch becomes zero."""
    return (x - x.mean()) / x.std().clamp(min=1e-6)
