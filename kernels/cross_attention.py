"""Cross-attention block: layer norm, query projection, attention on given keys and values, output projection, residual.

    h = LayerNorm(x);  q = h w_q^T;  o = softmax(q k^T / sqrt(K)) v for every head;  y = x + o w_out^T + b_out

Shapes: x, h, y (B, N, C); context_k, context_v (B or 1, M, L, K), heads already split, batch 1: the same for all samples;
w_q, w_out (C, C); ln_weight, ln_bias, b_out (C,). B batch, N voxels as tokens, C = M K channels, M heads, K head width,
L context tokens (the 256 latents of the report). Keys and values are given because a sampler computes them once.

Fused into two launches. The first normalises a block of tokens once, keeps it on the chip, and takes query projection and
attention of one head after the other; the second is the output projection with bias and residual in its epilogue. h, q and the
scores never reach memory. Plain PyTorch: 5 to 6 launches and 11 passes over a (B, N, C) tensor; here 2 and 5 (x, o | o, x, y).
Where there are few tokens the first launch splits the heads over more programs, which then repeat the normalisation.

Saved for the backward pass: the arguments alone. It recomputes h, q and o, and is made of attention's backward kernels and
plain matrix products.

Inside: products in the dtype of w_q on tensor cores, statistics, softmax, sums and epilogue in fp32.
Autocast: the matrices, keys and values are taken in autocast's dtype; x, the layer norm and the bias as they are.
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
    aot_case,
    attend_keys,
    attention_backward_fake,
    attention_backward_op,
    attention_op,
    attention_reference,
    head_constants,
    head_width_refusal,
    load_rows,
    rows_contiguous,
    store_rows,
)
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

MAX_CHANNELS = 512  # of a block of tokens that stays on the chip; beyond it, registers spill
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
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention_reference,
) -> Tensor:
    """The block in plain PyTorch; `attend` is the attention inside."""
    h = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    q = split_heads(F.linear(h, w_q), num_heads)
    o = attend(q, context_k.expand(x.shape[0], -1, -1, -1), context_v.expand(x.shape[0], -1, -1, -1))
    return x + F.linear(o.transpose(1, 2).flatten(2), w_out, b_out)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, M, N, K), a view."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@jit
def _normalised_rows(
    x_ptr, weight_ptr, bias_ptr, stride, left, eps, like,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """LayerNorm of BLOCK_N tokens as a tuple of (BLOCK_N, BLOCK_C) pieces in the type behind the pointer `like`."""
    col = tl.arange(0, BLOCK_C)
    pieces = ()
    total = tl.zeros([BLOCK_N], tl.float32)
    for c in tl.static_range(0, C, BLOCK_C):
        x = load_rows(x_ptr + c, stride, left, BLOCK_C, BLOCK_N, BLOCK_C, True)
        pieces = pieces + (x,)  # type: ignore[assignment]
        total += tl.sum(x.to(tl.float32), 1)
    mean = total / C
    squares = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(len(pieces)):
        centred = pieces[i].to(tl.float32) - mean[:, None]
        squares += tl.sum(centred * centred, 1)
    rstd = tl.rsqrt(squares / C + eps)
    normalised = ()
    for i in tl.static_range(len(pieces)):
        weight = tl.load(weight_ptr + i * BLOCK_C + col).to(tl.float32)
        bias = tl.load(bias_ptr + i * BLOCK_C + col).to(tl.float32)
        h = (pieces[i].to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        normalised = normalised + (h.to(like.dtype.element_ty),)
    return normalised


@jit
def _cross_attention_heads_kernel(
    x_ptr, ln_weight_ptr, ln_bias_ptr, w_q_ptr, k_ptr, v_ptr, o_ptr, M, N, L, heads, scale, eps,
    stride_xb, stride_xn, stride_kb, stride_km, stride_kl, stride_vb, stride_vm, stride_vl,
    C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """o of one block of tokens and `heads` heads: layer norm once, then query projection and attention of each head."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    first = tl.program_id(1) * heads
    b = tl.program_id(2).to(tl.int64)
    left = N - start
    x_ptr += b * stride_xb + start * stride_xn
    pieces = _normalised_rows(
        x_ptr, ln_weight_ptr, ln_bias_ptr, stride_xn, left, eps, w_q_ptr, C, BLOCK_N, BLOCK_C
    )  # fmt: skip
    k_ptr += b * stride_kb
    v_ptr += b * stride_vb
    o_ptr += (b * N + start) * C
    for h in range(first, min(first + heads, M)):
        q = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for i in tl.static_range(len(pieces)):
            w_at = w_q_ptr + h * K * C + i * BLOCK_C
            w = load_rows(w_at, C, K, BLOCK_C, BLOCK_K, BLOCK_C, K != BLOCK_K)
            q = tl.dot(pieces[i], tl.trans(w), q, input_precision=PRECISION)
        o, _ = attend_keys(
            q.to(w_q_ptr.dtype.element_ty), k_ptr + h * stride_km, v_ptr + h * stride_vm, stride_kl, stride_vl, L,
            scale * 1.4426950408889634, K, BLOCK_N, BLOCK_L, BLOCK_K, PRECISION,
        )  # fmt: skip
        store_rows(o_ptr + h * K, C, left, o, K, BLOCK_N, BLOCK_K)


