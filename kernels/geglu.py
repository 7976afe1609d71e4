"""GEGLU (Shazeer 2020): value * gelu(gate), the exact gelu, the value first.

    y = value * gate * cdf(gate)        cdf(g) = (1 + erf(g / sqrt 2)) / 2, pdf(g) = exp(-g^2 / 2) / sqrt(2 pi)
    dvalue = dy * gate * cdf(gate)      dgate = dy * value * (cdf(gate) + gate * pdf(gate))

Shapes: h (..., 2 C) = [value, gate] -> y (..., C). Backward reads h again and saves nothing else.

Memory traffic, n elements of y of e bytes: plain PyTorch 5 n e forward (gelu, product) and at least 9 n e backward, and keeps
gelu(gate); here 3 n e and 5 n e. Arithmetic in fp32, one rounding; autocast has no part in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import BackendSupport, choose, jit, library_op, tl, triton_refusal
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config


def geglu_reference(h: Tensor) -> Tensor:
    """The definition of correct, in plain PyTorch and in the dtype of `h`."""
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


@jit
def _tile(rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(first row as int64, columns, mask) of this program's tile in a flat grid."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, column, (row < rows) & (column < C)


@jit
def _cdf(g):
    return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))


@jit
def _geglu_fwd_kernel(h_ptr, y_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column, inside = _tile(rows, C, BLOCK_R, BLOCK_C)
    value = tl.load(h_ptr + row * 2 * C + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(h_ptr + row * 2 * C + C + column, mask=inside, other=0.0).to(tl.float32)
    y = value * gate * _cdf(gate)
    tl.store(y_ptr + row * C + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _geglu_bwd_kernel(dy_ptr, h_ptr, dh_ptr, rows, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column, inside = _tile(rows, C, BLOCK_R, BLOCK_C)
    value = tl.load(h_ptr + row * 2 * C + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(h_ptr + row * 2 * C + C + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    cdf = _cdf(gate)
    pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dvalue = dy * gate * cdf
    dgate = dy * value * (cdf + gate * pdf)
    tl.store(dh_ptr + row * 2 * C + column, dvalue.to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(dh_ptr + row * 2 * C + C + column, dgate.to(dh_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: Any, key: str, h: Tensor, *tensors: Tensor) -> None:
    rows, C = h.shape[:-1].numel(), h.shape[-1] // 2
    tuned = launch_config("geglu", key, h.device)
    blocks = tuned.constants
    programs = -(-rows // blocks["BLOCK_R"]) * -(-C // blocks["BLOCK_C"])
    kernel[(programs,)](*tensors, rows, C, **tuned.launch())


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
    """The backends in order of preference, each with why it cannot run here; None if it can."""
    why = triton_refusal(device, dtype)
    return {"triton": why, "reference": None} if device.type == "cuda" else {"reference": None, "triton": why}


def aot_cases() -> list[CompileCase]:
    """What `kernels/aot.py` compiles."""
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
    """h (..., 2 C) = [value, gate] -> value * gelu(gate), (..., C) in the dtype of `h`.

    Raises ValueError for an odd last axis, BackendError for a `backend` that cannot run here."""
    if h.shape[-1] % 2:
        raise ValueError(f"h is {tuple(h.shape)}: its last axis holds value and gate, an even number is needed")
    if choose("geglu", backend_support(h.device, h.dtype), backend) == "reference":
        return geglu_reference(h)
    return _geglu_op(h)
