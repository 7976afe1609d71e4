"""3x3x3 convolutions of few voxels on a CPU as matrix products: the gradient of the weight, and in bf16 all of it.

At the coarsest levels a weight of 512 x 512 x 27 elements meets a few dozen voxels. PyTorch fills new memory for its gradient
with zeros before adding to it, and in bf16 oneDNN reorders the whole weight in each call. With the 27 shifted copies of x as
the rows of a matrix, the convolution and both gradients are products. That of the weight is written where the optimizer needs
it (`FlatAdamW`): nothing is copied that is larger than all activations. On a CPU with AMX, 512 x 512 channels on 32 voxels in
bf16 take 2.3, 4.1 and 2.6 ms instead of 13, 7.6 and 14 (forward, input, weight). In fp32 the first two gain nothing.

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), y and dy (B, O, X, Y, Z).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.models.gradient_memory import GradientMemory, empty_gradient, gradient_memory_of

FEW = 64  # voxels of the batch; the columns are 27 copies of them


def trains_few_voxels(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3d_few_voxels` computes this: with gradients on a CPU, in the default layout, without autocast."""
    on_cpu = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return on_cpu and weight.is_contiguous() and len(x) * math.prod(x.shape[2:]) <= FEW


def conv3d_few_voxels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with padding 1 and stride 1.

    The gradient of the weight is computed in its `gradient_memory`.
    """
    return _Convolution.apply(x, weight, bias, gradient_memory_of(weight))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradient_memory: GradientMemory) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient_memory = gradient_memory
        return _convolve(x, weight, bias) if x.dtype == torch.bfloat16 else F.conv3d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        dy_by_channel = dy.transpose(0, 1).flatten(1)  # (O, B X Y Z)
        if ctx.needs_input_grad[0] and x.dtype == torch.bfloat16:
            dx = _sum_of_columns(weight.flatten(1).T @ dy_by_channel, x)
        elif ctx.needs_input_grad[0]:
            ones, only_dx = [1, 1, 1], [True, False, False]
            dx = torch.ops.aten.convolution_backward(
                dy, x, weight, None, ones, ones, ones, False, [0, 0, 0], 1, only_dx
            )[0]
        if ctx.needs_input_grad[1]:
            dweight = empty_gradient(weight, ctx.gradient_memory)
            torch.mm(dy_by_channel, _columns(x).T, out=dweight.view(len(weight), -1))
        if ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3, 4), dtype=torch.promote_types(dy.dtype, torch.float32)).to(dy.dtype)
        return dx, dweight, dbias, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    matrix, columns = weight.flatten(1), _columns(x)
    y = matrix @ columns if bias is None else torch.addmm(bias[:, None], matrix, columns)
    return y.view(len(weight), len(x), *x.shape[2:]).transpose(0, 1).contiguous()


def _columns(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (27 C, B X Y Z): the zero-padded tensor around each voxel, by channel and tap."""
    voxels = F.pad(x.movedim(1, -1).flatten(0, -2), (0, 0, 1, 0))  # (1 + B X Y Z, C), the first one is zero
    neighbours = voxels.index_select(0, _neighbours(x))
    return neighbours.view(27, -1, x.shape[1]).permute(2, 0, 1).reshape(27 * x.shape[1], -1)


def _sum_of_columns(columns: Tensor, x: Tensor) -> Tensor:
    """The transpose of `_columns`: (27 C, B X Y Z) -> the sum at each voxel of what its 27 copies have; in fp32."""
    by_voxel = columns.view(x.shape[1], -1).T.float()  # (27 B X Y Z, C)
    total = by_voxel.new_zeros(1 + by_voxel.shape[0] // 27, x.shape[1])  # row 0 collects what is outside the grid
    total.index_add_(0, _neighbours(x), by_voxel)
    return total[1:].to(x.dtype).view(len(x), *x.shape[2:], -1).movedim(-1, 1).contiguous()


def _neighbours(x: Tensor) -> Tensor:
    """(27 B X Y Z): by tap, the number of each voxel's neighbour from 1; 0 outside the grid.

    It takes 50 us and is not kept between calls: tensors made in a `FakeTensorMode` are of no use outside it.
    """
    numbers = torch.arange(1, 1 + len(x) * math.prod(x.shape[2:]), device=x.device).view(len(x), *x.shape[2:])
    padded = F.pad(numbers, (1, 1, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # (B, X, Y, Z, 3, 3, 3)
    return windows.permute(4, 5, 6, 0, 1, 2, 3).flatten()
