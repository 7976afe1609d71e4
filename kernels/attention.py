"""Softmax attention: softmax(q k^T / sqrt(K)) v for every head, without a mask.

Shapes: q (B, M, N, K), k and v (B, M, L, K); B batch, M heads, N queries, L keys, K head width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, M, N, K), in the dtype of `q`. Self-attention and cross-attention differ only in where k and v come from."""
    return F.scaled_dot_product_attention(q, k, v)
