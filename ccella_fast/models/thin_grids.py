"""3x3x3 convolutions in bf16 on a CPU, where the grid has fewer than three voxels along an axis.

oneDNN (3.10, 3.12) is wrong there. With AVX-512 the gradient of the weight is wrong at stride 1 for two voxels along the first
axis, and at stride 2 for one voxel along the second or third axis, where it may also corrupt the heap. With AMX the forward
pass at stride 2 reads uninitialised memory when its output is one voxel wide along the last axis (pytorch#169688).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def on_three_voxels(convolve: Callable[[Tensor], Tensor], x: Tensor, scale: float = 1.0) -> Tensor:
    """`convolve(x)` with zeros appended to x (B, C, X, Y, Z) until each axis has three voxels, and the output cut to size.

    The values do not change: a convolution with zero padding reads the same zeros. Other devices, other dtypes and larger grids
    are convolved as they are. scale: output voxels per input voxel along an axis (0.5 at stride 2, 2 after upsampling)."""
    missing = [max(0, 3 - size) for size in x.shape[2:]]
    low = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if x.device.type != "cpu" or not low or not any(missing):
        return convolve(x)
    along_x, along_y, along_z = (math.ceil(size * scale) for size in x.shape[2:])
    padded = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
    return convolve(padded)[:, :, :along_x, :along_y, :along_z]
