"""Random 3D convolutional networks as a control that needs no weights.

Features of random networks rank generators much as trained ones do (arXiv 2208.09218). What trained features show and these do
not is what training has added.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.evaluation.features.preprocessing import Window
from ccella_fast.models.feature_networks import float32_inference

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

_WINDOW = Window((0.8, 0.8, 3.0), (96, 96, 16))
_NETWORKS = 5
_CHANNELS = (1, 16, 32, 128)
# Averaged after each convolution. With strides instead, a shift by 2.4 mm moved the features by 0.87 of the mean distance of
# two patients; with averages by 0.21, and the order of blur, noise and zoom stayed (five T2 studies).
_POOLING = ((2, 2, 1), (2, 2, 1), (2, 2, 2))


class RandomNetworks:
    """One space, `random`: five networks of three convolutions; mean and standard deviation of the 128 last channels of each.

    The weights are drawn by numpy, whose generator gives the same numbers on every machine and in every version.

    Args:
        device: of the networks.
    """

    def __init__(self, *, device: str = "cpu"):
        self._networks = [[(w.to(device), b.to(device)) for w, b in _draw(seed)] for seed in range(_NETWORKS)]
        self._device = device
        self.spaces = {"random": _NETWORKS * 2 * _CHANNELS[-1]}
        self.sequences: frozenset[str] | None = None
        self.identity: dict[str, object] = {
            "extractor": "random",
            "version": 1,
            "network": f"{_NETWORKS} of 3x3x3 convolutions, ReLU and average pooling, channels {_CHANNELS}, pooling {_POOLING}",
            "preprocessing": _WINDOW.identity,
            "pooling": "mean and standard deviation of each channel",
        }

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The features of one volume."""
        window = torch.from_numpy(_WINDOW(volume)).to(self._device)[None, None]
        features = []
        with float32_inference():
            for layers in self._networks:
                x = window
                for (weight, bias), size in zip(layers, _POOLING, strict=True):
                    # The edge is repeated: a border of zeros would make the features depend on where the gland is.
                    x = F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), weight, bias)
                    x = F.avg_pool3d(F.relu_(x), size)
                voxels = x[0].flatten(1).double()
                features += [voxels.mean(1), voxels.std(1)]
            return {"random": torch.cat(features).float().cpu().numpy()}


def _draw(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of one network: variance 2 / fan-in keeps the scale of the activations (arXiv 1502.01852)."""
    generator = np.random.default_rng(seed)
    layers = []
    for before, after in zip(_CHANNELS[:-1], _CHANNELS[1:], strict=True):
        weight = generator.standard_normal((after, before, 3, 3, 3)) * math.sqrt(2 / (27 * before))
        bias = 0.1 * generator.standard_normal(after)
        layers.append((torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))))
    return layers
