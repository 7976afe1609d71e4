"""3x3x3 convolutions in bf16 on a CPU for grids with fewer than three voxels along an axis.

oneDNN (3.10, 3.12) computes wrong results for such grids. With AVX-512, the gradient of the weight is wrong at stride 1 for two
voxels along the first axis, and at stride 2 for one voxel along the second or third axis, where the heap may also be corrupted.
With AMX, the forward pass at stride 2 reads uninitialized memory if its output is one voxel wide along the last axis
(pytorch#169688).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def on_three_voxels(convolve: Callable[[Tensor], Tensor], x: Tensor, scale: float = 1.0) -> Tensor:
    """Return `convolve(x)`, computed on a grid of at least three voxels per axis where oneDNN needs it.

    Zeros are appended to x until each axis has three voxels, and the output is cropped. This does not change the values,
    because a convolution with zero padding reads the same zeros. Other devices, other dtypes and larger grids are not padded.

    Args:
        convolve: a zero-padded 3x3x3 convolution.
        x: (B, C, X, Y, Z).
        scale: output voxels per input voxel along an axis: 0.5 at stride 2, 2 after upsampling.
    """
    missing = [max(0, 3 - size) for size in x.shape[2:]]
    is_bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not is_bf16 or not any(missing):
        return convolve(x)
    out_x, out_y, out_z = (math.ceil(size * scale) for size in x.shape[2:])
    padded = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
    return convolve(padded)[:, :, :out_x, :out_y, :out_z]
