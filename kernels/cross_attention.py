"""Cross-attention block: layer norm, query projection, attention on given keys and values, output projection, residual.

    y = x + w_out attention(w_q LayerNorm(x), context_k, context_v) + b_out

Shapes: x, y (B, N, C); context_k, context_v (B or 1, M, L, K), heads already split, the same for every sample if B is 1;
w_q, w_out (C, C); ln_weight, ln_bias, b_out (C,); B batch, N voxels as tokens, C = M K channels, M heads, L context tokens
(256 latents of the report), K head width. Keys and values are given because a sampler computes them once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.attention import IMPLEMENTATIONS, attention_reference
from ccella_fast.kernels.backend import Refusals, choose, xformers_refusal


def cross_attention_reference(
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
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention_reference,
) -> Tensor:
    """The block in plain PyTorch; `attend` is the attention inside."""
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    q = F.linear(h, w_q).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    o = attend(q, context_k.expand(x.shape[0], -1, -1, -1), context_v.expand(x.shape[0], -1, -1, -1))
    return x + F.linear(o.transpose(1, 2).flatten(2), w_out, b_out)


def refusals(device: torch.device, dtype: torch.dtype, *, head_width: int = 32) -> Refusals:
    """Implementations in order of preference."""
    del head_width
    return {"sdpa": None, "reference": None, "xformers": xformers_refusal(device, dtype)}


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
    backend: str | None = None,
) -> Tensor:
    """(B, N, C), in the dtype of `x`. Raises ValueError where the shapes do not fit each other."""
    batch, _, channels = x.shape
    heads = context_k.shape[1:2] + context_k.shape[3:]
    if heads != (num_heads, channels // num_heads) or context_v.shape != context_k.shape:
        raise ValueError(
            f"context_k {tuple(context_k.shape)}, context_v {tuple(context_v.shape)}: both must be (batch, {num_heads}, "
            f"keys, {channels // num_heads}) for {channels} channels and {num_heads} heads"
        )
    if context_k.shape[0] not in (1, batch):
        raise ValueError(f"context_k has batch {context_k.shape[0]}, x has {batch}: give the same, or 1 for all")
    chosen = choose("cross_attention", refusals(x.device, x.dtype, head_width=context_k.shape[3]), backend)
    return cross_attention_reference(
        x,
        context_k,
        context_v,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        w_q=w_q,
        w_out=w_out,
        b_out=b_out,
        num_heads=num_heads,
        eps=eps,
        attend=IMPLEMENTATIONS[chosen],
    )
