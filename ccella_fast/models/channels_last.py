"""Volumes in channels_last_3d on a GPU, whose voxels are the tokens of a matrix in memory.

There a convolution with a 1x1x1 kernel is a matrix product that also adds the bias, and joining channels is one copy; PyTorch
runs the convolution with copies before or after it and joins five-dimensional tensors one by one.

Shapes: B batch, C channels, X Y Z axes, N = X*Y*Z voxels as tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.layout import is_channels_last


def on_gpu(tensor: Tensor) -> bool:
    """Whether the computation is that of a GPU. Meta tensors count, so that its operations can be counted without one."""
    return tensor.device.type != "cpu"


def has_tokens(x: Tensor) -> bool:
    """Whether the voxels of x (B, C, X, Y, Z) are the tokens of a matrix in memory, on a GPU."""
    return on_gpu(x) and is_channels_last(x)


def pointwise_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x (B, C, X, Y, Z), which `has_tokens`, with a weight (O, C, 1, 1, 1)."""
    return to_volume(F.linear(to_tokens(x), weight.flatten(1), bias), x.shape[2:])


def join_channels(first: Tensor, second: Tensor) -> Tensor:
    """`torch.cat([first, second], dim=1)` of volumes with equal grids."""
    if has_tokens(first) and has_tokens(second):
        return to_volume(torch.cat([to_tokens(first), to_tokens(second)], dim=2), first.shape[2:])
    return torch.cat([first, second], dim=1)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B, N, C) with voxels in row-major order; contiguous for channels_last_3d input."""
    return x.flatten(2).transpose(1, 2)


def to_volume(tokens: Tensor, grid: torch.Size) -> Tensor:
    """(B, N, C) -> (B, C, X, Y, Z), the inverse of `to_tokens`; a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)
