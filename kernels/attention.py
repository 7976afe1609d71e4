"""Softmax attention of every head, without a mask: o = softmax(q k^T / sqrt(K)) v.

Shapes: q, o (B, M, N, K), k and v (B, M, L, K); B batch, M heads, N queries, L keys, K head width.

Fused as in FlashAttention-2 (Dao, arXiv 2307.08691): one pass over the keys with a running maximum m and sum l, in base 2, so
that the scale is part of the exponent's multiply-add:

    p = exp2(c s - m),  s = q k^T,  c = log2(e) / sqrt(K);   o = p v / l;   lse = m + log2 l

The N x L scores are never written to memory: per head, 2 (N + L) K elements are moved instead of 2 N L more, in one launch
instead of four. Saved for the backward pass are q, k, v, o and lse (B, M, N). It recomputes p, in two launches without atomics,
so the same input gives the same bits; delta is a by-product of the first:

    delta = rowsum(o do);  dp = do v^T;  ds = p (dp - delta);   dq = ds k / sqrt(K);   dk = ds^T q / sqrt(K);   dv = p^T do

At K = 32 a score costs 128 FLOP and one exp2: the exponential is the limit, not the tensor cores.

Products of q, k, v, p and ds are computed in the dtype of q on tensor cores (fp32: three TF32 products), everything else in
fp32. Under autocast q, k and v are cast to autocast's dtype, as in PyTorch's attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels import tuning
from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import (
    BackendSupport,
    choose,
    compute_dtype,
    jit,
    library_op,
    tl,
    triton_unsupported_reason,
    xformers_unsupported_reason,
)
from ccella_fast.kernels.layout import next_power_of_two

MAX_HEAD_WIDTH = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}  # wider heads spill registers
MAX_ROW_STRIDE = 2**23  # times the 256 rows of the largest block: 2^31


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain PyTorch implementation: computed in fp32 (float64 if `q` is), rounded once to the dtype of `q`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v.to(wide)).to(q.dtype)


@jit
def in_base_two(scale):
    """The factor of scores whose softmax is computed in base 2."""
    return scale * 1.4426950408889634  # log2(e)


@jit
def load_rows(
    p_first, stride, rows_left, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """(ROWS, BLOCK_K) of a matrix with rows of K elements: zeros beyond K and, if RAGGED, beyond `rows_left` rows."""
    o_row = tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK_K)
    p_rows = p_first + o_row[:, None] * stride + o_col[None, :]
    if RAGGED:
        b_rows = tl.load(p_rows, mask=(o_row < rows_left)[:, None] & (o_col < K)[None, :], other=0.0)
    elif K != BLOCK_K:
        b_rows = tl.load(p_rows, mask=(o_col < K)[None, :], other=0.0)
    else:
        b_rows = tl.load(p_rows)
    return b_rows


@jit
def store_rows(p_first, stride, rows_left, b_rows, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Store the first `rows_left` rows and K columns of b_rows (ROWS, BLOCK_K)."""
    o_row = tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK_K)
    p_rows = p_first + o_row[:, None] * stride + o_col[None, :]
    tl.store(p_rows, b_rows.to(p_first.dtype.element_ty), mask=(o_row < rows_left)[:, None] & (o_col < K)[None, :])


@jit
def online_softmax_update(b_s, b_v, b_acc, b_max, b_sum, c, PRECISION: tl.constexpr):
    """Add one block of scores and values to the accumulator, running maximum and running sum."""
    b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * c)  # c > 0: the largest score stays the largest
    b_p = tl.exp2(b_s * c - b_max_new[:, None])
    b_rescale = tl.exp2(b_max - b_max_new)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision=PRECISION)
    return b_acc, b_max_new, b_sum


