"""Group normalisation with an optional per-channel shift before it and an optional SiLU after it.

    h = x + shift        m, v = mean and variance of h over the channels of a group and all voxels of a sample
    z = (h - m) / sqrt(v + eps) * weight + bias        y = z * sigmoid(z)

Shapes: x (B, C, *spatial), shift (B, C), weight and bias (C,), m and v (B, G). B batch, C channels, G groups, S voxels, P
shares of a sample's voxels. The residual block of the U-Net is two of these and two convolutions; the shift is its time
embedding.

Backward, with h^ = (h - m) / sqrt(v + eps) and dz = dy * sigmoid(z) * (1 + z * (1 - sigmoid(z))), means over a group:

    dx = (weight dz - mean(weight dz) - h^ mean(weight dz h^)) / sqrt(v + eps)
    dweight = sum dz h^        dbias = sum dz        dshift = sum of dx over the voxels

z is computed again from x, so nothing of x's size is saved but x itself.

Memory traffic, n = B*C*S elements of e bytes. Plain PyTorch, each op reading its inputs and writing its output once, in fp32
between two casts: n * (2 e + 28) bytes (cast, norm that reads twice, SiLU, cast), 8 n more with a shift. Here, forward: 3 n e
(x twice, y once); 2 n e where the statistics are given, a group fits one program, or x fits the L2 cache. Backward: 5 n e (x
and dy twice, dx once).

How a GPU is filled whatever the batch: the first launch writes partial statistics (Welford) of each group and share of a
sample's voxels; the second merges them (Chan et al. 1983), each program the few that it needs, and applies. A program takes
whole groups: one where channels are first, several side by side where they are last. A group that fits one program takes one
launch. Backward is built alike, plus a small launch for the parameters. No atomics: every run gives the same bits.

Autocast has no part in it: x is taken as it comes, all arithmetic is in fp32, y has x's dtype, each gradient its tensor's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import BackendSupport, choose, jit, library_op, tl, triton_refusal
from ccella_fast.kernels.group_norm_silu_backward import aot_cases as backward_cases
from ccella_fast.kernels.group_norm_silu_backward import backward_op
from ccella_fast.kernels.layout import (
    PARTS,
    channel_lanes,
    channel_parameters,
    contiguous_or_none,
    is_channels_last,
    launch_grid,
    layout_compile_case,
    layout_key,
    power_of_two,
    program_coords,
    sizes,
    tile_offsets,
    tile_origin,
    to_channels,
    to_groups,
    to_supported_layout,
    voxel_range,
)
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config

WHOLE = (2048, 8192, 16384)  # tiles, in elements, for a group that one program takes whole


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
    """The definition of correct, in plain PyTorch: all of it in fp32 (or float64, if `x` is), rounded once to `x`'s dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    shift = None if shift is None else shift.to(wide)
    if h.device.type == "cpu" and is_channels_last(h):
        shift = _centring(h, num_groups, shift)
    if shift is not None:
        h = h + shift.reshape(shift.shape + (1,) * (x.ndim - 2))
    h = F.group_norm(h, num_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(h, inplace=not h.requires_grad) if silu else h).to(x.dtype)


