"""Softmax attention of every head, without a mask: o = softmax(q k^T / sqrt(K)) v.

Shapes: q, o (B, M, N, K), k and v (B, M, L, K); B batch, M heads, N queries, L keys, K head width.

Fused, after Dao (FlashAttention-2, arXiv 2307.08691): one pass over the keys with a running maximum m and sum l, in base 2, so
that the scale rides on the exponent's multiply-add for free:

    p = exp2(c s - m),  s = q k^T,  c = log2(e) / sqrt(K);   o = p v / l;   lse = m + log2 l

The N x L scores never reach memory: 2 (N + L) K elements a head move in place of 2 N L more, in one launch in place of four.
Saved for the backward pass: q, k, v, o and lse (B, M, N). It recomputes p, in two launches without atomics, so the same input
gives the same bits; delta is a by-product of the first:

    delta = rowsum(o do);  dp = do v^T;  ds = p (dp - delta);   dq = ds k / sqrt(K);   dk = ds^T q / sqrt(K);   dv = p^T do

At K = 32 a score costs 128 FLOP and one exp2: the exponential is the limit, not the tensor cores.

Inside: products of q, k, v, p and ds in the dtype of q on tensor cores (fp32: three TF32 products), everything else in fp32.
Autocast: q, k and v are taken in autocast's dtype, as PyTorch's attention takes them.
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
    triton,
    triton_refusal,
    xformers_refusal,
)

MAX_HEAD_WIDTH = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}  # beyond it, registers spill
MAX_ROW_STRIDE = 2**23  # times the 256 rows of the largest block: 2^31


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in fp32 (float64, if given): (B, M, N, K), rounded once to the dtype of `q`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v.to(wide)).to(q.dtype)


@jit
def load_rows(
    ptr, stride, left, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """(ROWS, BLOCK_K) of a matrix with rows of K: zeros beyond K and, where RAGGED, beyond the `left` rows that are left."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_K)
    at = ptr + row[:, None] * stride + col[None, :]
    if RAGGED:
        block = tl.load(at, mask=(row < left)[:, None] & (col < K)[None, :], other=0.0)
    elif K != BLOCK_K:
        block = tl.load(at, mask=(col < K)[None, :], other=0.0)
    else:
        block = tl.load(at)
    return block


@jit
def store_rows(ptr, stride, left, block, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_K)
    at = ptr + row[:, None] * stride + col[None, :]
    tl.store(at, block.to(ptr.dtype.element_ty), mask=(row < left)[:, None] & (col < K)[None, :])


