"""Forward pass of group_norm_silu, whose docstring has the formulas and describes the launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import jit, library_op, tl
from ccella_fast.kernels.group_norm_silu_backward import backward_op
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
    to_supported_layout,
    voxel_range,
)
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config

WHOLE_TILES = (2048, 8192, 16384, 32768)  # tile sizes, in elements, for a group that fits in one program
MAX_WHOLE_TILE = 16384  # in fp32, and if the channels of a group are not a multiple of 8; larger tiles spill registers


@jit(do_not_specialize=["programs_per_sample"])
def _group_norm_silu_fwd_statistics_kernel(
    x_ptr, shift_ptr, mean_ptr, m2_ptr, S, voxels_per_program, programs_per_sample,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    LAST: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations (B, P, G) of each part of the voxels."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    i_b, i_block, i_part = program_coords(programs_per_sample, C // (GROUPS * CPG), False)
    o_lane, o_c, m_c = channel_lanes(i_block, CPG, GROUPS, BLOCK_C)
    o_tile, o_s = tile_offsets(o_c, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(i_part, voxels_per_program, S)

    # Welford's update for each element of the tile separately: threads do not communicate in the loop.
    b_mean = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    b_m2 = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    tiles_seen = 0.0
    for first in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        m_tile = (first + o_s < end)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + tile_origin(i_b, first, S, C, LAST) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        tiles_seen += 1.0
        b_delta = tl.where(m_tile, b_x - b_mean, 0.0)
        b_mean += b_delta * (1.0 / tiles_seen)
        b_m2 += b_delta * (b_x - b_mean)

    # Chan's merge, first over the voxels of the tile, then over the channels of a group; a second step refines each mean.
    b_count = (tl.maximum(end - start - o_s + (BLOCK_S - 1), 0) // BLOCK_S).to(tl.float32)[:, None]
    total = (end - start).to(tl.float32)
    b_channel_mean = tl.sum(b_mean * b_count, axis=0) / total
    b_channel_mean += tl.sum((b_mean - b_channel_mean[None, :]) * b_count, axis=0) / total
    b_deviation = b_mean - b_channel_mean[None, :]
    b_channel_m2 = tl.sum(b_m2 + b_count * b_deviation * b_deviation, axis=0)
    if shift_ptr is not None:
        b_channel_mean += tl.load(shift_ptr + i_b * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    o_group = o_lane // CPG
    b_group_mean = sum_over_groups(b_channel_mean, o_group, BLOCK_G) / CPG
    b_deviation = b_channel_mean - broadcast_to_channels(b_group_mean, o_group, BLOCK_G)
    b_group_mean += sum_over_groups(b_deviation, o_group, BLOCK_G) / CPG
    b_deviation = b_channel_mean - broadcast_to_channels(b_group_mean, o_group, BLOCK_G)
    b_group_m2 = sum_over_groups(b_channel_m2 + total * b_deviation * b_deviation, o_group, BLOCK_G)

    o_g = tl.arange(0, BLOCK_G)
    o_out = (i_b * programs_per_sample + i_part) * (C // CPG) + i_block * GROUPS + o_g
    tl.store(mean_ptr + o_out, b_group_mean, mask=o_g < GROUPS)
    tl.store(m2_ptr + o_out, b_group_m2, mask=o_g < GROUPS)


@jit
def _merge_statistics(
    part_mean_ptr, part_m2_ptr, i_b, i_block, S, voxels_per_part, parts,
    G: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and variance [BLOCK_G] from the output of the statistics kernel (Chan's formula for many parts)."""
    o_p = tl.arange(0, BLOCK_P)
    o_g = tl.arange(0, BLOCK_G)
    m_part = (o_p < parts)[:, None] & (o_g < GROUPS)[None, :]
    o_part = (i_b * parts + o_p)[:, None] * G + i_block * GROUPS + o_g[None, :]
    b_part_mean = tl.load(part_mean_ptr + o_part, mask=m_part, other=0.0)
    b_part_m2 = tl.load(part_m2_ptr + o_part, mask=m_part, other=0.0)
    b_voxels = tl.minimum(tl.maximum(S - o_p.to(tl.int64) * voxels_per_part, 0), voxels_per_part)
    b_fraction = (b_voxels.to(tl.float32) / S)[:, None]
    b_mean = tl.sum(b_part_mean * b_fraction, axis=0)
    b_mean += tl.sum((b_part_mean - b_mean[None, :]) * b_fraction, axis=0)
    b_deviation = b_part_mean - b_mean[None, :]
    b_variance = tl.sum(b_part_m2, axis=0) / CPG / S + tl.sum(b_fraction * b_deviation * b_deviation, axis=0)
    return b_mean, b_variance


