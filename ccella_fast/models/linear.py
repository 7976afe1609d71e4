"""Linear layers in fp32 that are trained on a CPU: products by oneDNN, and the weight's gradient in the optimizer's memory.

PyTorch multiplies fp32 matrices with MKL. On CPUs of other vendors than Intel that is slower than oneDNN, which PyTorch has for
convolutions: 256 x 768 x 3072 took 7.9 and 5.9 ms on two cores AMD EPYC (PyTorch 2.13). The gradient of the weight is computed
where `FlatAdamW` needs it, and not copied.

Shapes: x (..., I), weight (O, I), bias (O,), y and dy (..., O).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.hardware import cpu_vendor
from ccella_fast.models.gradient_memory import GradientMemory, empty_gradient, gradient_memory_of

_MIN_ROWS, _MIN_WEIGHTS = 16, 2**16  # below these the product takes no time worth mentioning


class Linear(nn.Linear):
    """`nn.Linear` with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias.

    The gradient of the weight is computed in its `gradient_memory`.
    """
    if not _is_trained_by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, gradient_memory_of(weight))


def _is_trained_by_onednn(x: Tensor, weight: Tensor) -> bool:
    if not (x.is_cpu and torch.is_grad_enabled() and x.dtype == weight.dtype == torch.float32):
        return False
    large = x.numel() >= _MIN_ROWS * x.shape[-1] and weight.numel() >= _MIN_WEIGHTS
    return large and weight.is_contiguous() and not torch.is_autocast_enabled("cpu") and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """Whether this CPU is not Intel's, and PyTorch has the operation with which its compiler multiplies by oneDNN."""
    return cpu_vendor() != "GenuineIntel" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gradient_memory: GradientMemory) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient_memory = gradient_memory
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weight.T, None)
        if ctx.needs_input_grad[1]:
            dweight = empty_gradient(weight, ctx.gradient_memory)
            torch.mm(rows.T, x.flatten(0, -2), out=dweight)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias, None
