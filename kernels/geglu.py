"""GEGLU (Shazeer 2020): value * gelu(gate) with the exact GELU; the value is the first half of the input.

    y = value * gate * cdf(gate)        cdf(g) = (1 + erf(g / sqrt 2)) / 2, pdf(g) = exp(-g^2 / 2) / sqrt(2 pi)
    dvalue = dy * gate * cdf(gate)      dgate = dy * value * (cdf(gate) + gate * pdf(gate))

Shapes: h (..., 2 C) = [value, gate] -> y (..., C). Only h is saved for the backward pass.

Memory traffic for n elements of y of e bytes: plain PyTorch 5 n e forward (GELU, product) and at least 9 n e backward, and it
saves gelu(gate); here 3 n e and 5 n e. Arithmetic is in fp32 with one rounding; autocast has no effect.
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
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config


def geglu_reference(h: Tensor) -> Tensor:
    """The plain PyTorch implementation, computed in the dtype of `h`."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


@jit
def _tile_indices(rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows as int64, channels, mask) of this program's tile in a flat grid."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    o_r = (tl.program_id(0) // channel_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_c = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return o_r, o_c, (o_r < rows) & (o_c < C)


@jit
def _normal_cdf(b_g):
    return 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))  # 1 / sqrt(2)


@jit(do_not_specialize=["rows"])
def _geglu_fwd_kernel(h_ptr, y_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous_kernel(PDL)
    o_r, o_c, m_tile = _tile_indices(rows, C, BLOCK_R, BLOCK_C)
    b_value = tl.load(h_ptr + o_r * 2 * C + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_gate = tl.load(h_ptr + o_r * 2 * C + C + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_y = b_value * b_gate * _normal_cdf(b_gate)
    tl.store(y_ptr + o_r * C + o_c, b_y.to(y_ptr.dtype.element_ty), mask=m_tile)


@jit(do_not_specialize=["rows"])
def _geglu_bwd_kernel(dy_ptr, h_ptr, dh_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous_kernel(PDL)
    o_r, o_c, m_tile = _tile_indices(rows, C, BLOCK_R, BLOCK_C)
    b_value = tl.load(h_ptr + o_r * 2 * C + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_gate = tl.load(h_ptr + o_r * 2 * C + C + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + o_r * C + o_c, mask=m_tile, other=0.0).to(tl.float32)
    b_cdf = _normal_cdf(b_gate)
    b_pdf = 0.3989422804014327 * tl.exp(-0.5 * b_gate * b_gate)  # 1 / sqrt(2 pi)
    b_dvalue = b_dy * b_gate * b_cdf
    b_dgate = b_dy * b_value * (b_cdf + b_gate * b_pdf)
    tl.store(dh_ptr + o_r * 2 * C + o_c, b_dvalue.to(dh_ptr.dtype.element_ty), mask=m_tile)
    tl.store(dh_ptr + o_r * 2 * C + C + o_c, b_dgate.to(dh_ptr.dtype.element_ty), mask=m_tile)


def _launch(kernel: Any, key: str, h: Tensor, *tensors: Tensor) -> None:
    rows, C = h.shape[:-1].numel(), h.shape[-1] // 2
    config = launch_config("geglu", key, h.device)
    programs = -(-rows // config.constants["BLOCK_R"]) * -(-C // config.constants["BLOCK_C"])
    kernel[(programs,)](*tensors, rows, C, **config.launch())


@library_op("geglu")
def _geglu_op(h: Tensor) -> Tensor:
    h = h.contiguous()
    y = _output_like(h)
    _launch(_geglu_fwd_kernel, "forward", h, h, y)
    return y


@_geglu_op.register_fake
def _(h):
    return _output_like(h)


def _output_like(h: Tensor) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@library_op("geglu_backward")
def _geglu_backward_op(dy: Tensor, h: Tensor) -> Tensor:
    dy, h = dy.contiguous(), h.contiguous()
    dh = torch.empty_like(h)
    _launch(_geglu_bwd_kernel, "backward", h, dy, h, dh)
    return dh


@_geglu_backward_op.register_fake
def _(dy, h):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return _geglu_backward_op(dy, *ctx.saved_tensors)


_geglu_op.register_autograd(_backward, setup_context=_setup_context)


def backend_support(device: torch.device, dtype: torch.dtype) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported."""
    return triton_on_a_gpu(device, dtype)


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    pointers = dict.fromkeys(("h_ptr", "y_ptr", "dy_ptr", "dh_ptr"), "*bf16")
    signature = {**pointers, "rows": "i32", "C": "i32"}
    kernels = {"forward": _geglu_fwd_kernel, "backward": _geglu_bwd_kernel}
    return [
        CompileCase(
            f"geglu {key} bf16",
            kernel,
            signature,
            DEFAULT_LAUNCH_CONFIGS["geglu"][key],
            {},
            ("rows", "C"),
            wide_loads=True,
        )
        for key, kernel in kernels.items()
    ]


def geglu(h: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute value * gelu(gate).

    Args:
        h: (..., 2 C), the value in the first half of the last axis and the gate in the second.
        backend: "triton" or "reference"; None for the first supported one.

    Returns:
        (..., C) in the dtype of `h`.

    Raises:
        ValueError: The size of the last axis is odd.
        BackendError: `backend` is unsupported here.
    """
    if h.shape[-1] % 2:
        raise ValueError(f"the last axis of h holds value and gate and must have even size, got shape {tuple(h.shape)}")
    if choose("geglu", backend_support(h.device, h.dtype), backend) == "reference":
        return geglu_reference(h)
    return _geglu_op(h)
