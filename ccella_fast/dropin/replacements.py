"""Replacements for modules of MONAI: mixins whose `forward` computes the same result with the kernels of this project.

`subclass(mixin, original)` combines a mixin with the original class: everything but `forward` is that of the original.
Instances can be copied, and are pickled as the pair of the two classes. `forward` decides at each call which of both computes:

- A mixin reads the weights of its children instead of calling them. So it computes only while these are plain layers without
  hooks; the children themselves are never changed, and may be called by others, wrapped or replaced at any time.
- The original computes where the kernels have no derivative: in forward mode, in transforms of `torch.func`, and in
  `torch.jit.trace`. A second derivative recomputes the plain operation, see `_with_second_derivative`.
- On a CPU the original computes where it is the faster of the two.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ccella_fast.dropin import fusion
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.models.autoencoder.tiling import can_tile, run_tiled
from ccella_fast.models.autoencoder.tiling_plan import TiledConv, find_conv3d, residual_block_convs
from ccella_fast.models.channels_last import to_tokens, to_volume


class ReplacementMixin(nn.Module):
    """Base class of all replacements. It precedes the original class, so that `super().forward` is that of the original."""

    _is_undone = False  # set by `undo` where the class has been changed by others since

    def suits(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the mixin computes this call."""
        return True

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
    else:
        members["forward"] = _forward_of(mixin, original)
    return type(f"Faster{original.__name__}", (mixin, original), members)


def _forward_of(mixin: type[ReplacementMixin], original: type[nn.Module]) -> Any:
    fused, plain = mixin.forward, original.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        computes = _replaces and not self._is_undone and _has_derivatives() and self.suits(*args, **kwargs)
        if _watched is not None:
            _watched[self] = computes or _watched.get(self, False)
        return (fused if computes else plain)(self, *args, **kwargs)

    return forward


_replaces = True
_watched: dict[nn.Module, bool] | None = None


@contextmanager
def originals() -> Iterator[None]:
    """Let all originals compute in the block."""
    global _replaces
    _replaces = False
    try:
        yield
    finally:
        _replaces = True


@contextmanager
def watched() -> Iterator[dict[nn.Module, bool]]:
    """Record in the block which replaced modules are called, and whether the replacement has computed at least once."""
    global _watched
    found: dict[nn.Module, bool] = {}
    _watched = found
    try:
        yield found
    finally:
        _watched = None


def _has_derivatives() -> bool:
    """Whether the kernels have what the surrounding code needs; torch.compile replaces its own transforms before."""
    if torch.compiler.is_compiling():
        return True
    in_forward_mode = forward_ad._current_level >= 0
    return not (in_forward_mode or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing())


def _new_instance(mixin: type[ReplacementMixin], original: type[nn.Module]) -> nn.Module:
    """An instance without state, for unpickling."""
    cls = subclass(mixin, original)
    return cls.__new__(cls)


# Single layers


class FusedGroupNorm(ReplacementMixin):
    """Replaces `nn.GroupNorm` on a GPU. On a CPU that of PyTorch is as fast."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def suits(self, input: Tensor) -> bool:
        """Not on a CPU, and not for (B, C)."""
        return input.device.type != "cpu" and input.ndim > 2

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        return fusion.norm(self, input, silu=False)


class FusedSequential(ReplacementMixin):
    """Replaces a container that calls its children in order: it fuses two of them where `fusion.fusion_of` knows how."""

    _modules: dict[str, Any]

    def suits(self, *args: Any, **kwargs: Any) -> bool:
        """Whether two children are fused; the original may do more than to call its children."""
        children = list(self._modules.values())
        x = args[0] if args else next(iter(kwargs.values()))
        return any(fusion.fusion_of(first, second, x) for first, second in zip(children, children[1:], strict=False))

    def forward(self, input: Tensor, *others: Any, **ignored: Any) -> Tensor:
        """Apply all children to the input. Others are ignored, as by the containers that this replaces."""
        children = list(self._modules.values())
        while children:
            fused = fusion.fusion_of(children[0], children[1], input) if len(children) > 1 else None
            input = children[0](input) if fused is None else fused(input)
            children = children[1 if fused is None else 2 :]
        return input


# Residual blocks


class DiffusionResBlock(ReplacementMixin):
    """Replaces `DiffusionUNetResnetBlock`."""

    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    time_emb_proj: nn.Module
    skip_connection: nn.Module
    upsample: nn.Module | None
    downsample: nn.Module | None

    def suits(self, x: Tensor, emb: Tensor) -> bool:
        """Whether the norms and the SiLU are plain layers, and fusing them pays."""
        plain = type(self.nonlinearity) is nn.SiLU and fusion.is_plain(self.nonlinearity, nn.SiLU)
        return plain and fusion.norm_and_silu_pay(x) and fusion.is_norm(self.norm1) and fusion.is_norm(self.norm2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, ...), emb (B, E) -> (B, out_channels, ...)."""
        h = fusion.norm(self.norm1, x, silu=True)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = fusion.norm(self.norm2, self.conv1(h), silu=True, shift=self.time_emb_proj(self.nonlinearity(emb)))
        return self.skip_connection(x) + self.conv2(h)