@jit
def attend_keys(
    b_q, p_k, p_v, stride_kl, stride_vl, L, c,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(o, lse) of one block of queries against all keys of its head; kernels/cross_attention.py also uses it."""
    b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    unmasked = L - L % BLOCK_L
    for _ in range(0, unmasked, BLOCK_L):  # only the last block is masked: this kernel is bound by the work on scores
        b_k = load_rows(p_k, stride_kl, BLOCK_L, K, BLOCK_L, BLOCK_K, False)
        b_v = load_rows(p_v, stride_vl, BLOCK_L, K, BLOCK_L, BLOCK_K, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_acc, b_max, b_sum = online_softmax_update(b_s, b_v, b_acc, b_max, b_sum, c, PRECISION)
        p_k += BLOCK_L * stride_kl  # advances the pointer, since an int32 offset could exceed 2^31 elements
        p_v += BLOCK_L * stride_vl
    if unmasked < L:
        b_k = load_rows(p_k, stride_kl, L - unmasked, K, BLOCK_L, BLOCK_K, True)
        b_v = load_rows(p_v, stride_vl, L - unmasked, K, BLOCK_L, BLOCK_K, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_s = tl.where((tl.arange(0, BLOCK_L) < L - unmasked)[None, :], b_s, float("-inf"))
        b_acc, b_max, b_sum = online_softmax_update(b_s, b_v, b_acc, b_max, b_sum, c, PRECISION)
    return b_acc / b_sum[:, None], b_max + tl.log2(b_sum)


@jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, M, N, L, scale,
    stride_qb, stride_qm, stride_qn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """o and lse of one block of queries."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // M, i_bh % M
    b_q = load_rows(
        q_ptr + i_b * stride_qb + i_h * stride_qm + i_n * stride_qn, stride_qn, N - i_n, K, BLOCK_N, BLOCK_K, True
    )
    b_o, b_lse = attend_keys(
        b_q, k_ptr + i_b * stride_kb + i_h * stride_km, v_ptr + i_b * stride_vb + i_h * stride_vm, stride_kl, stride_vl,
        L, in_base_two(scale), K, BLOCK_N, BLOCK_L, BLOCK_K, PRECISION,
    )  # fmt: skip
    store_rows(o_ptr + ((i_b * N + i_n) * M + i_h) * K, M * K, N - i_n, b_o, K, BLOCK_N, BLOCK_K)
    o_n = tl.arange(0, BLOCK_N)
    tl.store(lse_ptr + i_bh * N + i_n + o_n, b_lse, mask=o_n < N - i_n)


@jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, M, N, L, scale,
    stride_qb, stride_qm, stride_qn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    stride_ob, stride_om, stride_on, stride_dob, stride_dom, stride_don,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and delta for the other kernel."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // M, i_bh % M
    rows_left = N - i_n
    o_n = tl.arange(0, BLOCK_N)
    p_do = do_ptr + (i_b * stride_dob + i_h * stride_dom + i_n * stride_don)
    b_do = load_rows(p_do, stride_don, rows_left, K, BLOCK_N, BLOCK_K, True)
    p_o = o_ptr + (i_b * stride_ob + i_h * stride_om + i_n * stride_on)
    b_o = load_rows(p_o, stride_on, rows_left, K, BLOCK_N, BLOCK_K, True)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta_ptr + i_bh * N + i_n + o_n, b_delta, mask=o_n < rows_left)
    b_lse = tl.load(lse_ptr + i_bh * N + i_n + o_n, mask=o_n < rows_left, other=0.0)
    p_q = q_ptr + (i_b * stride_qb + i_h * stride_qm + i_n * stride_qn)
    b_q = load_rows(p_q, stride_qn, rows_left, K, BLOCK_N, BLOCK_K, True)
    p_k = k_ptr + (i_b * stride_kb + i_h * stride_km)
    p_v = v_ptr + (i_b * stride_vb + i_h * stride_vm)
    c = in_base_two(scale)
    b_dq = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for i_l in range(0, L, BLOCK_L):
        b_k = load_rows(p_k, stride_kl, L - i_l, K, BLOCK_L, BLOCK_K, True)
        b_v = load_rows(p_v, stride_vl, L - i_l, K, BLOCK_L, BLOCK_K, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.exp2(b_s * c - b_lse[:, None])
        # Keys beyond L have s = 0, and exp2(-lse) may overflow.
        b_p = tl.where((tl.arange(0, BLOCK_L) < L - i_l)[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        p_k += BLOCK_L * stride_kl
        p_v += BLOCK_L * stride_vl
    p_dq = dq_ptr + ((i_b * N + i_n) * M + i_h) * K
    store_rows(p_dq, M * K, rows_left, b_dq * scale, K, BLOCK_N, BLOCK_K)


@jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, M, N, L, scale,
    stride_qb, stride_qm, stride_qn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    stride_dob, stride_dom, stride_don,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys. Scores are transposed, (BLOCK_L, BLOCK_N), so that p^T and ds^T are left operands."""
    i_l = tl.program_id(0).to(tl.int64) * BLOCK_L
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // M, i_bh % M
    o_n = tl.arange(0, BLOCK_N)
    p_k = k_ptr + (i_b * stride_kb + i_h * stride_km + i_l * stride_kl)
    b_k = load_rows(p_k, stride_kl, L - i_l, K, BLOCK_L, BLOCK_K, True)
    p_v = v_ptr + (i_b * stride_vb + i_h * stride_vm + i_l * stride_vl)
    b_v = load_rows(p_v, stride_vl, L - i_l, K, BLOCK_L, BLOCK_K, True)
    p_q = q_ptr + (i_b * stride_qb + i_h * stride_qm)
    p_do = do_ptr + (i_b * stride_dob + i_h * stride_dom)
    p_lse = lse_ptr + i_bh * N
    p_delta = delta_ptr + i_bh * N
    c = in_base_two(scale)
    b_dk = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    b_dv = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    # Queries beyond N add nothing: their q and do are zero. Keys beyond L only affect rows that are not stored.
    for i_n in range(0, N, BLOCK_N):
        b_q = load_rows(p_q, stride_qn, N - i_n, K, BLOCK_N, BLOCK_K, True)
        b_do = load_rows(p_do, stride_don, N - i_n, K, BLOCK_N, BLOCK_K, True)
        b_lse = tl.load(p_lse + i_n + o_n, mask=o_n < N - i_n, other=0.0)
        b_delta = tl.load(p_delta + i_n + o_n, mask=o_n < N - i_n, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_p = tl.exp2(b_s * c - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        p_q += BLOCK_N * stride_qn
        p_do += BLOCK_N * stride_don
    o_out = ((i_b * L + i_l) * M + i_h) * K
    store_rows(dk_ptr + o_out, M * K, L - i_l, b_dk * scale, K, BLOCK_L, BLOCK_K)
    store_rows(dv_ptr + o_out, M * K, L - i_l, b_dv, K, BLOCK_L, BLOCK_K)


def head_constants(head_width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time constants that follow from the head width and dtype; block sizes come from tuning.py.

    Products of fp32 are computed as such, as in PyTorch. With tf32x3, Triton 3.6 gave wrong gradients and illegal memory
    accesses on an H200.
    """
    return {
        "K": head_width,
        "BLOCK_K": max(16, next_power_of_two(head_width)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def tuning_key(step: str, head_width: int, dtype: torch.dtype) -> str:
    """The key of the launch configuration of one step, such as "forward d32" or "dq fp32"."""
    width = max(32, next_power_of_two(head_width))
    return f"{step} fp32" if dtype == torch.float32 else f"{step} d{width}"


def rows_contiguous(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy if the kernels do not support its strides.

    The elements of a row must be adjacent, and rows close enough that the int32 offsets within a block do not overflow.
    """
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < MAX_ROW_STRIDE else tensor.contiguous()


def _empty_token_major(like: Tensor) -> Tensor:
    """An empty tensor of the shape of `like` with the memory layout (B, N, M, K), so that joining the heads is a view."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


@library_op("attention")
def attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse (B, M, N), the logarithm to base 2 of the sum of the exponentiated scores."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, queries, width = q.shape
    o, lse = attention_fake(q, k, v)
    config = tuning.launch_config("attention", tuning_key("forward", width, q.dtype), q.device)
    grid = (-(-queries // config.constants["BLOCK_N"]), batch * heads)
    _attention_fwd_kernel[grid](
        q, k, v, o, lse, heads, queries, k.shape[2], width**-0.5,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **head_constants(width, q.dtype), **config.launch(),
    )  # fmt: skip
    return o, lse


@attention_op.register_fake
def attention_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Empty o and lse."""
    return _empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@library_op("attention_backward")
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    do, q, k, v = rows_contiguous(do), rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    dq, dk, dv = attention_backward_fake(do, q, k, v, o, lse)
    delta = torch.empty_like(lse)
    sizes = (heads, queries, keys, width**-0.5)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    constants = head_constants(width, q.dtype)
    config = tuning.launch_config("attention", tuning_key("dq", width, q.dtype), q.device)
    _attention_bwd_dq_kernel[-(-queries // config.constants["BLOCK_N"]), batch * heads](
        q, k, v, o, do, lse, delta, dq, *sizes, *strides, *o.stride()[:3], *do.stride()[:3],
        **constants, **config.launch(),
    )  # fmt: skip
    config = tuning.launch_config("attention", tuning_key("dkdv", width, q.dtype), q.device)
    _attention_bwd_dkdv_kernel[-(-keys // config.constants["BLOCK_L"]), batch * heads](
        q, k, v, do, lse, delta, dk, dv, *sizes, *strides, *do.stride()[:3], **constants, **config.launch()
    )
    return dq, dk, dv


@attention_backward_op.register_fake
def attention_backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty dq, dk and dv."""
    return _empty_token_major(q), _empty_token_major(k), _empty_token_major(v)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward_op(do, *ctx.saved_tensors)


attention_op.register_autograd(_backward, setup_context=_setup_context)


def triton_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The Triton implementation."""
    dtype = compute_dtype(q)
    return attention_op(q.to(dtype), k.to(dtype), v.to(dtype))[0]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The implementation of xformers, whose tensors have the shape (B, N, M, K)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "triton": triton_attention,
    "xformers": xformers_attention,
    "sdpa": F.scaled_dot_product_attention,
    "reference": attention_reference,
}


def head_width_unsupported_reason(
    device: torch.device, dtype: torch.dtype, head_width: int, max_head_width: dict[torch.dtype, int]
) -> str | None:
    """Why a Triton kernel does not support heads of this width, None if it does. Registers can spill only on a GPU."""
    limit = max_head_width[dtype] if device.type == "cuda" else max(max_head_width.values())
    if head_width <= limit:
        return None
    return f"it supports head widths up to {limit} in {str(dtype).removeprefix('torch.')}, got {head_width}"


def backend_support(device: torch.device, dtype: torch.dtype, *, head_width: int = 32) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    PyTorch's attention comes first: on an NVIDIA H200 a denoising step of the default model takes the same time with `triton`.
    """
    triton_reason = triton_unsupported_reason(device, dtype)
    triton_reason = triton_reason or head_width_unsupported_reason(device, dtype, head_width, MAX_HEAD_WIDTH)
    xformers_reason = xformers_unsupported_reason(device, dtype)
    if device.type == "cpu":
        return {"sdpa": None, "reference": None, "xformers": xformers_reason, "triton": triton_reason}
    return {"sdpa": None, "triton": triton_reason, "xformers": xformers_reason, "reference": None}


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    steps = {"forward": _attention_fwd_kernel, "dq": _attention_bwd_dq_kernel, "dkdv": _attention_bwd_dkdv_kernel}
    widths = {torch.bfloat16: (32, 64, 96, 128), torch.float32: (32,)}
    return [
        attention_compile_case("attention", step, kernel, width, dtype, tuning_key(step, width, dtype))
        for dtype in widths
        for step, kernel in steps.items()
        for width in widths[dtype]
    ]


def attention_compile_case(
    name: str,
    step: str,
    kernel: Any,
    head_width: int,
    dtype: torch.dtype,
    key: str,
    constants: dict[str, Any] | None = None,
) -> CompileCase:
    """The ahead-of-time compile case of an attention kernel.

    Its arguments follow the names of this file: pointers end in `_ptr` and have the type `dtype`, except lse and delta, which
    are fp32 as are `scale` and `eps`; all other arguments are integers.

    Args:
        name: Name of the kernel in `DEFAULT_LAUNCH_CONFIGS`.
        step: Which of its launches, for the title.
        kernel: The Triton function.
        head_width: K.
        dtype: Dtype of the tensors.
        key: Key of the launch configuration.
        constants: Compile-time constants other than block sizes and those of `head_constants`.
    """
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    config = tuning.DEFAULT_LAUNCH_CONFIGS[name][key]
    known = {**head_constants(head_width, dtype), **(constants or {})}
    taken = {argument: value for argument, value in known.items() if argument in kernel.arg_names}
    signature = {
        argument: "*fp32" if argument in ("lse_ptr", "delta_ptr")
        else f"*{element}" if argument.endswith("_ptr")
        else "fp32" if argument in ("scale", "eps")
        else "i32"
        for argument in kernel.arg_names if argument not in taken and argument not in config.constants
    }  # fmt: skip
    strides = tuple(argument for argument in signature if argument.startswith("stride"))
    title = f"{name} {step} {element} d{head_width}"
    return CompileCase(
        title, kernel, signature, config, taken, strides, wide_loads=True, async_loads=config.num_stages > 1,
        tensor_cores=dtype != torch.float32,
    )  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v for every head.

    Args:
        q: (B, M, N, K).
        k: (B, M, L, K).
        v: (B, M, L, K).
        backend: "sdpa", "triton", "xformers" or "reference"; None for the first supported one.

    Returns:
        (B, M, N, K) in the dtype of `q`.

    Raises:
        ValueError: The shapes do not match.
        BackendError: `backend` is unsupported here.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "q, k and v must have shape (batch, heads, tokens, head width), equal except for the tokens of q, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    chosen = choose("attention", backend_support(q.device, compute_dtype(q), head_width=q.shape[-1]), backend)
    return IMPLEMENTATIONS[chosen](q, k, v)
