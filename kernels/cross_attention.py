"""Pre-norm cross-attention of voxels on a context whose keys and values are given, with the residual."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.attention import attention


def cross_attention(
    x: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    *,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    num_heads: int,
    eps: float = 1e-5,
) -> Tensor:
    """x + Linear(attention(LayerNorm(x) w_q^T, k, v)): x (B, N, C), keys and values (B, M, L, K) -> (B, N, C)."""
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    q = F.linear(h, w_q).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return x + F.linear(attention(q, context_k, context_v).transpose(1, 2).flatten(2), w_out, b_out)
