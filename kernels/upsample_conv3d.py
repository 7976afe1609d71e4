"""Nearest-neighbour x2 enlargement of a volume, then a 3x3x3 convolution with zero padding 1.

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), bias (O,) or None -> (B, O, 2X, 2Y, 2Z).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def upsample_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The enlarged and convolved volume, in the dtype of the convolution."""
    return F.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
