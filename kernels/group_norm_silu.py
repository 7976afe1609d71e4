"""Group normalization with an optional per-channel shift before it and an optional SiLU after it.

    h = x + shift        m, v = mean and variance of h over the channels of a group and all voxels of a sample
    z = (h - m) / sqrt(v + eps) * weight + bias        y = z * sigmoid(z)

Shapes: x (B, C, *spatial), shift (B, C), weight and bias (C,), m and v (B, G). B batch, C channels, G groups, S voxels, P
parts into which the voxels of a sample are divided. A residual block of the U-Net consists of two of these and two
convolutions; the shift is its time embedding.

Backward, with h^ = (h - m) / sqrt(v + eps) and dz = dy * sigmoid(z) * (1 + z * (1 - sigmoid(z))), means over a group:

    dx = (weight dz - mean(weight dz) - h^ mean(weight dz h^)) / sqrt(v + eps)
    dweight = sum dz h^        dbias = sum dz        dshift = sum of dx over the voxels

z is recomputed from x, so x is the only tensor of its size that is saved.

Memory traffic for n = B*C*S elements of e bytes. Plain PyTorch, where each op reads its inputs and writes its output once, in
fp32 between two casts: n * (2 e + 28) bytes (cast, norm that reads twice, SiLU, cast), plus 8 n with a shift. Here, forward:
3 n e (x twice, y once); 2 n e where the statistics are given, a group fits in one program, or x fits in the L2 cache. Backward:
5 n e (x and dy twice, dx once).

Parallelism does not depend on the batch size: the first launch writes partial statistics (Welford) of each group and part; in
the second each program merges those that it needs (Chan et al. 1983) and normalizes. A program takes whole groups: one with
channels first, several adjacent ones with channels last. A group that fits in one program takes a single launch. The backward
pass has the same structure, plus a small launch for the parameters. There are no atomics: every run gives the same bits.

Autocast has no effect: x is taken as it is, all arithmetic is in fp32, y has the dtype of x, each gradient that of its tensor.
On a CPU 16-bit tensors are computed by three operations of PyTorch, each of which rounds its result, since copies in fp32 took
1.7 to 9 times as long (two cores AMD EPYC, PyTorch 2.13).
The Triton kernels are in group_norm_silu_forward.py and group_norm_silu_backward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import BackendSupport, choose, triton_unsupported_reason
from ccella_fast.kernels.group_norm_silu_backward import aot_cases as backward_cases
from ccella_fast.kernels.group_norm_silu_forward import aot_cases as forward_cases
from ccella_fast.kernels.group_norm_silu_forward import apply_op, forward_op, statistics_op
from ccella_fast.kernels.layout import is_channels_last

MAX_CHANNELS_PER_GROUP = 2048  # of the Triton kernels


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """The plain PyTorch implementation: computed in fp32 (float64 if `x` is), rounded once to the dtype of `x`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    shift = None if shift is None else shift.to(wide)
    if h.device.type == "cpu" and is_channels_last(h):
        shift = _centering_shift(h, num_groups, shift)
    if shift is not None:
        h = h + shift.reshape(shift.shape + (1,) * (x.ndim - 2))
    h = F.group_norm(h, num_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(h, inplace=not h.requires_grad) if silu else h).to(x.dtype)


