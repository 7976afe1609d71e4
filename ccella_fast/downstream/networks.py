"""The classifiers: MONAI's 3D EfficientNet-B0, and a small network for grids that are too small for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.errors import ConfigError
from ccella_fast.optional import require

Backbone = Literal["efficientnet-b0", "small"]
_LEAST = (
    32  # voxels along each axis: MONAI pads for an image of 224 voxels, and fewer are less than a kernel at the end
)


def make_network(backbone: Backbone) -> nn.Module:
    """A network with random weights, (B, 1, X, Y, Z) -> logits (B, 2)."""
    if backbone == "small":
        return SmallClassifier()
    require("monai", "the backbone efficientnet-b0")
    from monai.networks.nets import EfficientNetBN  # takes seconds to import

    return EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1, num_classes=2)


def check_grid(backbone: Backbone, shape: Sequence[int]) -> None:
    """Raise ConfigError if the volumes are too small for the network."""
    if backbone == "efficientnet-b0" and min(shape) < _LEAST:
        why = f"efficientnet-b0 needs at least {_LEAST} voxels along each axis; the volumes have {list(shape)}"
        raise ConfigError(why, field="--backbone", fix="use --backbone small")


class SmallClassifier(nn.Module):
    """Four convolutions with stride, then the mean and the maximum of each channel: 73 thousand parameters.

    The maximum sees a focus wherever it is. Batch norm, as in EfficientNet: with group norm it learns much more slowly.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, width: int = 8):
        super().__init__()
        channels = [1, width, 2 * width, 4 * width, 8 * width]
        strides = [(2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]  # slices are further apart than voxels in them
        self.convolutions = nn.ModuleList(
            nn.Conv3d(old, new, 3, stride=stride, padding=1, bias=False)
            for old, new, stride in zip(channels[:-1], channels[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(new) for new in channels[1:])
        self.classify = nn.Linear(2 * channels[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, 2)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return self.classify(torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], dim=1))
