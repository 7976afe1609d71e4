"""Softmax attention: softmax(q k^T / sqrt(K)) v for every head, without a mask.

Shapes: q (B, M, N, K), k and v (B, M, L, K); B batch, M heads, N queries, L keys, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.backend import Refusals, choose, xformers_refusal


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in fp32 (float64, if given): (B, M, N, K), rounded once to the dtype of `q`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v.to(wide)).to(q.dtype)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers keeps the heads behind the tokens: (B, N, M, K)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


COMPOSITES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,
    "xformers": xformers_attention,
    "reference": attention_reference,
}


def refusals(device: torch.device, dtype: torch.dtype, *, head_width: int = 32) -> Refusals:
    """Implementations in order of preference. PyTorch's goes first: nothing has been measured on a GPU yet."""
    del head_width
    return {"sdpa": None, "reference": None, "xformers": xformers_refusal(device, dtype)}


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, M, N, K), in the dtype of `q`. Self-attention and cross-attention differ only in where k and v come from."""
    chosen = choose("attention", refusals(q.device, q.dtype, head_width=q.shape[-1]), backend)
    return COMPOSITES[chosen](q, k, v)
