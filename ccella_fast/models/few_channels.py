"""3x3x3 convolutions from or to very few channels on a GPU: the gradient of the weight as one matrix product.

cuDNN computes that gradient without tensor cores: at batch 8, the one of the U-Net's first or last convolution (4 channels)
took 32 of the 175 ms of a training step on an NVIDIA H200. With the 27 shifted copies of the tensor that has few channels as
the columns of a matrix, it is a product over the voxels:

    dw[o, c, k] = sum over voxels v of dy[v, o] x[v + k, c] = sum over voxels u of dy[u - k, o] x[u, c]

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), y and dy (B, O, X, Y, Z); k is a tap, from -1 to 1 along each axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.backend import compute_dtype

FEW = 8  # channels; the columns are 27 copies of them


def conv3d_few_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with padding 1 and stride 1, where x or the result has at most `FEW` channels."""
    dtype = compute_dtype(x)
    return _Convolution.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            ones, only_dx = [1, 1, 1], [True, False, False]
            dx = torch.ops.aten.convolution_backward(  # not conv3d_input, which does not see the layout of x
                dy, x, weight, None, ones, ones, ones, False, [0, 0, 0], 1, only_dx
            )[0]
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(x, dy)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3, 4), dtype=torch.promote_types(dy.dtype, torch.float32)).to(dy.dtype)
        return dx, dweight, dbias


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """(B, C, X, Y, Z) and (B, O, X, Y, Z) -> (O, C, 3, 3, 3)."""
    inputs, outputs = x.shape[1], dy.shape[1]
    if inputs <= outputs:
        product = _voxels(dy).T @ _columns(x)  # (O, 27 C)
        return product.view(outputs, 3, 3, 3, inputs).permute(0, 4, 1, 2, 3).contiguous()
    product = _voxels(x).T @ _columns(dy)  # (C, 27 O)
    return product.view(inputs, 3, 3, 3, outputs).flip(1, 2, 3).permute(4, 0, 1, 2, 3).contiguous()


def _voxels(tensor: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B X Y Z, C); a view where the tensor is channels-last."""
    return tensor.movedim(1, -1).flatten(0, -2)


def _columns(tensor: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B X Y Z, 27 C): the zero-padded tensor around each voxel, by tap and channel."""
    padded = F.pad(tensor.movedim(1, -1), (0, 0, 1, 1, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # (B, X, Y, Z, C, 3, 3, 3)
    return windows.movedim(4, -1).reshape(-1, 27 * tensor.shape[1])
