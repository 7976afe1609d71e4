"""Cross-attention block: layer norm, query projection, attention on given keys and values, output projection, residual.

    h = LayerNorm(x);  q = h w_q^T;  o = softmax(q k^T / sqrt(K)) v for every head;  y = x + o w_out^T + b_out

With `added`, the output of the block before it, x + added takes the place of x: the sum is part of the launches that read it.

Shapes: x, added, h, y (B, N, C); context_k, context_v (B or 1, M, L, K), with the heads already split, and batch 1 if all
samples share them; w_q, w_out (C, C); ln_weight, ln_bias, b_out (C,). B batch, N voxels as tokens, C = M K channels, M heads,
K head width, L context tokens (the 256 latents of the report). Keys and values are inputs because a sampler computes them once.

Fused into two launches. The first normalizes a block of tokens once, keeps it in registers, and computes query projection and
attention for one head after the other; the second is the output projection with bias and residual in its epilogue. h, q and
the scores are never written to memory. Plain PyTorch: 5 to 6 launches and 11 passes over a (B, N, C) tensor; here 2 launches
and 5 passes (x, o | o, x, y). `added` makes that 7 instead of 14. With few tokens the first launch divides the heads among more
programs, which then repeat the normalization.

Only the arguments are saved for the backward pass. It recomputes h, q and o, and consists of the backward kernels of attention
and plain matrix products.

Products are computed in the dtype of w_q on tensor cores; statistics, softmax, sums and epilogue in fp32. Under autocast the
matrices, keys and values are cast to autocast's dtype; x, the layer norm and the bias are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.kernels import tuning
from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.attention import (
    IMPLEMENTATIONS,
    attend_keys,
    attention_backward_fake,
    attention_backward_op,
    attention_compile_case,
    attention_op,
    attention_reference,
    head_constants,
    head_width_unsupported_reason,
    in_base_two,
    load_rows,
    rows_contiguous,
    store_rows,
)
from ccella_fast.kernels.backend import (
    BackendSupport,
    chained_products_unsupported_reason,
    choose,
    compute_dtype,
    jit,
    library_op,
    tl,
    triton_unsupported_reason,
    xformers_unsupported_reason,
)
from ccella_fast.kernels.layout import multiprocessor_count, next_power_of_two

MAX_CHANNELS = 512  # a block of tokens stays in registers; with more channels they spill
MAX_HEAD_WIDTH = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}


def cross_attention_reference(
    x: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    *,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    num_heads: int,
    eps: float = 1e-5,
    added: Tensor | None = None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention_reference,
) -> Tensor:
    """The plain PyTorch implementation; `attend` computes its attention."""
    x = x if added is None else x + added
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    q = split_heads(F.linear(h, w_q), num_heads)
    o = attend(q, context_k.expand(x.shape[0], -1, -1, -1), context_v.expand(x.shape[0], -1, -1, -1))
    return x + F.linear(o.transpose(1, 2).flatten(2), w_out, b_out)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, M, N, K), a view."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@jit
def _layer_norm_rows(
    p_x, added_ptr, o_added, weight_ptr, bias_ptr, stride, stride_added, rows_left, eps, like_ptr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """LayerNorm of BLOCK_N tokens as a tuple of (BLOCK_N, BLOCK_C) blocks in the element type of the pointer `like_ptr`.

    What is added to the tokens is at `added_ptr + o_added`, unless added_ptr is None.
    """
    o_c = tl.arange(0, BLOCK_C)
    b_xs = ()
    b_total = tl.zeros([BLOCK_N], tl.float32)
    for i_c in tl.static_range(0, C, BLOCK_C):
        b_x = load_rows(p_x + i_c, stride, rows_left, BLOCK_C, BLOCK_N, BLOCK_C, True)
        if added_ptr is not None:
            p_added = added_ptr + o_added + i_c
            b_added = load_rows(p_added, stride_added, rows_left, BLOCK_C, BLOCK_N, BLOCK_C, True)
            b_x = (b_x.to(tl.float32) + b_added.to(tl.float32)).to(b_x.dtype)
        b_xs = b_xs + (b_x,)  # type: ignore[assignment]
        b_total += tl.sum(b_x.to(tl.float32), 1)
    b_mean = b_total / C
    b_squares = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(len(b_xs)):
        b_centered = b_xs[i].to(tl.float32) - b_mean[:, None]
        b_squares += tl.sum(b_centered * b_centered, 1)
    b_rstd = tl.rsqrt(b_squares / C + eps)
    b_hs = ()
    for i in tl.static_range(len(b_xs)):
        b_weight = tl.load(weight_ptr + i * BLOCK_C + o_c).to(tl.float32)
        b_bias = tl.load(bias_ptr + i * BLOCK_C + o_c).to(tl.float32)
        b_h = (b_xs[i].to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
        b_hs = b_hs + (b_h.to(like_ptr.dtype.element_ty),)
    return b_hs


@jit(do_not_specialize=["heads_per_program"])
def _cross_attention_fwd_heads_kernel(
    x_ptr, added_ptr, ln_weight_ptr, ln_bias_ptr, w_q_ptr, k_ptr, v_ptr, o_ptr, M, N, L, heads_per_program, scale, eps,
    stride_xb, stride_xn, stride_addedb, stride_addedn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """o of one block of tokens and some heads: layer norm once, then query projection and attention of each head."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_head = tl.program_id(1) * heads_per_program
    i_b = tl.program_id(2).to(tl.int64)
    rows_left = N - i_n
    b_hs = _layer_norm_rows(
        x_ptr + (i_b * stride_xb + i_n * stride_xn), added_ptr, i_b * stride_addedb + i_n * stride_addedn, ln_weight_ptr,
        ln_bias_ptr, stride_xn, stride_addedn, rows_left, eps, w_q_ptr, C, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    p_k = k_ptr + i_b * stride_kb
    p_v = v_ptr + i_b * stride_vb
    p_o = o_ptr + (i_b * N + i_n) * C
    for i_h in range(first_head, min(first_head + heads_per_program, M)):
        b_q = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for i in tl.static_range(len(b_hs)):
            p_w = w_q_ptr + i_h * K * C + i * BLOCK_C
            b_w = load_rows(p_w, C, K, BLOCK_C, BLOCK_K, BLOCK_C, K != BLOCK_K)
            b_q = tl.dot(b_hs[i], tl.trans(b_w), b_q, input_precision=PRECISION)
        b_o, _ = attend_keys(
            b_q.to(w_q_ptr.dtype.element_ty), p_k + i_h * stride_km, p_v + i_h * stride_vm, stride_kl, stride_vl, L,
            in_base_two(scale), K, BLOCK_N, BLOCK_L, BLOCK_K, PRECISION,
        )  # fmt: skip
        store_rows(p_o + i_h * K, C, rows_left, b_o, K, BLOCK_N, BLOCK_K)


@jit
def _cross_attention_fwd_output_kernel(
    o_ptr, w_out_ptr, b_out_ptr, x_ptr, added_ptr, y_ptr, N, stride_xb, stride_xn, stride_addedb, stride_addedn,
    C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x (+ added) + o w_out^T + b_out for one block of tokens and BLOCK_O channels."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_o = tl.program_id(1) * BLOCK_O
    i_b = tl.program_id(2).to(tl.int64)
    rows_left = N - i_n
    p_o = o_ptr + (i_b * N + i_n) * C
    p_w = w_out_ptr + i_o * C
    b_acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for _ in range(0, C, BLOCK_C):
        b_o = load_rows(p_o, C, rows_left, BLOCK_C, BLOCK_N, BLOCK_C, True)
        b_w = load_rows(p_w, C, C - i_o, BLOCK_C, BLOCK_O, BLOCK_C, C % BLOCK_O != 0)
        b_acc = tl.dot(b_o, tl.trans(b_w), b_acc, input_precision=PRECISION)
        p_o += BLOCK_C
        p_w += BLOCK_C
    o_n = tl.arange(0, BLOCK_N)[:, None]
    o_c = i_o + tl.arange(0, BLOCK_O)[None, :]
    m_y = (o_n < rows_left) & (o_c < C)
    b_bias = tl.load(b_out_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    p_x = x_ptr + i_b * stride_xb + i_n * stride_xn + o_n * stride_xn + o_c
    b_x = tl.load(p_x, mask=m_y, other=0.0).to(tl.float32)
    if added_ptr is not None:
        p_added = added_ptr + i_b * stride_addedb + i_n * stride_addedn + o_n * stride_addedn + o_c
        b_x += tl.load(p_added, mask=m_y, other=0.0).to(tl.float32)
    p_y = y_ptr + (i_b * N + i_n) * C + o_n * C + o_c
    tl.store(p_y, (b_x + b_acc + b_bias).to(y_ptr.dtype.element_ty), mask=m_y)


def _heads_key(channels: int, head_width: int, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "heads fp32"
    width = max(32, next_power_of_two(head_width))
    return f"heads d{width} c{256 if width == 32 and channels <= 256 else 512}"


def _heads_per_program(heads: int, blocks: int, device: torch.device) -> int:
    """The most heads per program, equally many in all, with which every multiprocessor still has two programs.

    In the interpreter one program takes all heads. Each additional head saves one normalization of the same tokens.
    """
    programs = 1 if device.type == "cpu" else 2 * multiprocessor_count(device)
    most = max(1, min(heads, heads * blocks // programs))
    return max(each for each in range(1, most + 1) if heads % each == 0)


@library_op("cross_attention")
def cross_attention_op(
    x: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    num_heads: int,
    eps: float,
    added: Tensor | None,
) -> Tensor:
    """y. context_k and context_v must have the batch size of x and the dtype of w_q and w_out."""
    x, k, v = rows_contiguous(x), rows_contiguous(context_k), rows_contiguous(context_v)
    added = None if added is None else rows_contiguous(added)
    added_strides = (0, 0) if added is None else added.stride()[:2]
    w_q, w_out, ln_weight, ln_bias, b_out = (t.contiguous() for t in (w_q, w_out, ln_weight, ln_bias, b_out))
    batch, tokens, channels = x.shape
    width = channels // num_heads
    o = torch.empty(batch, tokens, channels, dtype=w_q.dtype, device=x.device)
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    constants = {"C": channels, **head_constants(width, w_q.dtype)}
    config = tuning.launch_config("cross_attention", _heads_key(channels, width, w_q.dtype), x.device)
    blocks = -(-tokens // config.constants["BLOCK_N"])
    heads = _heads_per_program(num_heads, blocks * batch, x.device)
    _cross_attention_fwd_heads_kernel[blocks, -(-num_heads // heads), batch](
        x, added, ln_weight, ln_bias, w_q, k, v, o, num_heads, tokens, k.shape[2], heads, width**-0.5, eps,
        *x.stride()[:2], *added_strides, *k.stride()[:3], *v.stride()[:3], **constants, **_launch_arguments(config, channels),
    )  # fmt: skip
    config = tuning.launch_config("cross_attention", "output" + " fp32" * (w_q.dtype == torch.float32), x.device)
    blocks = -(-tokens // config.constants["BLOCK_N"])
    _cross_attention_fwd_output_kernel[blocks, -(-channels // config.constants["BLOCK_O"]), batch](
        o, w_out, b_out, x, added, y, tokens, *x.stride()[:2], *added_strides, C=channels, PRECISION=constants["PRECISION"],
        **_launch_arguments(config, channels),
    )  # fmt: skip
    return y


def _launch_arguments(config: tuning.LaunchConfig, channels: int) -> dict[str, int]:
    """The arguments of a launch, with a BLOCK_C that divides the channels, so that no block of channels needs a mask."""
    return {**config.launch(), "BLOCK_C": math.gcd(channels, config.constants["BLOCK_C"])}


@cross_attention_op.register_fake
def _cross_attention_fake(
    x: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    num_heads: int,
    eps: float,
    added: Tensor | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@library_op("cross_attention_backward")
def cross_attention_backward_op(
    dy: Tensor,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    num_heads: int,
    eps: float,
    added: Tensor | None,
) -> list[Tensor]:
    """Gradients of the eight tensors after `dy`, in their order and dtypes; that of `added` is that of x."""
    channels = x.shape[-1:]
    wide = torch.promote_types(x.dtype, ln_weight.dtype)
    tensors = ((x if added is None else x + added).to(wide), ln_weight.to(wide), ln_bias.to(wide))
    h, mean, rstd = torch.native_layer_norm(tensors[0], channels, *tensors[1:], eps)
    h = h.to(w_q.dtype)
    q = split_heads(F.linear(h, w_q), num_heads)
    o, lse = attention_op(q, k, v)

    dy_rows = dy.to(w_q.dtype).flatten(0, 1)
    dw_out = dy_rows.T @ _join_heads(o)
    db_out = dy.sum((0, 1), dtype=torch.promote_types(dy.dtype, torch.float32)).to(b_out.dtype)
    do = split_heads((dy_rows @ w_out).view(x.shape), num_heads)
    dq, dk, dv = attention_backward_op(do, q, k, v, o, lse)
    dq_rows = _join_heads(dq)
    dw_q = dq_rows.T @ h.flatten(0, 1)
    dh = (dq_rows @ w_q).view(x.shape).to(wide)
    dx, dln_weight, dln_bias = torch.ops.aten.native_layer_norm_backward(
        dh, tensors[0], channels, mean, rstd, *tensors[1:], [True, True, True]
    )
    dln_weight, dln_bias = dln_weight.to(ln_weight.dtype), dln_bias.to(ln_bias.dtype)
    return [(dy + dx).to(x.dtype).contiguous(), dk, dv, dln_weight, dln_bias, dw_q, dw_out, db_out]


def _join_heads(heads: Tensor) -> Tensor:
    """(B, M, N, K) in the memory layout of attention's output -> (B N, C), a view."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


@cross_attention_backward_op.register_fake
def _cross_attention_backward_fake(dy: Tensor, x: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    _, dk, dv = attention_backward_fake(k, k, k, v, k, k)
    return [x.new_empty(x.shape), dk, dv, *(parameter.new_empty(parameter.shape) for parameter in rest[:5])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.eps, added = inputs
    ctx.save_for_backward(*tensors, added)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, added = ctx.saved_tensors
    gradients = cross_attention_backward_op(dy, *tensors, ctx.num_heads, ctx.eps, added)
    return (*gradients, None, None, None if added is None else gradients[0].to(added.dtype))


cross_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _triton_unsupported_reason(device: torch.device, dtype: torch.dtype, channels: int, head_width: int) -> str | None:
    reason = triton_unsupported_reason(device, dtype) or chained_products_unsupported_reason(device)
    if reason is not None:
        return reason
    if channels > MAX_CHANNELS or channels % 16:
        return f"it supports multiples of 16 up to {MAX_CHANNELS} channels, got {channels}"
    return head_width_unsupported_reason(device, dtype, head_width, MAX_HEAD_WIDTH)


def backend_support(
    device: torch.device, dtype: torch.dtype, *, channels: int = 256, head_width: int = 32
) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    On a GPU the Triton kernels come first because they need the fewest launches and move the least memory, by count and not yet
    by measurement. The other backends are the plain block around that attention.
    """
    triton_reason = _triton_unsupported_reason(device, dtype, channels, head_width)
    xformers_reason = xformers_unsupported_reason(device, dtype)
    if device.type == "cpu":
        return {"sdpa": None, "reference": None, "xformers": xformers_reason, "triton": triton_reason}
    return {"triton": triton_reason, "sdpa": None, "xformers": xformers_reason, "reference": None}


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""

    def heads(channels: int, head_width: int, dtype: torch.dtype = torch.bfloat16) -> CompileCase:
        key = _heads_key(channels, head_width, dtype)
        step = f"heads c{channels}"
        return attention_compile_case(
            "cross_attention", step, _cross_attention_fwd_heads_kernel, head_width, dtype, key, {"C": channels}
        )

    sizes = [(256, 32), (512, 32), (512, 64), (512, 128)]
    outputs = [
        attention_compile_case(
            "cross_attention", "output c256", _cross_attention_fwd_output_kernel, 32, dtype, key, {"C": 256}
        )
        for dtype, key in ((torch.bfloat16, "output"), (torch.float32, "output fp32"))
    ]
    singles = [heads(channels, 32, torch.float32) for channels in (256, 512)]
    return [*(heads(*size) for size in sizes), *singles, *outputs]


def _check_parameters(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, w_q: Tensor, w_out: Tensor, b_out: Tensor, num_heads: int
) -> None:
    if x.ndim != 3 or x.shape[2] % num_heads:
        raise ValueError(
            f"x must have shape (batch, tokens, channels) with channels divisible by {num_heads} heads, "
            f"got {tuple(x.shape)}"
        )
    channels = x.shape[2]
    given = {"ln_weight": ln_weight, "ln_bias": ln_bias, "b_out": b_out, "w_q": w_q, "w_out": w_out}
    for name, tensor in given.items():
        needed = (channels, channels) if name.startswith("w_") else (channels,)
        if tensor.shape != needed:
            raise ValueError(f"{name} must have shape {needed} for {channels} channels, got {tuple(tensor.shape)}")


def cross_attention(
    x: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    *,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w_q: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    num_heads: int,
    eps: float = 1e-5,
    added: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the cross-attention block with its residual.

    Args:
        x: (B, N, C).
        context_k: (B or 1, M, L, K).
        context_v: (B or 1, M, L, K).
        ln_weight: (C,).
        ln_bias: (C,).
        w_q: (C, C).
        w_out: (C, C).
        b_out: (C,).
        num_heads: M.
        eps: Added to the variance of the layer norm.
        added: (B, N, C), which is added to x first; None for nothing.
        backend: "triton", or "sdpa", "xformers" or "reference" for the plain block with that attention; None for the first
            supported one.

    Returns:
        (B, N, C) in the dtype of `x`, or that of x + added.

    Raises:
        ValueError: The shapes do not match.
        BackendError: `backend` is unsupported here.
    """
    _check_parameters(x, ln_weight, ln_bias, w_q, w_out, b_out, num_heads)
    batch, _, channels = x.shape
    width = channels // num_heads
    if context_k.shape[1::2] != (num_heads, width) or context_v.shape != context_k.shape:
        raise ValueError(
            f"context_k and context_v must have shape (batch, {num_heads}, keys, {width}) for {channels} channels and "
            f"{num_heads} heads, got {tuple(context_k.shape)} and {tuple(context_v.shape)}"
        )
    if context_k.shape[0] not in (1, batch):
        raise ValueError(f"the batch size of context_k must be 1 or that of x ({batch}), got {context_k.shape[0]}")
    if added is not None:
        if added.shape != x.shape:
            raise ValueError(f"added must have the shape of x, {tuple(x.shape)}, got {tuple(added.shape)}")
        x = x.to(torch.promote_types(x.dtype, added.dtype))
    dtype = compute_dtype(x)
    chosen = choose("cross_attention", backend_support(x.device, dtype, channels=channels, head_width=width), backend)
    if chosen == "triton":
        k, v = (tensor.expand(batch, -1, -1, -1).to(dtype) for tensor in (context_k, context_v))
        matrices = w_q.to(dtype), w_out.to(dtype)
        return cross_attention_op(x, k, v, ln_weight, ln_bias, *matrices, b_out, num_heads, eps, added)
    return cross_attention_reference(
        x,
        context_k,
        context_v,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        w_q=w_q,
        w_out=w_out,
        b_out=b_out,
        num_heads=num_heads,
        eps=eps,
        added=added,
        attend=IMPLEMENTATIONS[chosen],
    )
