"""Replacements for modules of MONAI: mixins whose `forward` computes the same result with the kernels of this project.

`subclass(mixin, original)` combines a mixin with the original class: `forward` is that of the mixin, everything else is that of
the original. Instances can be copied, and are pickled as the pair of the two classes.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d
from ccella_fast.models.autoencoder.tiling import can_tile, run_tiled
from ccella_fast.models.autoencoder.tiling_plan import TiledConv, find_conv3d, residual_block_convs
from ccella_fast.models.channels_last import to_tokens, to_volume


class ReplacementMixin(nn.Module):
    """Base class of all replacements. It precedes the original class, so that `super().forward` is that of the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, original = type(self).__bases__
        return _new_instance, (mixin, original), self.__getstate__()


def subclass(mixin: type[ReplacementMixin], original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of both; always the same class for the same arguments."""
    if (mixin, original) not in _SUBCLASSES:
        _SUBCLASSES[mixin, original] = _make_subclass(mixin, original)
    return _SUBCLASSES[mixin, original]


_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def _make_subclass(mixin: type[ReplacementMixin], original: type[nn.Module]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    if mixin is MetaTensorUnwrapper:
        names = (name for name in ("forward", "encode", "decode") if hasattr(original, name))
        members |= {name: _with_plain_arguments(getattr(original, name)) for name in names}
    return type(f"Faster{original.__name__}", (mixin, original), members)


def _new_instance(mixin: type[ReplacementMixin], original: type[nn.Module]) -> nn.Module:
    """An instance without state, for unpickling."""
    cls = subclass(mixin, original)
    return cls.__new__(cls)


# Single layers


class FusedGroupNorm(ReplacementMixin):
    """Replaces `nn.GroupNorm`, and `MaisiGroupNorm3D` of MAISI, which computes one group at a time."""

    silu = False
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    norm_float16 = False

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalize x + shift: x (B, C, ...), shift (B, C) -> (B, C, ...)."""
        if x.ndim < 3:
            return super().forward(x)
        y = group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift)
        return y.to(torch.float16) if self.norm_float16 else y


class FusedGroupNormSiLU(FusedGroupNorm):
    """Replaces a GroupNorm whose SiLU is replaced by `PassThrough` or left out by the surrounding block."""

    silu = True


class PassThrough(ReplacementMixin):
    """Replaces a module whose computation has been fused into another one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class FusedUpsampleConv3d(ReplacementMixin):
    """Replaces a convolution whose upsampling is replaced by `PassThrough`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, 2X, 2Y, 2Z)."""
        return upsample_conv3d(x, self.weight, self.bias)


# Residual blocks


class DiffusionResBlock(ReplacementMixin):
    """Replaces `DiffusionUNetResnetBlock`; both norms are replaced by `FusedGroupNormSiLU`."""

    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    time_emb_proj: nn.Module
    skip_connection: nn.Module
    upsample: nn.Module | None
    downsample: nn.Module | None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, ...), emb (B, E) -> (B, out_channels, ...)."""
        h = self.norm1(x)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.norm2(self.conv1(h), shift=self.time_emb_proj(self.nonlinearity(emb)))
        return self.skip_connection(x) + self.conv2(h)


class AutoencoderResBlock(ReplacementMixin):
    """Replaces `AEKLResBlock` and `MaisiResBlock`; both norms are replaced by `FusedGroupNormSiLU`."""

    norm1: Any
    norm2: Any
    conv1: nn.Module
    conv2: nn.Module
    nin_shortcut: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, out_channels, ...)."""
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


# Attention


class FusedSelfAttention(ReplacementMixin):
    """Replaces `SABlock`. With a mask, or while dropout is active, the original `forward` is called."""

    num_heads: int
    dropout_rate: float
    use_combined_linear: bool
    include_fc: bool
    qkv: nn.Module
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if attn_mask is not None:
            return super().forward(x, attn_mask)
        if self.training and self.dropout_rate:
            return super().forward(x)
        if self.use_combined_linear:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        y = _multi_head_attention(q, k, v, self.num_heads)
        return self.out_proj(y) if self.include_fc else y


class FusedCrossAttention(ReplacementMixin):
    """Replaces `CrossAttentionBlock`. While dropout is active, the original `forward` is called."""

    num_heads: int
    dropout_rate: float
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, L, E) or None for x itself -> (B, N, C)."""
        if self.training and self.dropout_rate:
            return super().forward(x, context)
        if context is None:
            context = x
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.out_proj(_multi_head_attention(q, k, v, self.num_heads))


def _multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(2)


class FusedSpatialTransformer(ReplacementMixin):
    """Replaces `SpatialTransformer`, without the copy to channels-first memory."""

    norm: nn.Module
    proj_in: nn.Module
    proj_out: nn.Module
    transformer_blocks: nn.ModuleList

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, X, Y, Z), context (B, L, E) or None -> (B, C, X, Y, Z)."""
        tokens = to_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(to_volume(tokens, x.shape[2:])) + x


# MAISI's autoencoder


class MaisiConvolution(ReplacementMixin):
    """Replaces `MaisiConvolution`, without splits."""

    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, X', Y', Z')."""
        return self.conv(x)


class MaisiUpsample(ReplacementMixin):
    """Replaces `MaisiUpsample`, without splits."""

    use_convtranspose: bool
    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z)."""
        return self.conv(x if self.use_convtranspose else F.interpolate(x, scale_factor=2.0, mode="trilinear"))


class MaisiBlocks(ReplacementMixin):
    """Replaces `MaisiEncoder` and `MaisiDecoder`, without cache flushes."""

    blocks: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks to x (B, C, X, Y, Z)."""
        for block in self.blocks:
            x = block(x)
        return x


class TiledMaisi(MaisiBlocks):
    """Replaces `MaisiEncoder` and `MaisiDecoder`; without gradients, in exact slabs that fit the free memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks to x (B, C, X, Y, Z)."""
        return run_tiled(self._tiled_convs(), x) if can_tile(self, x) else super().forward(x)

    def _tiled_convs(self) -> list[TiledConv]:
        convs: list[TiledConv] = []
        for index, block in enumerate(self.blocks):
            name = str(index)
            if isinstance(block, AutoencoderResBlock):
                convs += residual_block_convs(name, block)
            elif not isinstance(block, FusedGroupNorm):
                previous: Any = self.blocks[index - 1] if index else None
                norm: Any = previous if isinstance(previous, FusedGroupNorm) else None
                resample = "up" if isinstance(block, MaisiUpsample) else "down" if hasattr(block, "pad") else ""
                convs.append(TiledConv(name, find_conv3d(block), norm, resample))
        return convs


# Tensors with metadata


class MetaTensorUnwrapper(ReplacementMixin):
    """Replaces a whole model: it converts MetaTensors, which slow down every operation, to plain tensors at the input."""


def _with_plain_arguments(method: Any) -> Any:
    """`method` with MetaTensors in its arguments converted to plain tensors."""
    meta_tensor = sys.modules["monai.data.meta_tensor"].MetaTensor

    def plain(value: Any) -> Any:
        if isinstance(value, meta_tensor):
            return value.as_subclass(Tensor)
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return wrapper
