"""Backward pass of group_norm_silu, whose docstring has the formulas.

The first launch sums over parts of the voxels; in the second each program merges the sums that it needs and writes dx; a small
third one writes the gradients of the parameters. z is recomputed from x; there are no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import jit, library_op, tl, wait_for_previous_kernel
from ccella_fast.kernels.layout import (
    MAX_PARTS,
    broadcast_to_channels,
    channel_lanes,
    contiguous_or_none,
    launch_grid,
    layout_compile_case,
    layout_key,
    load_channel_parameters,
    next_power_of_two,
    program_coords,
    sizes_and_layout,
    sum_over_groups,
    tile_offsets,
    tile_origin,
    to_layout_of,
    to_supported_layout,
    voxel_range,
)
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config


@jit
def _silu_gradient(b_z, b_dy, SILU: tl.constexpr):
    if SILU:
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
        b_dy = b_dy * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    return b_dy


@jit(do_not_specialize=["programs_per_sample"])
def _group_norm_silu_bwd_sums_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, channel_ptr, group_ptr,
    S, voxels_per_program, programs_per_sample,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    LAST: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums over each part of the voxels.

    Written are the sums of dz, dz h^ (and h^, if there is a shift) as (B, P, 3, C), and those of weight dz and weight dz h^ as
    (B, P, 2, G).
    """
    wait_for_previous_kernel(PDL)
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    i_b, i_block, i_part = program_coords(programs_per_sample, C // (GROUPS * CPG), False)
    o_lane, o_c, m_c = channel_lanes(i_block, CPG, GROUPS, BLOCK_C)
    o_tile, o_s = tile_offsets(o_c, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(i_part, voxels_per_program, S)

    b_weight, b_bias, b_shift = load_channel_parameters(weight_ptr, bias_ptr, shift_ptr, i_b, o_c, m_c, C)
    b_center = tl.load(mean_ptr + i_b * G + o_c // CPG, mask=m_c, other=0.0) - b_shift
    b_rstd = tl.load(rstd_ptr + i_b * G + o_c // CPG, mask=m_c, other=0.0)

    b_sum_dz = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_sum_dz_h = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_sum_h = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        m_tile = (first + o_s < end)[:, None] & m_c[None, :]
        o_origin = tile_origin(i_b, first, S, C, LAST)
        b_x = tl.load(x_ptr + o_origin + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + o_origin + o_tile, mask=m_tile, other=0.0).to(tl.float32)  # 0 outside, hence also dz
        b_h = (b_x - b_center[None, :]) * b_rstd[None, :]
        b_dz = _silu_gradient(b_h * b_weight[None, :] + b_bias[None, :], b_dy, SILU)
        b_sum_dz += b_dz
        b_sum_dz_h += b_dz * b_h
        if shift_ptr is not None:
            b_sum_h += tl.where(m_tile, b_h, 0.0)

    b_channel_dz = tl.sum(b_sum_dz, axis=0)
    b_channel_dz_h = tl.sum(b_sum_dz_h, axis=0)
    o_out = (i_b * programs_per_sample + i_part) * 3 * C + o_c
    tl.store(channel_ptr + o_out, b_channel_dz, mask=m_c)
    tl.store(channel_ptr + o_out + C, b_channel_dz_h, mask=m_c)
    if shift_ptr is not None:
        tl.store(channel_ptr + o_out + 2 * C, tl.sum(b_sum_h, axis=0), mask=m_c)
    o_g = tl.arange(0, BLOCK_G)
    o_out = (i_b * programs_per_sample + i_part) * 2 * G + i_block * GROUPS + o_g
    tl.store(group_ptr + o_out, sum_over_groups(b_weight * b_channel_dz, o_lane // CPG, BLOCK_G), mask=o_g < GROUPS)
    tl.store(
        group_ptr + o_out + G, sum_over_groups(b_weight * b_channel_dz_h, o_lane // CPG, BLOCK_G), mask=o_g < GROUPS
    )


@jit(do_not_specialize=["programs_per_sample", "parts"])
def _group_norm_silu_bwd_dx_kernel(
    x_ptr, dy_ptr, dx_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, group_ptr,
    S, voxels_per_program, programs_per_sample, parts,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dx, from the sums of `_group_norm_silu_bwd_sums_kernel`."""
    wait_for_previous_kernel(PDL)
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    i_b, i_block, i_part = program_coords(programs_per_sample, C // (GROUPS * CPG), True)
    o_lane, o_c, m_c = channel_lanes(i_block, CPG, GROUPS, BLOCK_C)
    o_tile, o_s = tile_offsets(o_c, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(i_part, voxels_per_program, S)

    o_p = tl.arange(0, BLOCK_P)
    o_g = tl.arange(0, BLOCK_G)
    p_sums = group_ptr + (i_b * parts + o_p)[:, None] * 2 * G + i_block * GROUPS + o_g[None, :]
    m_part = (o_p < parts)[:, None] & (o_g < GROUPS)[None, :]
    b_mean_dz = tl.sum(tl.load(p_sums, mask=m_part, other=0.0), axis=0) / CPG / S
    b_mean_dz_h = tl.sum(tl.load(p_sums + G, mask=m_part, other=0.0), axis=0) / CPG / S
    b_mean_dz = broadcast_to_channels(b_mean_dz, o_lane // CPG, BLOCK_G)
    b_mean_dz_h = broadcast_to_channels(b_mean_dz_h, o_lane // CPG, BLOCK_G)

    b_weight, b_bias, b_shift = load_channel_parameters(weight_ptr, bias_ptr, shift_ptr, i_b, o_c, m_c, C)
    b_center = tl.load(mean_ptr + i_b * G + o_c // CPG, mask=m_c, other=0.0) - b_shift
    b_rstd = tl.load(rstd_ptr + i_b * G + o_c // CPG, mask=m_c, other=0.0)

    tiles = tl.cdiv(end - start, BLOCK_S)
    for i_tile in tl.range(0, tiles, num_stages=STAGES):
        first = start + (tiles - 1 - i_tile) * BLOCK_S  # backwards, as in the forward pass
        m_tile = (first + o_s < end)[:, None] & m_c[None, :]
        o_origin = tile_origin(i_b, first, S, C, LAST)
        b_x = tl.load(x_ptr + o_origin + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + o_origin + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_h = (b_x - b_center[None, :]) * b_rstd[None, :]
        b_dz = _silu_gradient(b_h * b_weight[None, :] + b_bias[None, :], b_dy, SILU)
        b_dx = (b_weight[None, :] * b_dz - b_mean_dz[None, :] - b_h * b_mean_dz_h[None, :]) * b_rstd[None, :]
        tl.store(dx_ptr + o_origin + o_tile, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)


@jit(do_not_specialize=["B", "parts"])
def _group_norm_silu_bwd_parameters_kernel(
    channel_ptr, group_ptr, weight_ptr, rstd_ptr, dweight_ptr, dbias_ptr, dshift_ptr, B, S, parts,
    C: tl.constexpr, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dweight, dbias (C,) and, if there is a shift, dshift (B, C), from the sums of `_group_norm_silu_bwd_sums_kernel`."""
    wait_for_previous_kernel(PDL)
    G: tl.constexpr = C // CPG
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_g = o_c // CPG
    o_p = tl.arange(0, BLOCK_P)
    m_part = (o_p < parts)[:, None] & m_c[None, :]
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_C], tl.float32)
    for i_b in range(B):
        o_part = (o_p + i_b * parts)[:, None].to(tl.int64)
        o_sums = o_part * 3 * C + o_c[None, :]
        b_sum_dz = tl.sum(tl.load(channel_ptr + o_sums, mask=m_part, other=0.0), axis=0)
        b_sum_dz_h = tl.sum(tl.load(channel_ptr + o_sums + C, mask=m_part, other=0.0), axis=0)
        b_dbias += b_sum_dz
        b_dweight += b_sum_dz_h
        if dshift_ptr is not None:
            b_sum_h = tl.sum(tl.load(channel_ptr + o_sums + 2 * C, mask=m_part, other=0.0), axis=0)
            o_sums = o_part * 2 * G + o_g[None, :]
            b_group_dz = tl.sum(tl.load(group_ptr + o_sums, mask=m_part, other=0.0), axis=0) / CPG
            b_group_dz_h = tl.sum(tl.load(group_ptr + o_sums + G, mask=m_part, other=0.0), axis=0) / CPG
            b_rstd = tl.load(rstd_ptr + i_b * G + o_g, mask=m_c, other=0.0)
            b_dshift = (b_weight * b_sum_dz - b_group_dz - b_group_dz_h * (b_sum_h / S)) * b_rstd
            tl.store(dshift_ptr + i_b * C + o_c, b_dshift.to(dshift_ptr.dtype.element_ty), mask=m_c)
    tl.store(dweight_ptr + o_c, b_dweight.to(dweight_ptr.dtype.element_ty), mask=m_c)
    tl.store(dbias_ptr + o_c, b_dbias.to(dbias_ptr.dtype.element_ty), mask=m_c)


@library_op("group_norm_silu_backward")
def backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dshift, which is empty without a shift; mean and rstd (B, G) are outputs of the forward op."""
    x = to_supported_layout(x)
    dy = to_layout_of(dy, x)
    weight, bias, shift = weight.contiguous(), bias.contiguous(), contiguous_or_none(shift)
    dx, dweight, dbias, dshift = _empty_gradients(x, weight, bias, shift)
    B, C, S, _ = sizes_and_layout(x)
    G = mean.shape[1]
    inputs = (weight, bias, shift, mean, rstd)

    config = launch_config("group_norm_silu", layout_key("sums", x), x.device)
    grid = launch_grid(x, G, config, partial=True)
    parts = grid.programs_per_sample
    channel_sums = x.new_empty(B, parts, 3, C, dtype=torch.float32)
    group_sums = x.new_empty(B, parts, 2, G, dtype=torch.float32)
    _group_norm_silu_bwd_sums_kernel[(grid.programs,)](
        x, dy, *inputs, channel_sums, group_sums, S, grid.voxels_per_program, grid.programs_per_sample,
        SILU=silu, **grid.constants, **config.launch(),
    )  # fmt: skip
    config = launch_config("group_norm_silu", layout_key("input gradient", x), x.device)
    grid = launch_grid(x, G, config)
    _group_norm_silu_bwd_dx_kernel[(grid.programs,)](
        x, dy, dx, *inputs, group_sums, S, grid.voxels_per_program, grid.programs_per_sample, parts,
        BLOCK_P=next_power_of_two(parts), SILU=silu, **grid.constants, **config.launch(),
    )  # fmt: skip
    config = launch_config("group_norm_silu", "parameter gradients", x.device)
    _group_norm_silu_bwd_parameters_kernel[(-(-C // config.constants["BLOCK_C"]),)](
        channel_sums, group_sums, weight, rstd, dweight, dbias, None if shift is None else dshift, B, S, parts,
        C=C, CPG=C // G, BLOCK_P=next_power_of_two(parts), **config.launch(),
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
    """The cases of the backward pass that `kernels/aot.py` compiles."""
    sums = {"step": "sums", "function": _group_norm_silu_bwd_sums_kernel, "SILU": True}
    gradient = {
        "step": "input gradient",
        "function": _group_norm_silu_bwd_dx_kernel,
        "BLOCK_P": MAX_PARTS,
        "SILU": True,
    }
    function = _group_norm_silu_bwd_parameters_kernel
    pointers = {name: "*fp32" for name in function.arg_names if name.endswith("_ptr")}
    signature = {**pointers, "B": "i32", "S": "i32", "parts": "i32"}
    narrow = {
        **signature,
        **dict.fromkeys(("weight_ptr", "dweight_ptr", "dbias_ptr"), "*bf16"),
    }  # as in training in bf16
    config = DEFAULT_LAUNCH_CONFIGS["group_norm_silu"]["parameter gradients"]
    parameters = [
        CompileCase(
            f"group_norm_silu parameter gradients c{channels} {dtype}",
            function,
            types,
            config,
            {"C": channels, "CPG": channels // 32, "BLOCK_P": MAX_PARTS},
            ("S",),
        )
        for channels in (64, 256)
        for dtype, types in (("bf16", narrow), ("fp32", signature))
    ]
    return [
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=True, **sums),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **sums),
        layout_compile_case("group_norm_silu", channels=192, voxels=2**17, last=True, **gradient),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **gradient),
        *parameters,
    ]
