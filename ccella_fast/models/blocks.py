"""The blocks of the U-Net: convolutions under the reference's names, residual block, spatial attention with and without text.

Shapes: B batch, C channels, X Y Z the latent axes, N = X*Y*Z voxels as tokens, M heads, K head width, L context tokens,
E context width. Children are created in the reference's order: it is the index order of its optimizer state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Runner = Callable[
    ..., Tensor
]  # runner(module, *tensors) -> module(*tensors), perhaps recomputing it in the backward pass


def named(module: nn.Module, *names: str) -> nn.Module:
    """`module` below the child names `names`: named(conv, "op", "conv") holds `op.conv.weight`."""
    for name in reversed(names):
        module = nn.Sequential(OrderedDict({name: module}))
    return module


def conv3d(inputs: int, outputs: int, kernel: int, stride: int = 1, *, names: tuple[str, ...] = ("conv",)) -> nn.Module:
    """A convolution with bias that keeps the grid (or divides it by `stride`)."""
    return named(nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2), *names)


def zeroed(module: AnyModule) -> AnyModule:
    """Start at zero, so that the block begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def run(module: nn.Module, *tensors: Tensor) -> Tensor:
    return module(*tensors)


class Stack(nn.Module):
    """A module that calls its blocks through `self.run`, which activation checkpointing replaces."""

    run: Runner = staticmethod(run)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x + shift)), or without the SiLU. Parameters as `nn.GroupNorm`."""

    def __init__(self, num_groups: int, channels: int, eps: float, *, silu: bool = True):
        super().__init__(num_groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift)


class UpsampleConv3d(nn.Conv3d):
    """Nearest x2, then this 3x3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv3d(x, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1 x)) + proj(embedding)))) + skip(x)."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, inputs, eps)
        self.conv1 = conv3d(inputs, outputs, 3)
        self.time_emb_proj = nn.Linear(embedding, outputs)
        self.norm2 = GroupNormSiLU(groups, outputs, eps)
        self.conv2 = zeroed(conv3d(outputs, outputs, 3))
        self.skip_connection = nn.Identity() if inputs == outputs else conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, X, Y, Z), embedding (B, E) after its SiLU -> (B, outputs, X, Y, Z)."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, shift=self.time_emb_proj(embedding)))
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Multi-head attention of tokens on themselves, or on a context."""

    def __init__(self, width: int, head_width: int, *, context_width: int | None = None, bias: bool = False):
        super().__init__()
        self.head_width = head_width
        source = width if context_width is None else context_width
        self.out_proj = nn.Identity() if context_width is None else nn.Linear(width, width)
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(source, width, bias=bias)
        self.to_v = nn.Linear(source, width, bias=bias)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """tokens (B, N, C), context (B, L, E) -> (B, N, C)."""
        source = tokens if context is None else context
        q, k, v = self._heads(self.to_q(tokens)), self._heads(self.to_k(source)), self._heads(self.to_v(source))
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): linear2(value * gelu(gate)), the value first, exact gelu."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 8 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.linear1(tokens).chunk(2, dim=-1)
        return self.linear2(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention on the report, feed-forward; each after a LayerNorm and added to its input."""

    def __init__(self, width: int, head_width: int, context_width: int):
        super().__init__()
        self.attn1 = Attention(width, head_width)
        self.ff = GatedFeedForward(width)
        self.attn2 = Attention(width, head_width, context_width=context_width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """One transformer block over all voxels; the way the report reaches the U-Net."""

    def __init__(self, channels: int, head_width: int, context_width: int, groups: int, eps: float):
        super().__init__()
        self.norm = GroupNormSiLU(groups, channels, eps, silu=False)
        self.proj_in = conv3d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, head_width, context_width)])
        self.proj_out = zeroed(conv3d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, X, Y, Z), context (B, L, E) -> (B, C, X, Y, Z)."""
        tokens = to_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(to_volume(tokens, x.shape[2:]))


class SpatialSelfAttention(nn.Module):
    """The text-free variants' attention over all voxels."""

    def __init__(self, channels: int, head_width: int, groups: int, eps: float):
        super().__init__()
        self.norm = GroupNormSiLU(groups, channels, eps, silu=False)
        self.attn = Attention(channels, head_width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_volume(self.attn(to_tokens(self.norm(x))), x.shape[2:])


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B, N, C), voxels in row-major order. Free of a copy for channels_last_3d input."""
    return x.flatten(2).transpose(1, 2)


def to_volume(tokens: Tensor, grid: torch.Size) -> Tensor:
    """(B, N, C) -> (B, C, X, Y, Z), the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, grid)