class AutoencoderResBlock(ReplacementMixin):
    """Replaces `AEKLResBlock`."""

    norm1: Any
    norm2: Any
    conv1: nn.Module
    conv2: nn.Module
    nin_shortcut: nn.Module

    def suits(self, x: Tensor) -> bool:
        """Whether the norms are plain layers, and fusing them with the SiLU pays."""
        return fusion.norm_and_silu_pay(x) and fusion.is_norm(self.norm1) and fusion.is_norm(self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, out_channels, ...)."""
        h = self.conv1(fusion.norm(self.norm1, x, silu=True))
        return self.nin_shortcut(x) + self.conv2(fusion.norm(self.norm2, h, silu=True))


class MaisiResBlock(AutoencoderResBlock):
    """Replaces `MaisiResBlock`, without cache flushes."""

    def suits(self, x: Tensor) -> bool:
        """Whether the norms are those of MAISI without hooks."""
        norms = (self.norm1, self.norm2)
        return all(
            type(each).forward.__qualname__ == "MaisiGroupNorm3D.forward" and not fusion.has_hooks(each)
            for each in norms
        )


# Attention


class FusedSelfAttention(ReplacementMixin):
    """Replaces `SABlock`."""

    num_heads: int
    dropout_rate: float
    use_combined_linear: bool
    include_fc: bool
    qkv: nn.Module
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def suits(self, x: Tensor, attn_mask: Tensor | None = None) -> bool:
        """Without a mask, active dropout, and hooks on the children that are not called."""
        return attn_mask is None and _skipped_children_do_nothing(self)

    def forward(self, x: Tensor, attn_mask: None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.use_combined_linear:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        y = fusion.multi_head_attention(q, k, v, self.num_heads)
        return self.out_proj(y) if self.include_fc else y


class FusedCrossAttention(ReplacementMixin):
    """Replaces `CrossAttentionBlock`."""

    num_heads: int
    dropout_rate: float
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def suits(self, x: Tensor, context: Tensor | None = None) -> bool:
        """Without active dropout, and hooks on the children that are not called."""
        return _skipped_children_do_nothing(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, L, E) or None for x itself -> (B, N, C)."""
        if context is None:
            context = x
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.out_proj(fusion.multi_head_attention(q, k, v, self.num_heads))


def _skipped_children_do_nothing(block: Any) -> bool:
    """Whether MONAI's dropout and changes of layout, which the kernels do without, would leave the values as they are."""
    skipped = (block.drop_weights, block.drop_output, block.input_rearrange, block.out_rearrange)
    return not (block.training and block.dropout_rate) and not any(map(fusion.has_hooks, skipped))


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


class MaisiGroupNorm(ReplacementMixin):
    """Replaces `MaisiGroupNorm3D`, which computes one group at a time."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        return fusion.norm(self, input, silu=False)


class _TiledNorm(GroupNormSiLU):
    """The norm of a block as `run_tiled` needs it, with the weights of `layer`."""

    def __init__(self, layer: Any, *, silu: bool):
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, silu=silu)
        self.weight, self.bias, self.norm_float16 = layer.weight, layer.bias, layer.norm_float16

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalize x (B, C, X, Y, Z) after adding the shift (B, C)."""
        return fusion.norm(self, x, silu=self.silu, shift=shift)


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
            if isinstance(block, MaisiResBlock):
                norms = [_TiledNorm(layer, silu=True) for layer in (block.norm1, block.norm2)]
                tiled = residual_block_convs(name, block)
                convs += [conv._replace(norm=each) for conv, each in zip(tiled, norms, strict=True)]
            elif not isinstance(block, MaisiGroupNorm):
                previous: Any = self.blocks[index - 1] if index else None
                tiled_norm = _TiledNorm(previous, silu=False) if isinstance(previous, MaisiGroupNorm) else None
                resample = "up" if isinstance(block, MaisiUpsample) else "down" if hasattr(block, "pad") else ""
                convs.append(TiledConv(name, find_conv3d(block), tiled_norm, resample))
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
        if type(value) is dict:
            return {key: plain(each) for key, each in value.items()}
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_undone:
            return method(self, *args, **kwargs)
        return method(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return wrapper