@jit
def absorb(s, v, acc, top, total, c, PRECISION: tl.constexpr):
    """One block of scores and values into the running sum, maximum and total."""
    top_new = tl.maximum(top, tl.max(s, 1) * c)  # c > 0: the largest score stays the largest
    p = tl.exp2(s * c - top_new[:, None])
    shrink = tl.exp2(top - top_new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top_new, total


@jit
def attend_keys(
    q, k_ptr, v_ptr, stride_kl, stride_vl, L, c,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys of its head: (o, lse). Also the heart of kernels/cross_attention.py."""
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    whole = L - L % BLOCK_L
    for _ in range(0, whole, BLOCK_L):  # no mask but in the last block: the scores are what this kernel is bound by
        k = load_rows(k_ptr, stride_kl, BLOCK_L, K, BLOCK_L, BLOCK_K, False)
        v = load_rows(v_ptr, stride_vl, BLOCK_L, K, BLOCK_L, BLOCK_K, False)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        acc, top, total = absorb(s, v, acc, top, total, c, PRECISION)
        k_ptr += BLOCK_L * stride_kl  # a pointer that walks, not an offset that grows: it may pass 2^31 elements
        v_ptr += BLOCK_L * stride_vl
    if whole < L:
        k = load_rows(k_ptr, stride_kl, L - whole, K, BLOCK_L, BLOCK_K, True)
        v = load_rows(v_ptr, stride_vl, L - whole, K, BLOCK_L, BLOCK_K, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where((tl.arange(0, BLOCK_L) < L - whole)[None, :], s, float("-inf"))
        acc, top, total = absorb(s, v, acc, top, total, c, PRECISION)
    return acc / total[:, None], top + tl.log2(total)


@jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, M, N, L, scale,
    stride_qb, stride_qm, stride_qn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    head = tl.program_id(1).to(tl.int64)
    b, h = head // M, head % M
    q = load_rows(
        q_ptr + b * stride_qb + h * stride_qm + start * stride_qn, stride_qn, N - start, K, BLOCK_N, BLOCK_K, True
    )
    o, lse = attend_keys(
        q, k_ptr + b * stride_kb + h * stride_km, v_ptr + b * stride_vb + h * stride_vm, stride_kl, stride_vl, L,
        scale * 1.4426950408889634, K, BLOCK_N, BLOCK_L, BLOCK_K, PRECISION,
    )  # fmt: skip
    store_rows(o_ptr + ((b * N + start) * M + h) * K, M * K, N - start, o, K, BLOCK_N, BLOCK_K)
    row = tl.arange(0, BLOCK_N)
    tl.store(lse_ptr + head * N + start + row, lse, mask=row < N - start)


@jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, M, N, L, scale,
    stride_qb, stride_qm, stride_qn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    stride_ob, stride_om, stride_on, stride_db, stride_dm, stride_dn,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and delta for the other kernel."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    head = tl.program_id(1).to(tl.int64)
    b, h = head // M, head % M
    left = N - start
    row = tl.arange(0, BLOCK_N)
    do_ptr += b * stride_db + h * stride_dm + start * stride_dn
    do = load_rows(do_ptr, stride_dn, left, K, BLOCK_N, BLOCK_K, True)
    o_ptr += b * stride_ob + h * stride_om + start * stride_on
    o = load_rows(o_ptr, stride_on, left, K, BLOCK_N, BLOCK_K, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head * N + start + row, delta, mask=row < left)
    lse = tl.load(lse_ptr + head * N + start + row, mask=row < left, other=0.0)
    q_ptr += b * stride_qb + h * stride_qm + start * stride_qn
    q = load_rows(q_ptr, stride_qn, left, K, BLOCK_N, BLOCK_K, True)
    k_ptr += b * stride_kb + h * stride_km
    v_ptr += b * stride_vb + h * stride_vm
    c = scale * 1.4426950408889634
    dq = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for j in range(0, L, BLOCK_L):
        k = load_rows(k_ptr, stride_kl, L - j, K, BLOCK_L, BLOCK_K, True)
        v = load_rows(v_ptr, stride_vl, L - j, K, BLOCK_L, BLOCK_K, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * c - lse[:, None])
        # A key that is not there has s = 0, and exp2(-lse) may overflow.
        p = tl.where((tl.arange(0, BLOCK_L) < L - j)[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_L * stride_kl
        v_ptr += BLOCK_L * stride_vl
    store_rows(dq_ptr + ((b * N + start) * M + h) * K, M * K, left, dq * scale, K, BLOCK_N, BLOCK_K)


@jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, M, N, L, scale,
    stride_qb, stride_qm, stride_qn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    stride_db, stride_dm, stride_dn,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys. Scores are transposed, (BLOCK_L, BLOCK_N): p^T and ds^T are then left operands."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    head = tl.program_id(1).to(tl.int64)
    b, h = head // M, head % M
    row = tl.arange(0, BLOCK_N)
    k_ptr += b * stride_kb + h * stride_km + start * stride_kl
    k = load_rows(k_ptr, stride_kl, L - start, K, BLOCK_L, BLOCK_K, True)
    v_ptr += b * stride_vb + h * stride_vm + start * stride_vl
    v = load_rows(v_ptr, stride_vl, L - start, K, BLOCK_L, BLOCK_K, True)
    q_ptr += b * stride_qb + h * stride_qm
    do_ptr += b * stride_db + h * stride_dm
    lse_ptr += head * N
    delta_ptr += head * N
    c = scale * 1.4426950408889634
    dk = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    # Queries that are not there add nothing: their q and do are zero. Keys that are not there fill rows that are not stored.
    for i in range(0, N, BLOCK_N):
        q = load_rows(q_ptr, stride_qn, N - i, K, BLOCK_N, BLOCK_K, True)
        do = load_rows(do_ptr, stride_dn, N - i, K, BLOCK_N, BLOCK_K, True)
        lse = tl.load(lse_ptr + i + row, mask=row < N - i, other=0.0)
        delta = tl.load(delta_ptr + i + row, mask=row < N - i, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * c - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_N * stride_qn
        do_ptr += BLOCK_N * stride_dn
    at = ((b * L + start) * M + h) * K
    store_rows(dk_ptr + at, M * K, L - start, dk * scale, K, BLOCK_L, BLOCK_K)
    store_rows(dv_ptr + at, M * K, L - start, dv, K, BLOCK_L, BLOCK_K)


def head_constants(head_width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants that sizes and dtype settle; block sizes come from tuning.py."""
    return {
        "K": head_width,
        "BLOCK_K": max(16, triton.next_power_of_2(head_width)),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def tuning_key(step: str, head_width: int, dtype: torch.dtype) -> str:
    """Such as "forward d32" or "dq fp32"."""
    width = max(32, triton.next_power_of_2(head_width))
    return f"{step} fp32" if dtype == torch.float32 else f"{step} d{width}"


def rows_contiguous(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where a kernel cannot walk it: row elements apart, or rows so far apart that the offsets within a
    block, which are int32, would overflow."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < MAX_ROW_STRIDE else tensor.contiguous()


def _empty(like: Tensor) -> Tensor:
    """Laid out as tokens, (B, N, M, K), so that joining the heads afterwards is a view."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


@library_op("attention")
def attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse); lse (B, M, N) in base 2."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, queries, width = q.shape
    o, lse = attention_fake(q, k, v)
    config = tuning.launch_config("attention", tuning_key("forward", width, q.dtype), q.device)
    grid = (triton.cdiv(queries, config.constants["BLOCK_N"]), batch * heads)
    _attention_fwd_kernel[grid](
        q, k, v, o, lse, heads, queries, k.shape[2], width**-0.5,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **head_constants(width, q.dtype), **config.launch(),
    )  # fmt: skip
    return o, lse


@attention_op.register_fake
def attention_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@library_op("attention_backward")
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    do, q, k, v = rows_contiguous(do), rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    dq, dk, dv = attention_backward_fake(do, q, k, v, o, lse)
    delta = torch.empty_like(lse)
    sizes = (heads, queries, keys, width**-0.5)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    constants = head_constants(width, q.dtype)
    config = tuning.launch_config("attention", tuning_key("dq", width, q.dtype), q.device)
    _attention_bwd_dq_kernel[triton.cdiv(queries, config.constants["BLOCK_N"]), batch * heads](
        q, k, v, o, do, lse, delta, dq, *sizes, *strides, *o.stride()[:3], *do.stride()[:3],
        **constants, **config.launch(),
    )  # fmt: skip
    config = tuning.launch_config("attention", tuning_key("dkdv", width, q.dtype), q.device)
    _attention_bwd_dkdv_kernel[triton.cdiv(keys, config.constants["BLOCK_L"]), batch * heads](
        q, k, v, do, lse, delta, dk, dv, *sizes, *strides, *do.stride()[:3], **constants, **config.launch()
    )
    return dq, dk, dv


@attention_backward_op.register_fake
def attention_backward_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward_op(do, *ctx.saved_tensors)


attention_op.register_autograd(_backward, setup_context=_save)


def triton_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = compute_dtype(q)
    return attention_op(q.to(dtype), k.to(dtype), v.to(dtype))[0]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers keeps the heads behind the tokens: (B, N, M, K)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "triton": triton_attention,
    "xformers": xformers_attention,
    "sdpa": F.scaled_dot_product_attention,
    "reference": attention_reference,
}


def head_width_refusal(
    device: torch.device, dtype: torch.dtype, head_width: int, widest: dict[torch.dtype, int]
) -> str | None:
    """Why heads are too wide for a Triton kernel; None if they are not. Only a GPU has registers that could spill."""
    limit = widest[dtype] if device.type == "cuda" else max(widest.values())
    if head_width <= limit:
        return None
    return f"it takes heads of up to {limit} in {str(dtype).removeprefix('torch.')}, not {head_width}"


def backend_support(device: torch.device, dtype: torch.dtype, *, head_width: int = 32) -> BackendSupport:
    """Implementations in order of preference. PyTorch's goes first: ours has not been measured on a GPU yet."""
    ours = triton_refusal(device, dtype) or head_width_refusal(device, dtype, head_width, MAX_HEAD_WIDTH)
    theirs = xformers_refusal(device, dtype)
    if device.type == "cpu":
        return {"sdpa": None, "reference": None, "xformers": theirs, "triton": ours}
    return {"sdpa": None, "triton": ours, "xformers": theirs, "reference": None}


def aot_cases() -> list[CompileCase]:
    steps = {"forward": _attention_fwd_kernel, "dq": _attention_bwd_dq_kernel, "dkdv": _attention_bwd_dkdv_kernel}
    widths = {torch.bfloat16: (32, 64, 96, 128), torch.float32: (64,)}
    return [
        aot_case("attention", step, kernel, width, dtype, tuning_key(step, width, dtype))
        for dtype in widths
        for step, kernel in steps.items()
        for width in widths[dtype]
    ]


def aot_case(
    name: str,
    step: str,
    kernel: Any,
    head_width: int,
    dtype: torch.dtype,
    key: str,
    constants: dict[str, Any] | None = None,
) -> CompileCase:
    """Of a kernel named by this file's rules: x_ptr tensors of `dtype`, fp32 lse, delta and scalars, the rest integers."""
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    config = tuning.DEFAULT_LAUNCH_CONFIGS[name][key]
    settled = {**head_constants(head_width, dtype), **(constants or {})}
    settled = {argument: value for argument, value in settled.items() if argument in kernel.arg_names}
    signature = {
        argument: "*fp32" if argument in ("lse_ptr", "delta_ptr")
        else f"*{element}" if argument.endswith("_ptr")
        else "fp32" if argument in ("scale", "eps")
        else "i32"
        for argument in kernel.arg_names if argument not in settled and argument not in config.constants
    }  # fmt: skip
    strides = tuple(argument for argument in signature if argument.startswith("stride"))
    return CompileCase(
        f"{name} {step} {element} d{head_width}", kernel, signature, config, settled, strides, tensor_cores=True
    )


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, M, N, K), in the dtype of `q`. Self-attention and cross-attention differ only in where k and v come from.

    backend: one of `IMPLEMENTATIONS`, None for the dispatcher's choice. Raises ValueError where the shapes do not fit each
    other, BackendError where `backend` cannot run."""
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: (batch, heads, tokens, head width) is needed, "
            "the same but for the tokens of q"
        )
    chosen = choose("attention", backend_support(q.device, compute_dtype(q), head_width=q.shape[-1]), backend)
    return IMPLEMENTATIONS[chosen](q, k, v)
