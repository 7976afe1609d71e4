"""Trilinear upsampling of a volume by 2, as `F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)`.

Along each axis, with x[-1] = x[0] and x[N] = x[N - 1] at the ends:

    y[2i] = 1/4 x[i - 1] + 3/4 x[i]        y[2i + 1] = 3/4 x[i] + 1/4 x[i + 1]

Shapes: x (B, C, X, Y, Z), y (B, C, 2X, 2Y, 2Z). For volumes that are computed in slabs, a range of planes of y along the first
axis can be computed alone.

Memory traffic for n elements of y of e bytes: 9/8 n e forward and backward (x is an eighth of y). PyTorch's CUDA kernel gives a
thread one voxel of all channels, so that with channels last the threads of a warp read addresses that are far apart; its
backward pass adds with atomics.

A program computes the eight results of each of its voxels of x from the 27 voxels around it. The backward pass gathers: each
gradient of x is a sum over 4 x 4 x 4 gradients of y in a fixed order, without atomics. Arithmetic is in fp32 with one rounding,
y has the dtype of x, and autocast has no effect. A contiguous volume is addressed as channels last with B*C samples of one
channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import (
    BackendSupport,
    choose,
    jit,
    library_op,
    tl,
    triton_on_a_gpu,
    wait_for_previous_kernel,
)
from ccella_fast.kernels.layout import is_channels_last, layout_key, next_power_of_two, to_supported_layout
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config

MAX_BLOCK_C = 128  # channels of a program: 16 bytes for each of 16 threads, so that a warp reads two voxels


def upsample_trilinear_reference(x: Tensor, planes: tuple[int, int] | None = None) -> Tensor:
    """The plain PyTorch implementation."""
    lo, hi = planes or (0, 2 * x.shape[2])
    return F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)[:, :, lo:hi]


@jit
def _voxels(origin, end, Y, Z, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """(sample as int64, x, y and z [BLOCK_S, 1], channels [1, BLOCK_C], mask) of the tile of this program.

    The voxels of a sample are those from `origin` to `end` - 1, flattened.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_tile = tl.program_id(0) // CHANNEL_BLOCKS
    tiles = tl.cdiv(end - origin, BLOCK_S)
    o_s = origin + i_tile % tiles * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    o_c = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return (i_tile // tiles).to(tl.int64), o_s // Z // Y, o_s // Z % Y, o_s % Z, o_c, (o_s < end) & (o_c < C)


@jit
def _upsampled_row(p_x, o_row, o_z, Z, m_tile, C: tl.constexpr):
    """The two results along Z from a row of x; o_row is the index of its first voxel."""
    o_below, o_above = tl.maximum(o_z - 1, 0), tl.minimum(o_z + 1, Z - 1)
    b_x = tl.load(p_x + (o_row + o_z) * C, mask=m_tile, other=0.0).to(tl.float32) * 0.75
    b_below = tl.load(p_x + (o_row + o_below) * C, mask=m_tile, other=0.0).to(tl.float32)
    b_above = tl.load(p_x + (o_row + o_above) * C, mask=m_tile, other=0.0).to(tl.float32)
    return b_x + 0.25 * b_below, b_x + 0.25 * b_above


@jit
def _upsampled_plane(p_x, o_plane, o_y, o_z, Y, Z, m_tile, C: tl.constexpr):
    """The four results along Y and Z from a plane of x; o_plane is the index of its first row."""
    o_below, o_above = tl.maximum(o_y - 1, 0), tl.minimum(o_y + 1, Y - 1)
    b_x0, b_x1 = _upsampled_row(p_x, (o_plane + o_y) * Z, o_z, Z, m_tile, C)
    b_below0, b_below1 = _upsampled_row(p_x, (o_plane + o_below) * Z, o_z, Z, m_tile, C)
    b_above0, b_above1 = _upsampled_row(p_x, (o_plane + o_above) * Z, o_z, Z, m_tile, C)
    return (
        0.75 * b_x0 + 0.25 * b_below0,
        0.75 * b_x1 + 0.25 * b_below1,
        0.75 * b_x0 + 0.25 * b_above0,
        0.75 * b_x1 + 0.25 * b_above1,
    )


@jit
def _store_plane(p_y, o_x, o_y, o_z, Y, Z, m_plane, b_x, b_other, C: tl.constexpr):
    """Store 3/4 b_x + 1/4 b_other, four results each, in plane o_x of y."""
    for j in tl.static_range(4):
        o_voxel = (o_x * 2 * Y + 2 * o_y + j // 2) * 2 * Z + 2 * o_z + j % 2
        b_y = 0.75 * b_x[j] + 0.25 * b_other[j]
        tl.store(p_y + o_voxel * C, b_y.to(p_y.dtype.element_ty), mask=m_plane)


@jit(do_not_specialize=["X", "lo", "planes"])
def _upsample_trilinear_fwd_kernel(
    x_ptr, y_ptr, X, Y, Z, lo, planes, C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Planes lo to lo + planes - 1 of the result, from the planes of x at half their indices."""
    wait_for_previous_kernel(PDL)
    end = (lo + planes + 1) // 2 * Y * Z
    i_b, o_x, o_y, o_z, o_c, m_tile = _voxels(lo // 2 * Y * Z, end, Y, Z, C, TILE // BLOCK_C, BLOCK_C)
    p_x, p_y = x_ptr + i_b * X * Y * Z * C + o_c, y_ptr + i_b * planes * Y * Z * 4 * C + o_c
    o_y, o_z = o_y.to(tl.int64), o_z.to(tl.int64)
    b_x = _upsampled_plane(p_x, o_x * Y, o_y, o_z, Y, Z, m_tile, C)
    b_below = _upsampled_plane(p_x, tl.maximum(o_x - 1, 0) * Y, o_y, o_z, Y, Z, m_tile, C)
    i_y = 2 * o_x - lo
    _store_plane(p_y, i_y, o_y, o_z, Y, Z, m_tile & (i_y >= 0), b_x, b_below, C)
    b_above = _upsampled_plane(p_x, tl.minimum(o_x + 1, X - 1) * Y, o_y, o_z, Y, Z, m_tile, C)
    _store_plane(p_y, i_y + 1, o_y, o_z, Y, Z, m_tile & (i_y + 1 < planes), b_x, b_above, C)


@jit
def _gradient_tap(j, o_x, X):
    """Index along an axis of y, and weight, of the j-th of the four gradients of y that make up that of x[o_x]."""
    o_y = 2 * o_x - 1 + j
    # At an end of the axis the neighbor that is missing is x itself.
    b_inner = tl.where((o_y == 0) | (o_y == 2 * X - 1), 1.0, 0.75)
    return o_y, tl.where((j == 1) | (j == 2), b_inner, 0.25)


@jit(do_not_specialize=["X", "lo", "planes"])
def _upsample_trilinear_bwd_kernel(
    dy_ptr, dx_ptr, X, Y, Z, lo, planes, C: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dx from the gradient of planes lo to lo + planes - 1 of the result."""
    wait_for_previous_kernel(PDL)
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    i_b, o_x, o_y, o_z, o_c, m_tile = _voxels(0, X * Y * Z, Y, Z, C, BLOCK_S, BLOCK_C)
    p_dy = dy_ptr + i_b * planes * Y * Z * 4 * C + o_c
    b_dx = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for j in range(16):
        i_x, b_weight_x = _gradient_tap(j // 4, o_x, X)
        i_y, b_weight_y = _gradient_tap(j % 4, o_y, Y)
        i_x -= lo
        m_row = m_tile & (i_x >= 0) & (i_x < planes) & (i_y >= 0) & (i_y < 2 * Y)
        o_row = (i_x * 2 * Y + i_y).to(tl.int64) * 2 * Z
        for k in tl.static_range(4):
            i_z, b_weight_z = _gradient_tap(k, o_z, Z)
            m_tap = m_row & (i_z >= 0) & (i_z < 2 * Z)
            b_dy = tl.load(p_dy + (o_row + i_z) * C, mask=m_tap, other=0.0).to(tl.float32)
            b_dx += b_weight_x * b_weight_y * b_weight_z * b_dy
    o_voxel = i_b * X * Y * Z + (o_x * Y + o_y) * Z + o_z
    tl.store(dx_ptr + o_voxel * C + o_c, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)


@library_op("upsample_trilinear")
def _upsample_trilinear_op(x: Tensor, lo: int, hi: int) -> Tensor:
    """Planes lo to hi - 1 of the result."""
    x = to_supported_layout(x)
    y = _empty_volume(x, hi - lo, 2 * x.shape[3], 2 * x.shape[4])
    X = (hi + 1) // 2 - lo // 2  # planes of x that are the center of a plane of y
    _launch("forward", _upsample_trilinear_fwd_kernel, x, y, x.shape[2:], X, lo, hi - lo)
    return y


@_upsample_trilinear_op.register_fake
def _(x, lo, hi):
    return _empty_volume(to_supported_layout(x), hi - lo, 2 * x.shape[3], 2 * x.shape[4])


@library_op("upsample_trilinear_backward")
def _upsample_trilinear_backward_op(dy: Tensor, X: int, lo: int) -> Tensor:
    """dx with X planes, from the gradient of the planes of the result from `lo` on."""
    dy = to_supported_layout(dy)
    dx = _empty_volume(dy, X, dy.shape[3] // 2, dy.shape[4] // 2)
    _launch("backward", _upsample_trilinear_bwd_kernel, dy, dx, dx.shape[2:], X, lo, dy.shape[2])
    return dx


@_upsample_trilinear_backward_op.register_fake
def _(dy, X, lo):
    return _empty_volume(to_supported_layout(dy), X, dy.shape[3] // 2, dy.shape[4] // 2)


def _empty_volume(like: Tensor, *grid: int) -> Tensor:
    """An uninitialized volume with the batch, channels, dtype and layout of a dense volume."""
    if is_channels_last(like):
        return like.new_empty(like.shape[0], *grid, like.shape[1]).movedim(-1, 1)
    return like.new_empty(*like.shape[:2], *grid)


def _launch(
    step: str, kernel: Any, source: Tensor, result: Tensor, grid: torch.Size, X: int, lo: int, planes: int
) -> None:
    """Launch a kernel over X planes of the small volume, whose grid is `grid`."""
    config = launch_config("upsample_trilinear", layout_key(step, source), source.device)
    B, C = source.shape[:2]
    if not is_channels_last(source):
        B, C = B * C, 1
    block_c = min(next_power_of_two(C), MAX_BLOCK_C)
    tiles = -(-X * grid[1] * grid[2] // (config.constants["TILE"] // block_c))
    programs = B * tiles * -(-C // block_c)
    if programs:
        kernel[(programs,)](source, result, *grid, lo, planes, C=C, BLOCK_C=block_c, **config.launch())


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    x, ctx.lo, _ = inputs
    ctx.X = x.shape[2]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _upsample_trilinear_backward_op(dy, ctx.X, ctx.lo), None, None


_upsample_trilinear_op.register_autograd(_backward, setup_context=_setup_context)


def backend_support(device: torch.device, dtype: torch.dtype) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported."""
    return triton_on_a_gpu(device, dtype)


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    integers = dict.fromkeys(("X", "Y", "Z", "lo", "planes"), "i32")
    cases = []
    for step, kernel, pointers in (
        ("forward", _upsample_trilinear_fwd_kernel, ("x_ptr", "y_ptr")),
        ("backward", _upsample_trilinear_bwd_kernel, ("dy_ptr", "dx_ptr")),
    ):
        for layout, channels, dtype in (("last", 128, "bf16"), ("last", 128, "fp32"), ("first", 1, "bf16")):
            cases.append(
                CompileCase(
                    f"upsample_trilinear {step} {layout} c{channels} {dtype}",
                    kernel,
                    {**dict.fromkeys(pointers, f"*{dtype}"), **integers},
                    DEFAULT_LAUNCH_CONFIGS["upsample_trilinear"][f"{step} {layout}"],
                    {"C": channels, "BLOCK_C": channels},
                    ("Y", "Z"),
                    wide_loads=layout == "last",
                )
            )
    return cases


def upsample_trilinear(x: Tensor, planes: tuple[int, int] | None = None, *, backend: str | None = None) -> Tensor:
    """Upsample a volume by 2 along each axis by trilinear interpolation.

    Args:
        x: (B, C, X, Y, Z).
        planes: (lo, hi), to compute only planes lo to hi - 1 of the result along its first axis.
        backend: "triton" or "reference"; None for the first supported one.

    Returns:
        (B, C, hi - lo, 2Y, 2Z), by default (B, C, 2X, 2Y, 2Z), with the dtype of `x`, and its memory format where that is
        contiguous or channels last.

    Raises:
        ValueError: `x` is not a volume, or `planes` is not a range of planes of the result.
        BackendError: `backend` is unsupported here.
    """
    if x.ndim != 5:
        raise ValueError(f"x must have shape (B, C, X, Y, Z), got {tuple(x.shape)}")
    lo, hi = planes or (0, 2 * x.shape[2])
    if not 0 <= lo < hi <= 2 * x.shape[2]:
        raise ValueError(f"planes must be a range of the {2 * x.shape[2]} planes of the result, got {lo} to {hi}")
    if choose("upsample_trilinear", backend_support(x.device, x.dtype), backend) == "reference":
        return upsample_trilinear_reference(x, planes)
    return _upsample_trilinear_op(x, lo, hi)
