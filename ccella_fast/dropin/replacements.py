"""What `speed_up` makes of MONAI's modules: for each kind a class whose `forward` computes the same with our kernels.

`subclass(faster, original)` is both: it has the faster forward, and everything else of the original. Its instances are copied
as what they are and pickled under the two names.
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
from ccella_fast.models.autoencoder.tiling_plan import TiledConv
from ccella_fast.models.blocks import to_tokens, to_volume


class ReplacementMixin(nn.Module):
    """Comes before the original class in the order of resolution; `super().forward` is the original's."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, original = type(self).__bases__
        return _revive, (mixin, original), self.__getstate__()


def subclass(mixin: type[ReplacementMixin], original: type[nn.Module]) -> type[nn.Module]:
    if (mixin, original) not in _SUBCLASSES:
        _SUBCLASSES[mixin, original] = _make(mixin, original)
    return _SUBCLASSES[mixin, original]


_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def _make(mixin: type[ReplacementMixin], original: type[nn.Module]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    if mixin is MetaTensorUnwrapper:
        names = (name for name in ("forward", "encode", "decode") if hasattr(original, name))
        members |= {name: _unwrapping(getattr(original, name)) for name in names}
    return type(f"Faster{original.__name__}", (mixin, original), members)


def _revive(mixin: type[ReplacementMixin], original: type[nn.Module]) -> nn.Module:
    cls = subclass(mixin, original)
    return cls.__new__(cls)


# Single layers


class FusedGroupNorm(ReplacementMixin):
    """Of `nn.GroupNorm` and MAISI's `MaisiGroupNorm3D` (which computes one group after the other)."""

    silu = False
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    norm_float16 = False

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        if x.ndim < 3:
            return super().forward(x)
        y = group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift)
        return y.to(torch.float16) if self.norm_float16 else y


class FusedGroupNormSiLU(FusedGroupNorm):
    """A GroupNorm whose SiLU is made a `PassThrough`, or left out by the block around it."""

    silu = True


class PassThrough(ReplacementMixin):
    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedUpsampleConv3d(ReplacementMixin):
    """A convolution whose upsampling is made a `PassThrough`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv3d(x, self.weight, self.bias)


# Residual blocks


class DiffusionResBlock(ReplacementMixin):
    """`DiffusionUNetResnetBlock`; both norms are `GroupNormSiLU`."""

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
        h = self.norm1(x)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.norm2(self.conv1(h), shift=self.time_emb_proj(self.nonlinearity(emb)))
        return self.skip_connection(x) + self.conv2(h)


class AutoencoderResBlock(ReplacementMixin):
    """`AEKLResBlock` and `MaisiResBlock`; both norms are `GroupNormSiLU`."""

    norm1: Any
    norm2: Any
    conv1: nn.Module
    conv2: nn.Module
    nin_shortcut: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


# Attention


class FusedSelfAttention(ReplacementMixin):
    """`SABlock`. With a mask, or while its dropout is active, it is MONAI's."""

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
        if attn_mask is not None:
            return super().forward(x, attn_mask)
        if self.training and self.dropout_rate:
            return super().forward(x)
        q, k, v = (
            self.qkv(x).chunk(3, dim=-1) if self.use_combined_linear else (self.to_q(x), self.to_k(x), self.to_v(x))
        )
        y = _attend(q, k, v, self.num_heads)
        return self.out_proj(y) if self.include_fc else y


class FusedCrossAttention(ReplacementMixin):
    """`CrossAttentionBlock`. While its dropout is active, it is MONAI's."""

    num_heads: int
    dropout_rate: float
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.training and self.dropout_rate:
            return super().forward(x, context)
        source = x if context is None else context
        return self.out_proj(_attend(self.to_q(x), self.to_k(source), self.to_v(source), self.num_heads))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(2)


class FusedSpatialTransformer(ReplacementMixin):
    """Without the copy back to channels-first memory."""

    norm: nn.Module
    proj_in: nn.Module
    proj_out: nn.Module
    transformer_blocks: nn.ModuleList

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = to_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(to_volume(tokens, x.shape[2:])) + x


# MAISI's autoencoder


class MaisiConvolution(ReplacementMixin):
    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MaisiUpsample(ReplacementMixin):
    use_convtranspose: bool
    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.use_convtranspose else F.interpolate(x, scale_factor=2.0, mode="trilinear"))


class MaisiBlocks(ReplacementMixin):
    """`MaisiEncoder` and `MaisiDecoder`, without cache flushes."""

    blocks: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TiledMaisi(MaisiBlocks):
    """Without gradients in exact tiles that the free memory allows: what MAISI splits its convolutions for."""

    def forward(self, x: Tensor) -> Tensor:
        return run_tiled(self._passes(), x) if can_tile(self, x) else super().forward(x)

    def _passes(self) -> list[TiledConv]:
        passes: list[TiledConv] = []
        for number, block in enumerate(self.blocks):
            name = str(number)
            if isinstance(block, AutoencoderResBlock):
                branch = None if isinstance(block.nin_shortcut, nn.Identity) else _leaf(block.nin_shortcut)
                passes.append(TiledConv(f"{name}.conv1", _leaf(block.conv1), block.norm1, opens=True, branch=branch))
                passes.append(TiledConv(f"{name}.conv2", _leaf(block.conv2), block.norm2, adds=True))
            elif not isinstance(block, FusedGroupNorm):
                before: Any = self.blocks[number - 1] if number else None
                norm: Any = before if isinstance(before, FusedGroupNorm) else None
                resample = "up" if isinstance(block, MaisiUpsample) else "down" if hasattr(block, "pad") else ""
                passes.append(TiledConv(name, _leaf(block), norm, resample))
        return passes


def _leaf(module: nn.Module) -> nn.Conv3d:
    return next(child for child in module.modules() if isinstance(child, nn.Conv3d))


# Tensors with metadata


class MetaTensorUnwrapper(ReplacementMixin):
    """A whole model: MONAI's MetaTensor would go through a Python function at every operation inside."""


def _unwrapping(method: Any) -> Any:
    wrapper = sys.modules["monai.data.meta_tensor"].MetaTensor

    def plain(value: Any) -> Any:
        if isinstance(value, wrapper):
            return value.as_subclass(Tensor)
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    @functools.wraps(method)
    def entrance(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return entrance
