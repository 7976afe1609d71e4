"""Group normalisation with an optional per-channel shift before it and an optional SiLU after it.

    y = silu(GroupNorm(x + shift))        shapes: x (B, C, *spatial), shift (B, C), weight and bias (C,)

The residual block of the U-Net is two of these and two convolutions: the shift is its conditioning vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalise each of `num_groups` channel groups of each sample over its channels and all spatial axes.

    Everything between reading `x` and writing the result is in fp32 (or float64, if `x` is); the result has `x`'s shape and
    dtype. Any number of spatial axes, any memory format."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if shift is not None:
        h = h + shift.to(wide).reshape(shift.shape + (1,) * (x.ndim - 2))
    h = F.group_norm(h, num_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(h) if silu else h).to(x.dtype)


def group_norm_silu_apply(
    x: Tensor,
    num_groups: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """`group_norm_silu` with ready-made statistics of x + shift: mean and 1/sqrt(variance + eps), fp32 (B, num_groups).

    For a volume that is worked on in parts: the statistics are the whole volume's, `x` is one part."""
    wide = torch.promote_types(x.dtype, torch.float32)
    per_group = x.shape[1] // num_groups
    mean, rstd = (each.to(wide).repeat_interleave(per_group, dim=1) for each in (mean, rstd))  # (B, C)
    if shift is not None:
        mean = mean - shift.to(wide)
    scale = rstd * weight.to(wide)
    offset = bias.to(wide) - mean * scale
    shape = scale.shape + (1,) * (x.ndim - 2)
    h = torch.addcmul(offset.reshape(shape), x.to(wide), scale.reshape(shape))
    return (F.silu(h, inplace=not h.requires_grad) if silu else h).to(x.dtype)
