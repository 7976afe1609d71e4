"""Numbers into vectors: the sinusoidal time embedding, and the two-layer perceptron that follows every embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal(timesteps: Tensor, width: int) -> Tensor:
    """(B,) integer or float timesteps -> (B, width) float32: [cos(t f), sin(t f)] with f_k = 10000^(-2k / width).

    Cosines come first (Ho et al. 2020 have sines first). docs/explanation/method.md, section 2.1."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device, dtype=torch.float32) * (-math.log(1e4) / half))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def perceptron(inputs: int, width: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (B, inputs) -> (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
