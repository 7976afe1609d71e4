"""A linear layer with very many inputs, whose weight gradient can be kept as its two factors.

The gradient of the weight is dy^T x, the product of the output's gradient dy (B, O) and the input x (B, I). Its rank is at most
B: for the first layer of a class head, whose weight has 256 x 196,608 elements, the factors are hundreds of times smaller than
the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK = 16384  # input features per matrix product


class WideLinear(nn.Linear):
    """`nn.Linear` for inputs (B, features).

    Attributes:
        factors: None: the weight gets a gradient as usual. A list: its gradient is not computed, and the backward pass appends
            the pair (dy, x) instead, whose product dy^T x is the gradient.
    """

    factors: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_features) -> (B, out_features)."""
        if self.factors is None or not torch.is_grad_enabled():
            return _product(x, self.weight, self.bias)
        return _KeepFactors.apply(x, self.weight, self.bias, self.factors)


class _KeepFactors(torch.autograd.Function):
    """The layer with the gradients of x and the bias; that of the weight is kept as factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, weight = ctx.saved_tensors
        ctx.factors.append((dy, x))
        return dy @ weight, None, dy.sum(0), None


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias, computed in chunks of the input features on a CPU in bf16.

    With AMX, the bf16 matrix product of oneDNN 3.12 terminates the process with a division by zero for some shapes with very
    many input features, such as 8 rows of 196,608 features. The products of the chunks are added in fp32.
    """
    is_bf16 = torch.is_autocast_enabled("cpu") or weight.dtype == torch.bfloat16
    if x.device.type != "cpu" or not is_bf16 or x.shape[1] <= _CHUNK:
        return F.linear(x, weight, bias)
    chunks = zip(x.split(_CHUNK, dim=1), weight.split(_CHUNK, dim=1), strict=True)
    products = [F.linear(values, part) for values, part in chunks]
    total = torch.stack(products).sum(0, dtype=torch.float32) + bias.float()
    return total.to(products[0].dtype)