@jit
def _cross_attention_output_kernel(
    o_ptr, w_out_ptr, b_out_ptr, x_ptr, y_ptr, N, stride_xb, stride_xn,
    C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x + o w_out^T + b_out, for one block of tokens and BLOCK_O channels."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    first = tl.program_id(1) * BLOCK_O
    b = tl.program_id(2).to(tl.int64)
    left = N - start
    o_ptr += (b * N + start) * C
    w_out_ptr += first * C
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for _ in range(0, C, BLOCK_C):
        o = load_rows(o_ptr, C, left, BLOCK_C, BLOCK_N, BLOCK_C, True)
        w = load_rows(w_out_ptr, C, C - first, BLOCK_C, BLOCK_O, BLOCK_C, C % BLOCK_O != 0)
        acc = tl.dot(o, tl.trans(w), acc, input_precision=PRECISION)
        o_ptr += BLOCK_C
        w_out_ptr += BLOCK_C
    row = tl.arange(0, BLOCK_N)[:, None]
    col = first + tl.arange(0, BLOCK_O)[None, :]
    keep = (row < left) & (col < C)
    bias = tl.load(b_out_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    x_at = x_ptr + b * stride_xb + start * stride_xn + row * stride_xn + col
    x = tl.load(x_at, mask=keep, other=0.0).to(tl.float32)
    y_at = y_ptr + (b * N + start) * C + row * C + col
    tl.store(y_at, (x + acc + bias).to(y_ptr.dtype.element_ty), mask=keep)


def _heads_key(channels: int, head_width: int, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "heads fp32"
    width = max(32, triton.next_power_of_2(head_width))
    return f"heads d{width} c{256 if width == 32 and channels <= 256 else 512}"


def _heads_per_program(heads: int, blocks: int, device: torch.device) -> int:
    """As many as still give every multiprocessor two programs: each one more saves a normalisation of the same tokens."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(heads, heads * blocks // wanted))


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
) -> Tensor:
    """y; context_k and context_v with the batch of x, in the dtype of w_q and w_out."""
    x, k, v = rows_contiguous(x), rows_contiguous(context_k), rows_contiguous(context_v)
    w_q, w_out, ln_weight, ln_bias, b_out = (t.contiguous() for t in (w_q, w_out, ln_weight, ln_bias, b_out))
    batch, tokens, channels = x.shape
    width = channels // num_heads
    o = torch.empty(batch, tokens, channels, dtype=w_q.dtype, device=x.device)
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    constants = {"C": channels, **head_constants(width, w_q.dtype)}
    config = tuning.launch_config("cross_attention", _heads_key(channels, width, w_q.dtype), x.device)
    blocks = triton.cdiv(tokens, config.constants["BLOCK_N"])
    heads = _heads_per_program(num_heads, blocks * batch, x.device)
    _cross_attention_heads_kernel[blocks, triton.cdiv(num_heads, heads), batch](
        x, ln_weight, ln_bias, w_q, k, v, o, num_heads, tokens, k.shape[2], heads, width**-0.5, eps,
        *x.stride()[:2], *k.stride()[:3], *v.stride()[:3], **constants, **_launch(config, channels),
    )  # fmt: skip
    config = tuning.launch_config("cross_attention", "output" + " fp32" * (w_q.dtype == torch.float32), x.device)
    blocks = triton.cdiv(tokens, config.constants["BLOCK_N"])
    _cross_attention_output_kernel[blocks, triton.cdiv(channels, config.constants["BLOCK_O"]), batch](
        o, w_out, b_out, x, y, tokens, *x.stride()[:2], C=channels, PRECISION=constants["PRECISION"],
        **_launch(config, channels),
    )  # fmt: skip
    return y


def _launch(config: tuning.LaunchConfig, channels: int) -> dict[str, int]:
    """The channels are taken in pieces that divide them: no piece needs a mask."""
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
) -> list[Tensor]:
    """Gradients of the eight tensors, in their order and dtypes."""
    channels = x.shape[-1:]
    wide = torch.promote_types(x.dtype, ln_weight.dtype)
    tensors = (x.to(wide), ln_weight.to(wide), ln_bias.to(wide))
    h, mean, rstd = torch.native_layer_norm(tensors[0], channels, *tensors[1:], eps)
    h = h.to(w_q.dtype)
    q = split_heads(F.linear(h, w_q), num_heads)
    o, lse = attention_op(q, k, v)

    dy_rows = dy.to(w_q.dtype).flatten(0, 1)
    dw_out = dy_rows.T @ _rows(o)
    db_out = dy.sum((0, 1), dtype=torch.promote_types(dy.dtype, torch.float32)).to(b_out.dtype)
    do = split_heads((dy_rows @ w_out).view(x.shape), num_heads)
    dq, dk, dv = attention_backward_op(do, q, k, v, o, lse)
    dq_rows = _rows(dq)
    dw_q = dq_rows.T @ h.flatten(0, 1)
    dh = (dq_rows @ w_q).view(x.shape).to(wide)
    dx, dln_weight, dln_bias = torch.ops.aten.native_layer_norm_backward(
        dh, tensors[0], channels, mean, rstd, *tensors[1:], [True, True, True]
    )
    dln_weight, dln_bias = dln_weight.to(ln_weight.dtype), dln_bias.to(ln_bias.dtype)
    return [(dy + dx).to(x.dtype).contiguous(), dk, dv, dln_weight, dln_bias, dw_q, dw_out, db_out]


def _rows(heads: Tensor) -> Tensor:
    """(B, M, N, K) as attention lays it out -> (B N, C), a view."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


@cross_attention_backward_op.register_fake
def _cross_attention_backward_fake(dy: Tensor, x: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    _, dk, dv = attention_backward_fake(k, k, k, v, k, k)
    return [x.new_empty(x.shape), dk, dv, *(parameter.new_empty(parameter.shape) for parameter in rest[:5])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*cross_attention_backward_op(dy, *ctx.saved_tensors, ctx.num_heads, ctx.eps), None, None)


cross_attention_op.register_autograd(_backward, setup_context=_save)


def _triton_refusal(device: torch.device, dtype: torch.dtype, channels: int, head_width: int) -> str | None:
    reason = triton_refusal(device, dtype)
    if reason is not None:
        return reason
    if channels > MAX_CHANNELS or channels % 16:
        return f"it takes multiples of 16 up to {MAX_CHANNELS} channels, not {channels}"
    return head_width_refusal(device, dtype, head_width, MAX_HEAD_WIDTH)


def backend_support(
    device: torch.device, dtype: torch.dtype, *, channels: int = 256, head_width: int = 32
) -> BackendSupport:
    """Implementations in order of preference; on a GPU ours first because it launches and moves least, by count and not yet by
    measurement. All but ours are the plain block around that attention."""
    ours = _triton_refusal(device, dtype, channels, head_width)
    theirs = xformers_refusal(device, dtype)
    if device.type == "cpu":
        return {"sdpa": None, "reference": None, "xformers": theirs, "triton": ours}
    return {"triton": ours, "sdpa": None, "xformers": theirs, "reference": None}


def aot_cases() -> list[CompileCase]:
    def heads(channels: int, head_width: int, dtype: torch.dtype = torch.bfloat16) -> CompileCase:
        key = _heads_key(channels, head_width, dtype)
        step = f"heads c{channels}"
        return aot_case("cross_attention", step, _cross_attention_heads_kernel, head_width, dtype, key, {"C": channels})

    sizes = [(256, 32), (512, 32), (512, 64), (512, 128)]
    outputs = [
        aot_case("cross_attention", "output c256", _cross_attention_output_kernel, 32, dtype, key, {"C": 256})
        for dtype, key in ((torch.bfloat16, "output"), (torch.float32, "output fp32"))
    ]
    return [*(heads(*size) for size in sizes), heads(256, 32, torch.float32), *outputs]


def _check_parameters(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, w_q: Tensor, w_out: Tensor, b_out: Tensor, num_heads: int
) -> None:
    if x.ndim != 3 or x.shape[2] % num_heads:
        raise ValueError(
            f"x is {tuple(x.shape)}: (batch, tokens, channels) is needed, channels divisible by {num_heads} heads"
        )
    channels = x.shape[2]
    given = {"ln_weight": ln_weight, "ln_bias": ln_bias, "b_out": b_out, "w_q": w_q, "w_out": w_out}
    for name, tensor in given.items():
        needed = (channels, channels) if name.startswith("w_") else (channels,)
        if tensor.shape != needed:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, {needed} is needed for {channels} channels")


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
    backend: str | None = None,
) -> Tensor:
    """(B, N, C), in the dtype of `x`.

    backend: "triton", or the attention inside the plain block; None for the dispatcher's choice. Raises ValueError where the
    shapes do not fit each other, BackendError where `backend` cannot run."""
    _check_parameters(x, ln_weight, ln_bias, w_q, w_out, b_out, num_heads)
    batch, _, channels = x.shape
    width = channels // num_heads
    if context_k.shape[1::2] != (num_heads, width) or context_v.shape != context_k.shape:
        raise ValueError(
            f"context_k {tuple(context_k.shape)}, context_v {tuple(context_v.shape)}: both must be (batch, {num_heads}, keys, "
            f"{width}) for {channels} channels and {num_heads} heads"
        )
    if context_k.shape[0] not in (1, batch):
        raise ValueError(f"context_k has batch {context_k.shape[0]}, x has {batch}: give the same, or 1 for all")
    dtype = compute_dtype(x)
    chosen = choose("cross_attention", backend_support(x.device, dtype, channels=channels, head_width=width), backend)
    if chosen == "triton":
        k, v = (tensor.expand(batch, -1, -1, -1).to(dtype) for tensor in (context_k, context_v))
        return cross_attention_op(x, k, v, ln_weight, ln_bias, w_q.to(dtype), w_out.to(dtype), b_out, num_heads, eps)
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
        attend=IMPLEMENTATIONS[chosen],
    )
