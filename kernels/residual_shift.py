"""The end of a residual block: sum of two branches and a per-channel shift, a convolution's bias or an embedding.

    y = h + residual + shift        dh = dresidual = dy        dshift = sum of dy over the voxels (and samples)

Shapes: h, residual and y (B, C, *spatial); shift (C,) or (B, C). The convolution before it is then called without its bias.

Memory traffic, n elements of e bytes: plain PyTorch 5 n e (the bias is a pass of its own over the convolution's output, read
and written), here 3 n e. Sums in fp32, one rounding, y in the dtype of h; autocast has no part in it. Without a shift PyTorch's
own sum is one pass already and is preferred. Backward launches nothing of ours: it is one reduction, in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import BackendSupport, choose, jit, library_op, tl, triton_refusal
from ccella_fast.kernels.layout import (
    channel_lanes,
    contiguous_or_none,
    laid_out_like,
    launch_grid,
    layout_compile_case,
    layout_key,
    program_coords,
    sizes,
    tile_offsets,
    tile_origin,
    to_supported_layout,
    voxel_range,
)
from ccella_fast.kernels.tuning import launch_config


def residual_shift_reference(h: Tensor, residual: Tensor, shift: Tensor | None = None) -> Tensor:
    """The definition of correct, in plain PyTorch: summed in fp32 or wider, rounded once to the dtype of `h`."""
    if shift is None:
        return (h + residual).to(h.dtype)
    wide = torch.promote_types(h.dtype, torch.float32)
    column = shift.to(wide).reshape(shift.shape + (1,) * (h.ndim - 2))
    return (h.to(wide) + residual.to(wide) + column).to(h.dtype)


@jit
def _residual_shift_kernel(
    h_ptr, residual_ptr, shift_ptr, y_ptr, shift_stride, S, rows, shares,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """shift_stride: C, or 0 where all samples have the same shift."""
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    b, block, k = program_coords(shares, C // (GROUPS * CPG), False)
    _, channels, inside = channel_lanes(block, CPG, GROUPS, BLOCK_C)
    offsets, voxels = tile_offsets(channels, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(k, rows, S)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + b * shift_stride + channels, mask=inside, other=0.0).to(tl.float32)
    else:
        shift = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_S):
        valid = (first + voxels < end)[:, None] & inside[None, :]
        place = tile_origin(b, first, S, C, LAST) + offsets
        h = tl.load(h_ptr + place, mask=valid, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + place, mask=valid, other=0.0).to(tl.float32)
        y = h + residual + shift[None, :]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=valid)


@library_op("residual_shift")
def _residual_shift_op(h: Tensor, residual: Tensor, shift: Tensor | None) -> Tensor:
    h = to_supported_layout(h)
    residual, shift = laid_out_like(residual, h), contiguous_or_none(shift)
    y = torch.empty_like(h)
    _, C, S, _ = sizes(h)
    tuned = launch_config("residual_shift", layout_key("sum", h), h.device)
    plan = launch_grid(h, _blocks(C), tuned)
    constants = {name: value for name, value in plan.sizes.items() if name != "BLOCK_G"}
    stride = C if shift is not None and shift.ndim == 2 else 0
    _residual_shift_kernel[(plan.programs,)](
        h, residual, shift, y, stride, S, plan.rows, plan.shares, **constants, **tuned.launch()
    )
    return y


def _blocks(C: int) -> int:
    """Into how many equal groups of channels the walk may cut C."""
    return max(d for d in range(1, 33) if C % d == 0)


@_residual_shift_op.register_fake
def _(h, residual, shift):
    return torch.empty_like(to_supported_layout(h))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _, residual, shift = inputs
    ctx.residual_dtype = residual.dtype
    ctx.shift = None if shift is None else (shift.ndim, shift.dtype)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dshift = None
    if ctx.shift is not None and ctx.needs_input_grad[2]:
        rank, dtype = ctx.shift
        axes = [axis for axis in range(dy.ndim) if axis != 1 and (axis > 0 or rank == 1)]
        dshift = dy.sum(axes, dtype=torch.float32).to(dtype)
    return dy, dy.to(ctx.residual_dtype), dshift


_residual_shift_op.register_autograd(_backward, setup_context=_setup_context)


def backend_support(device: torch.device, dtype: torch.dtype, *, shifted: bool = True) -> BackendSupport:
    """The backends in order of preference, each with why it cannot run here; None if it can."""
    why = triton_refusal(device, dtype)
    if device.type == "cuda" and shifted:
        return {"triton": why, "reference": None}
    return {"reference": None, "triton": why}


def aot_cases() -> list[CompileCase]:
    """What `kernels/aot.py` compiles."""
    return [
        layout_compile_case("residual_shift", "sum", _residual_shift_kernel, channels=64, voxels=2**17, last=last)
        for last in (True, False)
    ]


def residual_shift(h: Tensor, residual: Tensor, shift: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """h + residual + shift over the channels: h's shape, dtype and (contiguous or channels-last) memory format.

    h and residual (B, C, *spatial); shift (C,) or (B, C), of any floating dtype. Raises ValueError for shapes that do not fit,
    BackendError for a `backend` that cannot run here."""
    if h.ndim < 3 or h.shape != residual.shape:
        raise ValueError(
            f"h is {tuple(h.shape)}, residual {tuple(residual.shape)}: the same (B, C, *spatial) is needed"
        )
    if shift is not None and shift.shape not in (h.shape[1:2], h.shape[:2]):
        raise ValueError(f"shift is {tuple(shift.shape)}: (C,) or (B, C) = {tuple(h.shape[:2])} is needed")
    usable = backend_support(h.device, h.dtype, shifted=shift is not None)
    if choose("residual_shift", usable, backend) == "reference":
        return residual_shift_reference(h, residual, shift)
    return _residual_shift_op(h, residual, shift)