@jit(do_not_specialize=["programs_per_sample", "parts"])
def _group_norm_silu_fwd_apply_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, part_mean_ptr, part_m2_ptr,
    S, voxels_per_program, programs_per_sample, voxels_per_part, parts, eps,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y from mean and rstd (B, G): both are read, or, where there are partial statistics, merged from them and written."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    i_b, i_block, i_part = program_coords(programs_per_sample, C // (GROUPS * CPG), True)
    o_lane, o_c, m_c = channel_lanes(i_block, CPG, GROUPS, BLOCK_C)
    o_tile, o_s = tile_offsets(o_c, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(i_part, voxels_per_program, S)

    if part_mean_ptr is None:
        b_center = tl.load(mean_ptr + i_b * G + o_c // CPG, mask=m_c, other=0.0).to(tl.float32)
        b_scale = tl.load(rstd_ptr + i_b * G + o_c // CPG, mask=m_c, other=0.0).to(tl.float32)
    else:
        b_mean, b_variance = _merge_statistics(
            part_mean_ptr, part_m2_ptr, i_b, i_block, S, voxels_per_part, parts, G, CPG, GROUPS, BLOCK_G, BLOCK_P
        )
        b_rstd = 1.0 / tl.sqrt(b_variance + eps)
        o_g = tl.arange(0, BLOCK_G)
        # Not `& (i_part == 0)`: Triton 3.9's interpreter rejects such masks.
        m_g = o_g < tl.where(i_part == 0, GROUPS, 0)
        tl.store(mean_ptr + i_b * G + i_block * GROUPS + o_g, b_mean, mask=m_g)
        tl.store(rstd_ptr + i_b * G + i_block * GROUPS + o_g, b_rstd, mask=m_g)
        b_center = broadcast_to_channels(b_mean, o_lane // CPG, BLOCK_G)
        b_scale = broadcast_to_channels(b_rstd, o_lane // CPG, BLOCK_G)
    b_weight, b_bias, b_shift = load_channel_parameters(weight_ptr, bias_ptr, shift_ptr, i_b, o_c, m_c, C)
    b_center -= b_shift
    b_scale *= b_weight

    tiles = tl.cdiv(end - start, BLOCK_S)
    for i_tile in tl.range(0, tiles, num_stages=STAGES):
        first = start + (tiles - 1 - i_tile) * BLOCK_S  # backwards: the last tiles are in the L2 cache
        m_tile = (first + o_s < end)[:, None] & m_c[None, :]
        o_origin = tile_origin(i_b, first, S, C, LAST)
        b_x = tl.load(x_ptr + o_origin + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_z = (b_x - b_center[None, :]) * b_scale[None, :] + b_bias[None, :]
        if SILU:
            b_z = b_z / (1.0 + tl.exp(-b_z))
        tl.store(y_ptr + o_origin + o_tile, b_z.to(y_ptr.dtype.element_ty), mask=m_tile)


@jit
def _group_norm_silu_fwd_whole_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, S, eps,
    C: tl.constexpr, CPG: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """y, mean and rstd of one group of one sample that fits in a tile: x is read once, the statistics take two passes."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    G: tl.constexpr = C // CPG
    i_b = (tl.program_id(0) // G).to(tl.int64)
    i_g = tl.program_id(0) % G
    _, o_c, m_c = channel_lanes(i_g, CPG, 1, BLOCK_C)
    m_tile = (tl.arange(0, BLOCK_S) < S)[:, None] & m_c[None, :]
    o_x = tile_origin(i_b, 0, S, C, LAST) + tile_offsets(o_c, S, C, BLOCK_S, LAST)

    b_weight, b_bias, b_shift = load_channel_parameters(weight_ptr, bias_ptr, shift_ptr, i_b, o_c, m_c, C)
    b_h = tl.load(x_ptr + o_x, mask=m_tile, other=0.0).to(tl.float32) + b_shift[None, :]
    b_mean = tl.sum(tl.where(m_tile, b_h, 0.0)) / CPG / S
    b_mean += tl.sum(tl.where(m_tile, b_h - b_mean, 0.0)) / CPG / S
    b_h -= b_mean
    b_rstd = 1.0 / tl.sqrt(tl.sum(tl.where(m_tile, b_h * b_h, 0.0)) / CPG / S + eps)
    tl.store(mean_ptr + i_b * G + i_g, b_mean)
    tl.store(rstd_ptr + i_b * G + i_g, b_rstd)

    b_z = b_h * (b_rstd * b_weight)[None, :] + b_bias[None, :]
    if SILU:
        b_z = b_z / (1.0 + tl.exp(-b_z))
    tl.store(y_ptr + o_x, b_z.to(y_ptr.dtype.element_ty), mask=m_tile)


@library_op("group_norm_silu")
def forward_op(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd (B, G) in fp32."""
    x = to_supported_layout(x)
    weight, bias, shift = weight.contiguous(), bias.contiguous(), contiguous_or_none(shift)
    outputs = _empty_outputs(x, num_groups)
    B, C, S, last = sizes_and_layout(x)
    tile = whole_tile(x, num_groups)
    if tile is None:
        parts = _launch_statistics(x, num_groups, shift)
        _launch_apply(x, *outputs, weight, bias, shift, silu, eps, parts)
        return outputs
    y, mean, rstd = outputs
    config = launch_config("group_norm_silu", f"whole {tile}", x.device)
    channels = {"C": C, "CPG": C // num_groups, "BLOCK_C": next_power_of_two(C // num_groups)}
    _group_norm_silu_fwd_whole_kernel[(B * num_groups,)](
        x, y, weight, bias, shift, mean, rstd, S, eps, **channels, LAST=last, SILU=silu, TILE=tile, **config.launch()
    )
    return outputs


@forward_op.register_fake
def _(x, num_groups, weight, bias, eps, silu, shift):
    return _empty_outputs(to_supported_layout(x), num_groups)


def whole_tile(x: Tensor, num_groups: int) -> int | None:
    """The tile that holds a whole group of x (B, C, *spatial), so that one launch is enough; None if there is none."""
    channels = x.shape[1] // num_groups
    elements = next_power_of_two(channels) * x.shape[2:].numel()
    if elements > MAX_WHOLE_TILE and (x.dtype == torch.float32 or channels % 8):
        return None
    return next((size for size in WHOLE_TILES if elements <= size), None)


def _empty_outputs(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


class PartialStatistics(NamedTuple):
    """Partial statistics of the voxels of each sample.

    Attributes:
        mean: (B, P, G), fp32.
        m2: Sums of squared deviations (B, P, G), fp32.
        voxels_per_part: Voxels of each part; the last may have fewer.
    """

    mean: Tensor
    m2: Tensor
    voxels_per_part: int


def _launch_statistics(x: Tensor, num_groups: int, shift: Tensor | None) -> PartialStatistics:
    config = launch_config("group_norm_silu", layout_key("statistics", x), x.device)
    grid = launch_grid(x, num_groups, config, partial=True)
    mean = x.new_empty(x.shape[0], grid.programs_per_sample, num_groups, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    S = sizes_and_layout(x)[2]
    _group_norm_silu_fwd_statistics_kernel[(grid.programs,)](
        x, shift, mean, m2, S, grid.voxels_per_program, grid.programs_per_sample, **grid.constants, **config.launch()
    )
    return PartialStatistics(mean, m2, grid.voxels_per_program)


def _launch_apply(
    x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None,
    silu: bool, eps: float, parts: PartialStatistics | None,
) -> None:  # fmt: skip
    config = launch_config("group_norm_silu", layout_key("apply", x), x.device)
    grid = launch_grid(x, mean.shape[1], config)
    part_mean, part_m2, voxels_per_part, count = (None, None, 0, 0) if parts is None else (*parts, parts.mean.shape[1])
    _group_norm_silu_fwd_apply_kernel[(grid.programs,)](
        x, y, weight, bias, shift, mean, rstd, part_mean, part_m2,
        sizes_and_layout(x)[2], grid.voxels_per_program, grid.programs_per_sample, voxels_per_part, count, eps,
        BLOCK_P=next_power_of_two(count), SILU=silu, **grid.constants, **config.launch(),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _, ctx.silu, shift = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing unpacks a tensor a single time
    dx, dweight, dbias, dshift = backward_op(dy, *saved, ctx.silu)
    return dx, None, dweight, dbias, None, None, None if saved[3] is None else dshift


forward_op.register_autograd(_backward, setup_context=_setup_context)


@library_op("group_norm_silu_apply")
def apply_op(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, silu: bool
) -> Tensor:
    """y from given mean and rstd (B, G) of x + shift."""
    x = to_supported_layout(x)
    y = torch.empty_like(x)
    mean, rstd, shift = mean.contiguous(), rstd.contiguous(), contiguous_or_none(shift)
    _launch_apply(x, y, mean, rstd, weight.contiguous(), bias.contiguous(), shift, silu, 0.0, None)
    return y


@apply_op.register_fake
def _(x, mean, rstd, weight, bias, shift, silu):
    return torch.empty_like(to_supported_layout(x))


@library_op("group_norm_statistics")
def statistics_op(x: Tensor, num_groups: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (B, G) of x + shift in fp32."""
    x = to_supported_layout(x)
    _, C, S, _ = sizes_and_layout(x)
    means, m2, voxels_per_part = _launch_statistics(x, num_groups, contiguous_or_none(shift))
    counts = torch.full(means.shape[1:2], voxels_per_part, device=x.device, dtype=torch.float32)
    counts[-1] = S - voxels_per_part * (counts.numel() - 1)
    fraction = (counts / S)[:, None]
    mean = means[:, 0] + ((means - means[:, :1]) * fraction).sum(1)
    variance = m2.sum(1) / (S * (C // num_groups)) + ((means - mean[:, None]).square() * fraction).sum(1)
    return mean, variance


@statistics_op.register_fake
def _(x, num_groups, shift):
    _, mean, variance = _empty_outputs(x, num_groups)
    return mean, variance


def aot_cases() -> list[CompileCase]:
    """The cases of the forward pass that `kernels/aot.py` compiles, with and without idle lanes."""
    statistics = {"step": "statistics", "function": _group_norm_silu_fwd_statistics_kernel}
    apply = {"step": "apply", "function": _group_norm_silu_fwd_apply_kernel, "BLOCK_P": MAX_PARTS, "SILU": True}
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "shift_ptr": "*bf16"}
    signature |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "S": "i32", "eps": "fp32"}
    whole = {"C": 256, "CPG": 8, "BLOCK_C": 8, "LAST": True, "SILU": True}
    configs = DEFAULT_LAUNCH_CONFIGS["group_norm_silu"]
    return [
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=True, **statistics),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **statistics),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=True, **apply),
        layout_compile_case("group_norm_silu", channels=192, voxels=2**17, last=True, dtype="fp32", **apply),
        layout_compile_case("group_norm_silu", channels=64, voxels=2**17, last=False, **apply),
        *(
            CompileCase(
                f"group_norm_silu whole {n} c256 bf16",
                _group_norm_silu_fwd_whole_kernel,
                signature,
                configs[f"whole {n}"],
                {**whole, "TILE": n},
                ("S",),
                True,
            )
            for n in WHOLE_TILES
        ),
    ]