def _centring(h: Tensor, num_groups: int, shift: Tensor | None) -> Tensor:
    """`shift` less the mean of each group of h + shift, (B, C): a mean that the norm takes away anyhow. PyTorch's norm of
    channels-last tensors on a CPU computes the variance as E[h^2] - E[h]^2 and loses it where the mean is large."""
    channels = h.detach().flatten(2).mean(2)
    if shift is not None:
        channels = channels + shift.detach()
    mean = channels.unflatten(1, (num_groups, -1)).mean(2).repeat_interleave(h.shape[1] // num_groups, dim=1)
    return -mean if shift is None else shift - mean


def _apply_reference(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, silu: bool
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    per_group = x.shape[1] // mean.shape[1]
    mean, rstd = (each.to(wide).repeat_interleave(per_group, dim=1) for each in (mean, rstd))  # (B, C)
    if shift is not None:
        mean = mean - shift.to(wide)
    scale = rstd * weight.to(wide)
    offset = bias.to(wide) - mean * scale
    column = scale.shape + (1,) * (x.ndim - 2)
    h = torch.addcmul(offset.reshape(column), x.to(wide), scale.reshape(column))
    return (F.silu(h, inplace=not h.requires_grad) if silu else h).to(x.dtype)


def _statistics_reference(x: Tensor, num_groups: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if shift is not None:
        h = h + shift.to(h.dtype).reshape(shift.shape + (1,) * (x.ndim - 2))
    variance, mean = torch.var_mean(h.reshape(h.shape[0], num_groups, -1), dim=2, correction=0)
    return mean, variance


@jit
def _group_norm_statistics_kernel(
    x_ptr, shift_ptr, mean_ptr, m2_ptr, S, rows, shares,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    LAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations (B, P, G) of each share of the voxels."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    b, block, k = program_coords(shares, C // (GROUPS * CPG), False)
    lane, channels, inside = channel_lanes(block, CPG, GROUPS, BLOCK_C)
    offsets, voxels = tile_offsets(channels, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(k, rows, S)

    # Welford, each element of the tile by itself: no exchange between threads in the loop.
    mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    seen = 0.0
    for first in range(start, end, BLOCK_S):
        valid = (first + voxels < end)[:, None] & inside[None, :]
        x = tl.load(x_ptr + tile_origin(b, first, S, C, LAST) + offsets, mask=valid, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * (1.0 / seen)
        m2 += delta * (x - mean)

    # Chan: first over the voxels of the tile, then over the channels of a group. An inner step refines the rounded mean.
    counts = (tl.maximum(end - start - voxels + (BLOCK_S - 1), 0) // BLOCK_S).to(tl.float32)[:, None]
    total = (end - start).to(tl.float32)
    channel_mean = tl.sum(mean * counts, axis=0) / total
    channel_mean += tl.sum((mean - channel_mean[None, :]) * counts, axis=0) / total
    deviation = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + counts * deviation * deviation, axis=0)
    if shift_ptr is not None:
        channel_mean += tl.load(shift_ptr + b * C + channels, mask=inside, other=0.0).to(tl.float32)
    group = lane // CPG
    group_mean = to_groups(channel_mean, group, BLOCK_G) / CPG
    apart = channel_mean - to_channels(group_mean, group, BLOCK_G)
    group_mean += to_groups(apart, group, BLOCK_G) / CPG
    apart = channel_mean - to_channels(group_mean, group, BLOCK_G)
    group_m2 = to_groups(channel_m2 + total * apart * apart, group, BLOCK_G)

    groups = tl.arange(0, BLOCK_G)
    place = (b * shares + k) * (C // CPG) + block * GROUPS + groups
    tl.store(mean_ptr + place, group_mean, mask=groups < GROUPS)
    tl.store(m2_ptr + place, group_m2, mask=groups < GROUPS)


@jit
def _merge(
    part_mean_ptr, part_m2_ptr, b, block, S, part_rows, parts,
    G: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and variance [BLOCK_G] from what `_group_norm_statistics_kernel` wrote (Chan's formula for many parts)."""
    part = tl.arange(0, BLOCK_P)
    groups = tl.arange(0, BLOCK_G)
    inside = (part < parts)[:, None] & (groups < GROUPS)[None, :]
    place = (b * parts + part)[:, None] * G + block * GROUPS + groups[None, :]
    part_mean = tl.load(part_mean_ptr + place, mask=inside, other=0.0)
    part_m2 = tl.load(part_m2_ptr + place, mask=inside, other=0.0)
    weight = (tl.minimum(tl.maximum(S - part.to(tl.int64) * part_rows, 0), part_rows).to(tl.float32) / S)[:, None]
    mean = tl.sum(part_mean * weight, axis=0)
    mean += tl.sum((part_mean - mean[None, :]) * weight, axis=0)
    apart = part_mean - mean[None, :]
    variance = tl.sum(part_m2, axis=0) / CPG / S + tl.sum(weight * apart * apart, axis=0)
    return mean, variance


@jit
def _group_norm_silu_apply_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, part_mean_ptr, part_m2_ptr,
    S, rows, shares, part_rows, parts, eps,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y from mean and rstd (B, G), which are read, or if there are parts, merged from these and written."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    b, block, k = program_coords(shares, C // (GROUPS * CPG), True)
    lane, channels, inside = channel_lanes(block, CPG, GROUPS, BLOCK_C)
    offsets, voxels = tile_offsets(channels, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(k, rows, S)

    if part_mean_ptr is None:
        centre = tl.load(mean_ptr + b * G + channels // CPG, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd_ptr + b * G + channels // CPG, mask=inside, other=0.0).to(tl.float32)
    else:
        mean, variance = _merge(
            part_mean_ptr, part_m2_ptr, b, block, S, part_rows, parts, G, CPG, GROUPS, BLOCK_G, BLOCK_P
        )
        rstd = 1.0 / tl.sqrt(variance + eps)
        groups = tl.arange(0, BLOCK_G)
        mine = groups < tl.where(k == 0, GROUPS, 0)  # not `& (k == 0)`: Triton 3.9's interpreter refuses such masks
        tl.store(mean_ptr + b * G + block * GROUPS + groups, mean, mask=mine)
        tl.store(rstd_ptr + b * G + block * GROUPS + groups, rstd, mask=mine)
        centre = to_channels(mean, lane // CPG, BLOCK_G)
        scale = to_channels(rstd, lane // CPG, BLOCK_G)
    weight, bias, shift = channel_parameters(weight_ptr, bias_ptr, shift_ptr, b, channels, inside, C)
    centre -= shift
    scale *= weight

    for first in range(start, end, BLOCK_S):
        valid = (first + voxels < end)[:, None] & inside[None, :]
        place = tile_origin(b, first, S, C, LAST)
        x = tl.load(x_ptr + place + offsets, mask=valid, other=0.0).to(tl.float32)
        z = (x - centre[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        tl.store(y_ptr + place + offsets, z.to(y_ptr.dtype.element_ty), mask=valid)


@jit
def _group_norm_silu_whole_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, S, eps,
    C: tl.constexpr, CPG: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """y, mean and rstd of one group of one sample that fits a tile: x is read once, the statistics are plain two-pass."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    b = (tl.program_id(0) // G).to(tl.int64)
    g = tl.program_id(0) % G
    _, channels, inside = channel_lanes(g, CPG, 1, BLOCK_C)
    valid = (tl.arange(0, BLOCK_S) < S)[:, None] & inside[None, :]
    offsets = tile_origin(b, 0, S, C, LAST) + tile_offsets(channels, S, C, BLOCK_S, LAST)

    weight, bias, shift = channel_parameters(weight_ptr, bias_ptr, shift_ptr, b, channels, inside, C)
    h = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32) + shift[None, :]
    mean = tl.sum(tl.where(valid, h, 0.0)) / CPG / S
    mean += tl.sum(tl.where(valid, h - mean, 0.0)) / CPG / S
    h -= mean
    rstd = 1.0 / tl.sqrt(tl.sum(tl.where(valid, h * h, 0.0)) / CPG / S + eps)
    tl.store(mean_ptr + b * G + g, mean)
    tl.store(rstd_ptr + b * G + g, rstd)

    z = h * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + offsets, z.to(y_ptr.dtype.element_ty), mask=valid)


@library_op("group_norm_silu")
def _forward_op(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd (B, G) in fp32."""
    x = to_supported_layout(x)
    weight, bias, shift = weight.contiguous(), bias.contiguous(), contiguous_or_none(shift)
    outputs = _empty_outputs(x, num_groups)
    B, C, S, last = sizes(x)
    block = power_of_two(C // num_groups)
    whole = next((size for size in WHOLE if block * S <= size), None)
    if whole is None:
        parts = _launch_statistics(x, num_groups, shift)
        _launch_apply(x, *outputs, weight, bias, shift, silu, eps, parts)
        return outputs
    y, mean, rstd = outputs
    tuned = launch_config("group_norm_silu", f"whole {whole}", x.device)
    _group_norm_silu_whole_kernel[(B * num_groups,)](
        x, y, weight, bias, shift, mean, rstd, S, eps,
        C=C, CPG=C // num_groups, BLOCK_C=block, LAST=last, SILU=silu, TILE=whole, **tuned.launch(),
    )  # fmt: skip
    return outputs


@_forward_op.register_fake
def _(x, num_groups, weight, bias, eps, silu, shift):
    return _empty_outputs(to_supported_layout(x), num_groups)


def _empty_outputs(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


class PartialStatistics(NamedTuple):
    """Partial statistics (B, P, G): means, sums of squared deviations, and the voxels of a part (the last has fewer)."""

    mean: Tensor
    m2: Tensor
    rows: int


def _launch_statistics(x: Tensor, num_groups: int, shift: Tensor | None) -> PartialStatistics:
    tuned = launch_config("group_norm_silu", layout_key("statistics", x), x.device)
    plan = launch_grid(x, num_groups, tuned)
    mean = x.new_empty(x.shape[0], plan.shares, num_groups, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    S = sizes(x)[2]
    _group_norm_statistics_kernel[(plan.programs,)](
        x, shift, mean, m2, S, plan.rows, plan.shares, **plan.sizes, **tuned.launch()
    )
    return PartialStatistics(mean, m2, plan.rows)


def _launch_apply(
    x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    silu: bool, eps: float, parts: PartialStatistics | None,
) -> None:  # fmt: skip
    tuned = launch_config("group_norm_silu", layout_key("apply", x), x.device)
    plan = launch_grid(x, mean.shape[1], tuned)
    part_mean, part_m2, part_rows, count = (None, None, 0, 0) if parts is None else (*parts, parts.mean.shape[1])
    _group_norm_silu_apply_kernel[(plan.programs,)](
        x, y, weight, bias, shift, mean, rstd, part_mean, part_m2,
        sizes(x)[2], plan.rows, plan.shares, part_rows, count, eps,
        BLOCK_P=PARTS, SILU=silu, **plan.sizes, **tuned.launch(),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _, ctx.silu, shift = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dshift = backward_op(dy, *ctx.saved_tensors, ctx.silu)
    return dx, None, dweight, dbias, None, None, None if ctx.saved_tensors[3] is None else dshift


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@library_op("group_norm_silu_apply")
def _apply_op(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, silu: bool
) -> Tensor:
    x = to_supported_layout(x)
    y = torch.empty_like(x)
    mean, rstd, shift = mean.contiguous(), rstd.contiguous(), contiguous_or_none(shift)
    _launch_apply(x, y, mean, rstd, weight.contiguous(), bias.contiguous(), shift, silu, 0.0, None)
    return y


@_apply_op.register_fake
def _(x, mean, rstd, weight, bias, shift, silu):
    return torch.empty_like(to_supported_layout(x))


@library_op("group_norm_statistics")
def _statistics_op(x: Tensor, num_groups: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    x = to_supported_layout(x)
    _, C, S, _ = sizes(x)
    means, m2, rows = _launch_statistics(x, num_groups, contiguous_or_none(shift))
    counts = torch.full(means.shape[1:2], rows, device=x.device, dtype=torch.float32)
    counts[-1] = S - rows * (counts.numel() - 1)
    share = (counts / S)[:, None]
    mean = means[:, 0] + ((means - means[:, :1]) * share).sum(1)
    variance = m2.sum(1) / (S * (C // num_groups)) + ((means - mean[:, None]).square() * share).sum(1)
    return mean, variance


@_statistics_op.register_fake
def _(x, num_groups, shift):
    _, mean, variance = _empty_outputs(x, num_groups)
    return mean, variance


def aot_cases() -> list[CompileCase]:
    """What `kernels/aot.py` compiles: each kernel and shipped configuration, widths with and without idle lanes."""
    statistics = {"step": "statistics", "function": _group_norm_statistics_kernel}
    apply = {"step": "apply", "function": _group_norm_silu_apply_kernel, "BLOCK_P": PARTS, "SILU": True}
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "shift_ptr": "*bf16"}
    signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "S": "i32", "eps": "fp32"}
    whole = {"C": 256, "CPG": 8, "BLOCK_C": 8, "LAST": True, "SILU": True}
    shipped = DEFAULT_LAUNCH_CONFIGS["group_norm_silu"]
    return [
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=True, **statistics),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **statistics),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=True, **apply),
        layout_compile_case("group_norm_silu", channels=192, voxels=2**17, last=True, dtype="fp32", **apply),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **apply),
        *(
            CompileCase(
                f"group_norm_silu whole {n} c256 bf16",
                _group_norm_silu_whole_kernel,
                signature,
                shipped[f"whole {n}"],
                {**whole, "TILE": n},
                ("S",),
                True,
            )
            for n in WHOLE
        ),
        *backward_cases(),
    ]


def backend_support(device: torch.device, dtype: torch.dtype, *, channels_per_group: int = 32) -> BackendSupport:
    """The backends in order of preference, each with why it cannot run here; None if it can."""
    why = triton_refusal(device, dtype)
    if why is None and channels_per_group > 2048:
        why = f"{channels_per_group} channels a group are more than a program takes (2048)"
    order = ("triton", "reference") if device.type == "cuda" else ("reference", "triton")
    return {name: {"triton": why, "reference": None}[name] for name in order}


def _choose(
    x: Tensor,
    num_groups: int,
    shift: Tensor | None,
    backend: str | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> str:
    """The backend, once the arguments are seen to fit: a kernel would read beyond their ends. Raises ValueError."""
    if x.ndim < 3 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"x is {tuple(x.shape)}: (B, C, *spatial) is needed, C divisible by {num_groups} groups")
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"shift is {tuple(shift.shape)}, (B, C) = {tuple(x.shape[:2])} is needed")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[1:2]:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, (C,) = ({x.shape[1]},) is needed")
    sizes = {"channels_per_group": x.shape[1] // num_groups}
    return choose("group_norm_silu", backend_support(x.device, x.dtype, **sizes), backend)


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
    """SiLU(GroupNorm(x + shift)), or without the SiLU: x's shape and dtype, and its memory format where that is contiguous or
    channels last.

    x (B, C, *spatial); weight, bias (C,) and shift (B, C) of any floating dtype. Raises ValueError for shapes that do not fit,
    BackendError for a `backend` that cannot run here."""
    if _choose(x, num_groups, shift, backend, weight, bias) == "reference":
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, silu=silu, shift=shift)
    return _forward_op(x, num_groups, weight, bias, eps, silu, shift)[0]


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
    """As `group_norm_silu` with ready-made statistics of x + shift: mean and rstd = 1 / sqrt(variance + eps), fp32 (B, G). For
    volumes worked in tiles. Forward only on Triton: its backward pass raises."""
    if mean.shape != (x.shape[0], num_groups) or rstd.shape != mean.shape:
        raise ValueError(f"mean is {tuple(mean.shape)}, rstd {tuple(rstd.shape)}: {(x.shape[0], num_groups)} is needed")
    if _choose(x, num_groups, shift, backend, weight, bias) == "reference":
        return _apply_reference(x, mean, rstd, weight, bias, shift, silu)
    return _apply_op(x, mean, rstd, weight, bias, shift, silu)


def group_norm_statistics(
    x: Tensor, num_groups: int, *, shift: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(mean, variance) of x + shift, each (B, G), fp32 (float64 on the reference path if x is); the variance is that of all
    elements, not the sample's (correction 0)."""
    if _choose(x, num_groups, shift, backend) == "reference":
        return _statistics_reference(x, num_groups, shift)
    return _statistics_op(x, num_groups, shift)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x + shift)), or without the SiLU. Parameters and repr as `nn.GroupNorm`."""

    def __init__(self, num_groups: int, channels: int, eps: float, *, silu: bool = True):
        super().__init__(num_groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift)
