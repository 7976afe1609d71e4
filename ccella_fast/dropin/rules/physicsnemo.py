"""NVIDIA PhysicsNeMo: the norms and residual blocks of its diffusion U-Nets. Its GroupNorm is not that of PyTorch.

In evaluation it divides by the unbiased variance n / (n - 1) v of the n values of a group. With e = eps (n - 1) / n,

    (x - m) / sqrt(n / (n - 1) v + eps) = sqrt((n - 1) / n) (x - m) / sqrt(v + e)

so it is a GroupNorm with another eps and other weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import computes, has_hooks
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule

_LARGE_ON_CPU = 2**15  # elements above which one operation with gradients is faster than several


class _Layer(NamedTuple):
    """What `fusion.norm` reads from a layer."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float


def _layer(norm: Any, x: Tensor) -> _Layer:
    """The GroupNorm of PyTorch that computes what `norm` does with x."""
    if norm.training:
        return _Layer(norm.num_groups, norm.weight, norm.bias, norm.eps)
    values = x.shape[1:].numel() // norm.num_groups
    part = (values - 1) / values
    return _Layer(norm.num_groups, norm.weight * part**0.5, norm.bias, norm.eps * part)


class VolumeNorm(ReplacementMixin):
    """Replaces `GroupNorm3D`. In evaluation PyTorch's own is faster on a CPU too: it does not store what it subtracts."""

    training: bool
    num_groups: int

    def suits(self, x: Tensor) -> bool:
        """On a GPU, or where the norm is several operations of a tensor that is not tiny."""
        several = not self.training and (not torch.is_grad_enabled() or x.numel() >= _LARGE_ON_CPU)
        pays = not x.is_cpu or several
        return pays and x.ndim == 5 and x.dtype != torch.float64 and x.shape[1:].numel() > self.num_groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        return fusion.norm(_layer(self, x), x, silu=False)


class ConditionedResBlock(ReplacementMixin):
    """Replaces `UNetBlock3D`."""

    attention: bool
    adaptive_scale: bool
    dropout: float
    skip_scale: float
    act: Any
    norm0: nn.Module
    norm1: nn.Module
    conv0: nn.Module
    conv1: nn.Module
    affine: nn.Module
    skip: nn.Module | None
    attn: nn.Module

    def suits(self, x: Tensor, emb: Tensor) -> bool:
        """Whether the norms are plain, and fusing them with the SiLU pays."""
        pays = fusion.norm_and_silu_pay(x)
        return pays and emb.ndim == 2 and self.act is F.silu and _are_norms(self)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, X, Y, Z), emb (B, E) -> (B, out_channels, X', Y', Z')."""
        h = self.conv0(fusion.norm(_layer(self.norm0, x), x, silu=True))
        embedding = self.affine(emb).to(h.dtype)
        layer = _layer(self.norm1, h)
        if not self.adaptive_scale:
            h = fusion.norm(layer, h, silu=True, shift=embedding)
        elif fusion.can_modulate(h):
            h = fusion.modulated_norm(layer, h, *embedding.chunk(2, dim=1))
        else:
            scale, shift = embedding[:, :, None, None, None].chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        h = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return self.attn(h) * self.skip_scale if self.attention else h


def _are_norms(block: Any) -> bool:
    return all(computes(each) == "volume norm" and not has_hooks(each) for each in (block.norm0, block.norm1))


def _norm(module: Any) -> Replacements:
    yield Replacement("group_norm", module, VolumeNorm)


def _block(module: Any) -> Replacements:
    if module.act is not F.silu:
        yield f"its activation is {getattr(module.act, '__name__', module.act)}, not SiLU"
    elif not _are_norms(module):
        yield "its norms are not plain GroupNorm3Ds"
    else:
        yield Replacement("group_norm_silu", module, ConditionedResBlock)


RULES: dict[Any, Rule] = {
    "90d4462ef82f895c": _norm,  # physicsnemo 2.2: experimental.nn.diffusion_unet_3d_blocks.GroupNorm3D
    "b1a82e7a6a21bb50": _block,  # UNetBlock3D
}
