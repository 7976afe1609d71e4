"""The backward pass of group_norm_silu: the formulas stand there.

One launch sums over shares of the voxels, one merges the sums that a program needs and writes dx, a small one writes the
gradients of the parameters. z is computed again from x; no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import jit, library_op, tl
from ccella_fast.kernels.layout import (
    PARTS,
    channel_lanes,
    channel_parameters,
    contiguous_or_none,
    laid_out_like,
    launch_grid,
    layout_compile_case,
    layout_key,
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


@jit
def _silu_gradient(z, dy, SILU: tl.constexpr):
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@jit
def _group_norm_silu_bwd_sums_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, channel_ptr, group_ptr, S, rows, shares,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    LAST: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums over each share of the voxels: of dz, dz h^ (and h^, if there is a shift) into (B, P, 3, C), of weight dz and
    weight dz h^ into (B, P, 2, G)."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    b, block, k = program_coords(shares, C // (GROUPS * CPG), False)
    lane, channels, inside = channel_lanes(block, CPG, GROUPS, BLOCK_C)
    offsets, voxels = tile_offsets(channels, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(k, rows, S)

    weight, bias, shift = channel_parameters(weight_ptr, bias_ptr, shift_ptr, b, channels, inside, C)
    centre = tl.load(mean_ptr + b * G + channels // CPG, mask=inside, other=0.0) - shift
    rstd = tl.load(rstd_ptr + b * G + channels // CPG, mask=inside, other=0.0)

    sum_dz = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_dz_h = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_h = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_S):
        valid = (first + voxels < end)[:, None] & inside[None, :]
        place = tile_origin(b, first, S, C, LAST)
        x = tl.load(x_ptr + place + offsets, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place + offsets, mask=valid, other=0.0).to(tl.float32)  # 0 outside, so dz is
        h = (x - centre[None, :]) * rstd[None, :]
        dz = _silu_gradient(h * weight[None, :] + bias[None, :], dy, SILU)
        sum_dz += dz
        sum_dz_h += dz * h
        if shift_ptr is not None:
            sum_h += tl.where(valid, h, 0.0)

    channel_dz = tl.sum(sum_dz, axis=0)
    channel_dz_h = tl.sum(sum_dz_h, axis=0)
    place = (b * shares + k) * 3 * C + channels
    tl.store(channel_ptr + place, channel_dz, mask=inside)
    tl.store(channel_ptr + place + C, channel_dz_h, mask=inside)
    if shift_ptr is not None:
        tl.store(channel_ptr + place + 2 * C, tl.sum(sum_h, axis=0), mask=inside)
    groups = tl.arange(0, BLOCK_G)
    place = (b * shares + k) * 2 * G + block * GROUPS + groups
    tl.store(group_ptr + place, to_groups(weight * channel_dz, lane // CPG, BLOCK_G), mask=groups < GROUPS)
    tl.store(group_ptr + place + G, to_groups(weight * channel_dz_h, lane // CPG, BLOCK_G), mask=groups < GROUPS)


@jit
def _group_norm_silu_bwd_dx_kernel(
    x_ptr, dy_ptr, dx_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, group_ptr, S, rows, shares, parts,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx, from the sums of `_group_norm_silu_bwd_sums_kernel`."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    b, block, k = program_coords(shares, C // (GROUPS * CPG), True)
    lane, channels, inside = channel_lanes(block, CPG, GROUPS, BLOCK_C)
    offsets, voxels = tile_offsets(channels, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(k, rows, S)

    part = tl.arange(0, BLOCK_P)
    groups = tl.arange(0, BLOCK_G)
    sums = group_ptr + (b * parts + part)[:, None] * 2 * G + block * GROUPS + groups[None, :]
    known = (part < parts)[:, None] & (groups < GROUPS)[None, :]
    mean_dz = tl.sum(tl.load(sums, mask=known, other=0.0), axis=0) / CPG / S
    mean_dz_h = tl.sum(tl.load(sums + G, mask=known, other=0.0), axis=0) / CPG / S
    mean_dz = to_channels(mean_dz, lane // CPG, BLOCK_G)
    mean_dz_h = to_channels(mean_dz_h, lane // CPG, BLOCK_G)

    weight, bias, shift = channel_parameters(weight_ptr, bias_ptr, shift_ptr, b, channels, inside, C)
    centre = tl.load(mean_ptr + b * G + channels // CPG, mask=inside, other=0.0) - shift
    rstd = tl.load(rstd_ptr + b * G + channels // CPG, mask=inside, other=0.0)

    for first in range(start, end, BLOCK_S):
        valid = (first + voxels < end)[:, None] & inside[None, :]
        place = tile_origin(b, first, S, C, LAST)
        x = tl.load(x_ptr + place + offsets, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place + offsets, mask=valid, other=0.0).to(tl.float32)
        h = (x - centre[None, :]) * rstd[None, :]
        dz = _silu_gradient(h * weight[None, :] + bias[None, :], dy, SILU)
        dx = (weight[None, :] * dz - mean_dz[None, :] - h * mean_dz_h[None, :]) * rstd[None, :]
        tl.store(dx_ptr + place + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)


@jit
def _group_norm_silu_bwd_parameters_kernel(
    channel_ptr, group_ptr, weight_ptr, rstd_ptr, dweight_ptr, dbias_ptr, dshift_ptr, B, S, parts,
    C: tl.constexpr, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dweight, dbias (C,) and, if there is one, dshift (B, C), from the sums of `_group_norm_silu_bwd_sums_kernel`."""
    G: tl.constexpr = C // CPG
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    group = channels // CPG
    part = tl.arange(0, BLOCK_P)
    known = (part < parts)[:, None] & inside[None, :]
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for b in range(B):
        row = (part + b * parts)[:, None].to(tl.int64)
        place = row * 3 * C + channels[None, :]
        sum_dz = tl.sum(tl.load(channel_ptr + place, mask=known, other=0.0), axis=0)
        sum_dz_h = tl.sum(tl.load(channel_ptr + place + C, mask=known, other=0.0), axis=0)
        dbias += sum_dz
        dweight += sum_dz_h
        if dshift_ptr is not None:
            sum_h = tl.sum(tl.load(channel_ptr + place + 2 * C, mask=known, other=0.0), axis=0)
            place = row * 2 * G + group[None, :]
            group_dz = tl.sum(tl.load(group_ptr + place, mask=known, other=0.0), axis=0) / CPG
            group_dz_h = tl.sum(tl.load(group_ptr + place + G, mask=known, other=0.0), axis=0) / CPG
            rstd = tl.load(rstd_ptr + b * G + group, mask=inside, other=0.0)
            dshift = (weight * sum_dz - group_dz - group_dz_h * (sum_h / S)) * rstd
            tl.store(dshift_ptr + b * C + channels, dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + channels, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + channels, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


@library_op("group_norm_silu_backward")
def backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dshift; the last is empty where there is no shift. mean and rstd (B, G) as from the forward op."""
    x = to_supported_layout(x)
    dy = laid_out_like(dy, x)
    weight, bias, shift = weight.contiguous(), bias.contiguous(), contiguous_or_none(shift)
    dx, dweight, dbias, dshift = _empty_gradients(x, weight, bias, shift)
    B, C, S, _ = sizes(x)
    G = mean.shape[1]
    given = (weight, bias, shift, mean, rstd)

    tuned = launch_config("group_norm_silu", layout_key("sums", x), x.device)
    plan = launch_grid(x, G, tuned)
    parts = plan.shares
    channel_sums = x.new_empty(B, parts, 3, C, dtype=torch.float32)
    group_sums = x.new_empty(B, parts, 2, G, dtype=torch.float32)
    _group_norm_silu_bwd_sums_kernel[(plan.programs,)](
        x, dy, *given, channel_sums, group_sums, S, plan.rows, plan.shares, SILU=silu, **plan.sizes, **tuned.launch()
    )
    tuned = launch_config("group_norm_silu", layout_key("input gradient", x), x.device)
    plan = launch_grid(x, G, tuned)
    _group_norm_silu_bwd_dx_kernel[(plan.programs,)](
        x, dy, dx, *given, group_sums, S, plan.rows, plan.shares, parts,
        BLOCK_P=PARTS, SILU=silu, **plan.sizes, **tuned.launch(),
    )  # fmt: skip
    tuned = launch_config("group_norm_silu", "parameter gradients", x.device)
    _group_norm_silu_bwd_parameters_kernel[(-(-C // tuned.constants["BLOCK_C"]),)](
        channel_sums, group_sums, weight, rstd, dweight, dbias, None if shift is None else dshift, B, S, parts,
        C=C, CPG=C // G, BLOCK_P=PARTS, **tuned.launch(),
    )  # fmt: skip
    return dx, dweight, dbias, dshift


@backward_op.register_fake
def _(dy, x, weight, bias, shift, mean, rstd, silu):
    return _empty_gradients(to_supported_layout(x), weight, bias, shift)


def _empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dshift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dshift


def aot_cases() -> list[CompileCase]:
    """What `kernels/aot.py` compiles of the backward pass."""
    sums = {"step": "sums", "function": _group_norm_silu_bwd_sums_kernel, "SILU": True}
    gradient = {"step": "input gradient", "function": _group_norm_silu_bwd_dx_kernel, "BLOCK_P": PARTS, "SILU": True}
    function = _group_norm_silu_bwd_parameters_kernel
    pointers = {name: "*fp32" for name in function.arg_names if name.endswith("_ptr")}
    signature = {**pointers, "B": "i32", "S": "i32", "parts": "i32"}
    tuned = DEFAULT_LAUNCH_CONFIGS["group_norm_silu"]["parameter gradients"]
    sizes_of_64 = {"C": 64, "CPG": 2, "BLOCK_P": PARTS}
    return [
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=True, **sums),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **sums),
        layout_compile_case("group_norm_silu", channels=192, voxels=2**17, last=True, **gradient),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **gradient),
        CompileCase("group_norm_silu parameter gradients c64", function, signature, tuned, sizes_of_64, ("S",)),
    ]
