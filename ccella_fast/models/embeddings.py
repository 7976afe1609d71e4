"""Embeddings of scalars: the sinusoidal timestep embedding, and the two-layer perceptron that embeds each condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal timestep embedding: [cos(t f), sin(t f)] with f_k = 10000^(-2k / width).

    The cosines come first, unlike in Ho et al. 2020 (docs/explanation/method.md, section 2.1).

    Args:
        timesteps: (B,), integer or float.
        width: width of the embedding, even.

    Returns:
        (B, width), float32.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device, dtype=torch.float32) * (-math.log(1e4) / half))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def perceptron(inputs: int, width: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (B, inputs) -> (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
