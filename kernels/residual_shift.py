"""End of a residual block: sum of two branches and a per-channel shift, such as a convolution's bias or an embedding.

    y = h + residual + shift        dh = dresidual = dy        dshift = sum of dy over the voxels (and samples)

Shapes: h, residual and y (B, C, *spatial); shift (C,) or (B, C). Where the shift is the bias of the preceding convolution, that
convolution is called without it.

Memory traffic for n elements of e bytes: plain PyTorch 5 n e (the bias is a separate pass that reads and writes the output of
the convolution), here 3 n e. Sums are in fp32 with one rounding, y has the dtype of h, and autocast has no effect. Without a
shift PyTorch's own sum is a single pass already and is preferred. The backward pass is one fp32 reduction of PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import (
    BackendSupport,
    choose,
    jit,
    library_op,
    tl,
    triton_unsupported_reason,
    wait_for_previous_kernel,
)
from ccella_fast.kernels.layout import (
    channel_lanes,
    contiguous_or_none,
    is_channels_last,
    launch_grid,
    layout_compile_case,
    layout_key,
    program_coords,
    sizes_and_layout,
    tile_offsets,
    tile_origin,
    to_layout_of,
    to_supported_layout,
    voxel_range,
)
from ccella_fast.kernels.tuning import launch_config


def residual_shift_reference(h: Tensor, residual: Tensor, shift: Tensor | None = None) -> Tensor:
    """The plain PyTorch implementation: summed in fp32 or wider, rounded once to the dtype of `h`."""
    if shift is None:
        return (h + residual).to(h.dtype)
    wide = torch.promote_types(h.dtype, torch.float32)
    shift = shift.to(wide).reshape(shift.shape + (1,) * (h.ndim - 2))
    return (h.to(wide) + residual.to(wide) + shift).to(h.dtype)


@jit(do_not_specialize=["programs_per_sample"])
def _residual_shift_fwd_kernel(
    h_ptr, residual_ptr, shift_ptr, y_ptr, stride_shift_b, S, voxels_per_program, programs_per_sample,
    C: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of one part of the voxels of a sample. stride_shift_b: C, or 0 where all samples share one shift."""
    wait_for_previous_kernel(PDL)
    BLOCK_S: tl.constexpr = TILE // BLOCK_C
    i_b, i_block, i_part = program_coords(programs_per_sample, C // (GROUPS * CPG), False)
    _, o_c, m_c = channel_lanes(i_block, CPG, GROUPS, BLOCK_C)
    o_tile, o_s = tile_offsets(o_c, S, C, BLOCK_S, LAST), tl.arange(0, BLOCK_S)
    start, end = voxel_range(i_part, voxels_per_program, S)
    if shift_ptr is not None:
        b_shift = tl.load(shift_ptr + i_b * stride_shift_b + o_c, mask=m_c, other=0.0).to(tl.float32)
    else:
        b_shift = tl.zeros([BLOCK_C], tl.float32)
    for first in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        m_tile = (first + o_s < end)[:, None] & m_c[None, :]
        o_x = tile_origin(i_b, first, S, C, LAST) + o_tile
        b_h = tl.load(h_ptr + o_x, mask=m_tile, other=0.0).to(tl.float32)
        b_residual = tl.load(residual_ptr + o_x, mask=m_tile, other=0.0).to(tl.float32)
        b_y = b_h + b_residual + b_shift[None, :]
        tl.store(y_ptr + o_x, b_y.to(y_ptr.dtype.element_ty), mask=m_tile)


@library_op("residual_shift")
def _residual_shift_op(h: Tensor, residual: Tensor, shift: Tensor | None) -> Tensor:
    h = to_supported_layout(h)
    y = torch.empty_like(h)
    _launch(h, to_layout_of(residual, h), shift, y)
    return y


@library_op("residual_shift_", mutates_args=("residual",))
def _residual_shift_in_place_op(h: Tensor, residual: Tensor, shift: Tensor | None) -> None:
    """residual += h + shift, for a dense residual."""
    _launch(to_layout_of(h, residual), residual, shift, residual)


@_residual_shift_in_place_op.register_fake
def _(h, residual, shift):
    return None


def _launch(h: Tensor, residual: Tensor, shift: Tensor | None, y: Tensor) -> None:
    """Write y, which may be the residual; the three have the same layout."""
    shift = contiguous_or_none(shift)
    _, C, S, _ = sizes_and_layout(h)
    config = launch_config("residual_shift", layout_key("sum", h), h.device)
    grid = launch_grid(h, _channel_groups(C), config)
    constants = {name: value for name, value in grid.constants.items() if name != "BLOCK_G"}
    stride_shift_b = C if shift is not None and shift.ndim == 2 else 0
    _residual_shift_fwd_kernel[(grid.programs,)](
        h, residual, shift, y, stride_shift_b, S, grid.voxels_per_program, grid.programs_per_sample,
        **constants, **config.launch(),
    )  # fmt: skip


def _channel_groups(C: int) -> int:
    """The number of equal groups of channels, at most 32, between which the programs may be divided."""
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
        ndim, dtype = ctx.shift
        axes = [axis for axis in range(dy.ndim) if axis != 1 and (axis > 0 or ndim == 1)]
        dshift = dy.sum(axes, dtype=torch.float32).to(dtype)
    return dy, dy.to(ctx.residual_dtype), dshift


_residual_shift_op.register_autograd(_backward, setup_context=_setup_context)


def backend_support(device: torch.device, dtype: torch.dtype, *, shifted: bool = True) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    Args:
        device: Device of the tensors.
        dtype: Dtype of `h`.
        shifted: Whether there is a shift.
    """
    triton_reason = triton_unsupported_reason(device, dtype)
    if device.type == "cuda" and shifted:
        return {"triton": triton_reason, "reference": None}
    return {"reference": None, "triton": triton_reason}


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    return [
        layout_compile_case("residual_shift", "sum", _residual_shift_fwd_kernel, channels=64, voxels=2**17, last=last)
        for last in (True, False)
    ]


def residual_shift(h: Tensor, residual: Tensor, shift: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Compute h + residual + shift, with the shift per channel.

    Args:
        h: (B, C, *spatial).
        residual: (B, C, *spatial).
        shift: (C,) or (B, C), of any floating dtype.
        backend: "triton" or "reference"; None for the first supported one.

    Returns:
        A tensor with the shape and dtype of `h`, and its memory format where that is contiguous or channels last.

    Raises:
        ValueError: The shapes do not match.
        BackendError: `backend` is unsupported here.
    """
    if _choose(h, residual, shift, backend) == "reference":
        return residual_shift_reference(h, residual, shift)
    return _residual_shift_op(h, residual, shift)


def residual_shift_(h: Tensor, residual: Tensor, shift: Tensor | None = None, *, backend: str | None = None) -> None:
    """Add h + shift to `residual` in place, without gradients; the arguments are those of `residual_shift`."""
    dense = residual.is_contiguous() or is_channels_last(residual)
    if _choose(h, residual, shift, backend) == "triton" and dense and residual.dtype == h.dtype:
        _residual_shift_in_place_op(h, residual, shift)
    else:
        residual.copy_(residual_shift(h, residual, shift, backend=backend))


def _choose(h: Tensor, residual: Tensor, shift: Tensor | None, backend: str | None) -> str:
    """The backend, after a check of the shapes, since a kernel would read out of bounds. Raises ValueError."""
    if h.ndim < 3 or h.shape != residual.shape:
        raise ValueError(
            f"h and residual must have the same shape (B, C, *spatial), got {tuple(h.shape)} and {tuple(residual.shape)}"
        )
    if shift is not None and shift.shape not in (h.shape[1:2], h.shape[:2]):
        raise ValueError(f"shift must have shape (C,) or (B, C) = {tuple(h.shape[:2])}, got {tuple(shift.shape)}")
    support = backend_support(h.device, h.dtype, shifted=shift is not None)
    return choose("residual_shift", support, backend)