def group_norm_silu_native(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """PyTorch's operations on 16-bit tensors: they compute in fp32 without fp32 copies, and round each result."""
    h = x if shift is None else x + shift.to(x.dtype).reshape(shift.shape + (1,) * (x.ndim - 2))
    h = F.group_norm(h, num_groups, weight.float(), bias.float(), eps)
    return F.silu(h, inplace=not h.requires_grad) if silu else h


def _centering_shift(h: Tensor, num_groups: int, shift: Tensor | None) -> Tensor:
    """`shift` minus the mean of each group of h + shift, (B, C).

    The norm subtracts that mean in any case. PyTorch's norm of channels-last tensors on a CPU computes the variance as
    E[h^2] - E[h]^2, which cancels where the mean is large.
    """
    channel_mean = h.detach().flatten(2).mean(2)
    if shift is not None:
        channel_mean = channel_mean + shift.detach()
    mean = channel_mean.unflatten(1, (num_groups, -1)).mean(2).repeat_interleave(h.shape[1] // num_groups, dim=1)
    return -mean if shift is None else shift - mean


def _apply_reference(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, silu: bool
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    channels_per_group = x.shape[1] // mean.shape[1]
    mean, rstd = (each.to(wide).repeat_interleave(channels_per_group, dim=1) for each in (mean, rstd))  # (B, C)
    if shift is not None:
        mean = mean - shift.to(wide)
    scale = rstd * weight.to(wide)
    offset = bias.to(wide) - mean * scale
    shape = scale.shape + (1,) * (x.ndim - 2)
    h = torch.addcmul(offset.reshape(shape), x.to(wide), scale.reshape(shape))
    return (F.silu(h, inplace=not h.requires_grad) if silu else h).to(x.dtype)


def _statistics_reference(x: Tensor, num_groups: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if shift is not None:
        h = h + shift.to(h.dtype).reshape(shift.shape + (1,) * (x.ndim - 2))
    variance, mean = torch.var_mean(h.reshape(h.shape[0], num_groups, -1), dim=2, correction=0)
    return mean, variance


def backend_support(device: torch.device, dtype: torch.dtype, *, channels_per_group: int = 32) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported."""
    triton_reason = triton_unsupported_reason(device, dtype)
    if triton_reason is None and channels_per_group > MAX_CHANNELS_PER_GROUP:
        triton_reason = f"it takes at most {MAX_CHANNELS_PER_GROUP} channels per group, got {channels_per_group}"
    if device.type == "cuda":
        return {"triton": triton_reason, "reference": None}
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        return {"native": None, "reference": None, "triton": triton_reason}
    return {"reference": None, "triton": triton_reason}


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    return [*forward_cases(), *backward_cases()]


def _choose(
    x: Tensor,
    num_groups: int,
    shift: Tensor | None,
    backend: str | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> str:
    """The backend, after a check of the shapes, since a kernel would read out of bounds. Raises ValueError."""
    if x.ndim < 3 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"x must have shape (B, C, *spatial) with C divisible by {num_groups} groups, got {tuple(x.shape)}"
        )
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"shift must have shape (B, C) = {tuple(x.shape[:2])}, got {tuple(shift.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[1:2]:
            raise ValueError(f"{name} must have shape (C,) = ({x.shape[1]},), got {tuple(parameter.shape)}")
    support = backend_support(x.device, x.dtype, channels_per_group=x.shape[1] // num_groups)
    return choose("group_norm_silu", support, backend)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute SiLU(GroupNorm(x + shift)).

    Args:
        x: (B, C, *spatial).
        num_groups: G, a divisor of C.
        weight: (C,), of any floating dtype.
        bias: (C,), of any floating dtype.
        eps: Added to the variance.
        silu: Whether to apply the SiLU.
        shift: (B, C), of any floating dtype.
        backend: "triton", "reference" or, for 16 bits on a CPU, "native"; None for the first supported one.

    Returns:
        A tensor with the shape and dtype of `x`, and its memory format where that is contiguous or channels last.

    Raises:
        ValueError: The shapes do not match.
        BackendError: `backend` is unsupported here.
    """
    chosen = _choose(x, num_groups, shift, backend, weight, bias)
    if chosen != "triton":
        plain = group_norm_silu_native if chosen == "native" else group_norm_silu_reference
        return plain(x, num_groups, weight, bias, eps, silu=silu, shift=shift)
    return forward_op(x, num_groups, weight, bias, eps, silu, shift)[0]


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
    backend: str | None = None,
) -> Tensor:
    """`group_norm_silu` with given statistics of x + shift, for volumes that are computed in slabs.

    `mean` and `rstd` = 1 / sqrt(variance + eps) are fp32 (B, G). The Triton backend is forward-only: its backward pass raises.
    """
    if mean.shape != (x.shape[0], num_groups) or rstd.shape != mean.shape:
        needed, given = (x.shape[0], num_groups), f"{tuple(mean.shape)} and {tuple(rstd.shape)}"
        raise ValueError(f"mean and rstd must have shape (B, G) = {needed}, got {given}")
    if _choose(x, num_groups, shift, backend, weight, bias) != "triton":
        return _apply_reference(x, mean, rstd, weight, bias, shift, silu)
    return apply_op(x, mean, rstd, weight, bias, shift, silu)


def group_norm_statistics(
    x: Tensor, num_groups: int, *, shift: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of x + shift, each (B, G) in fp32 (float64 with the reference backend if `x` is float64).

    The variance is the biased one (correction 0).
    """
    if _choose(x, num_groups, shift, backend) != "triton":
        return _statistics_reference(x, num_groups, shift)
    return statistics_op(x, num_groups, shift)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x + shift)), optionally without the SiLU; parameters and repr are those of `nn.GroupNorm`."""

    def __init__(self, num_groups: int, channels: int, eps: float, *, silu: bool = True):
        super().__init__(num_groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalize x (B, C, *spatial) after adding the shift (B, C)."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift)
