"""Fused operations with the weights of plain layers, see `layers`, where that is the same and pays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.dropin.layers import is_norm, is_plain, is_silu
from ccella_fast.kernels.attention import attention, attention_reference
from ccella_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from ccella_fast.kernels.upsample_conv3d import MIN_PHASE_VOXELS, upsample_conv3d, upsample_conv3d_reference

# Elements above which GroupNorm and SiLU together are faster on a CPU than one after the other.
_LARGE_ON_CPU = 2**17
# Scores of a head above which attention without the matrix of scores is faster on a CPU, in fp32; in 16 bits 16 times as many.
_MANY_SCORES_ON_CPU = 2**18
# Elements above which upsampling and a convolution in 16 bits are faster on a CPU as convolutions of the small grid.
_LARGE_TO_UPSAMPLE_ON_CPU = 2**15
NEAREST = ("nearest", "nearest-exact")  # the same for an upsampling by 2


class _SecondDerivative(torch.autograd.Function):
    """A fused operation whose gradient has a gradient: that of the plain operation, which is computed for it."""

    @staticmethod
    def forward(
        ctx: Any, fused: Callable[..., Tensor], plain: Callable[..., Tensor], *tensors: Tensor | None
    ) -> Tensor:
        ctx.fused, ctx.plain = fused, plain
        ctx.save_for_backward(*tensors)
        ctx.graph = _with_graph(fused, tensors)
        return ctx.graph[1].detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if torch.is_grad_enabled():
            inputs, y = tensors, ctx.plain(*tensors)
        else:
            inputs, y = ctx.graph or _with_graph(ctx.fused, tensors)
            ctx.graph = None  # its memory is freed; a second backward pass computes it again
        found = torch.autograd.grad(y, [inputs[index] for index in wanted], dy, create_graph=torch.is_grad_enabled())
        gradients: list[Tensor | None] = [None] * (2 + len(tensors))
        for index, gradient in zip(wanted, found, strict=True):
            gradients[2 + index] = gradient
        return tuple(gradients)


def _with_graph(
    operation: Callable[..., Tensor], tensors: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], Tensor]:
    """Copies of the tensors without their history, and the result for these with its own."""
    inputs = [None if each is None else each.detach().requires_grad_(each.requires_grad) for each in tensors]
    with torch.enable_grad():
        return inputs, operation(*inputs)


def _with_second_derivative(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], *tensors: Tensor | None
) -> Tensor:
    """`fused(*tensors)`, of which the second derivative is that of `plain(*tensors)`, the same function."""
    needs_grad = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    if torch.compiler.is_compiling() or not needs_grad:
        return fused(*tensors)
    return _SecondDerivative.apply(fused, plain, *tensors)


def norm(layer: Any, x: Tensor, *, silu: bool, shift: Tensor | None = None) -> Tensor:
    """SiLU(layer(x + shift)) or layer(x + shift) of a GroupNorm with weight and bias; x (B, C, ...), shift (B, C).

    As in a sum of both, one of them may have a batch of 1.
    """
    if shift is not None:
        x, shift = _same_batch(x, shift)

    def apply(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias, shift: operation(
            x, layer.num_groups, weight, bias, layer.eps, silu=silu, shift=shift
        )

    y = _with_second_derivative(
        apply(group_norm_silu), apply(group_norm_silu_reference), x, layer.weight, layer.bias, shift
    )
    return y.to(torch.float16) if getattr(layer, "norm_float16", False) else y


def modulated_norm(layer: Any, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """SiLU(layer(x) * (1 + scale) + offset) of a GroupNorm with weight and bias; x (B, C, ...), scale and offset (B, C).

    The kernel has one weight for each channel. So the samples become groups of channels of one sample, which is a view of x
    where `can_modulate` says so.
    """
    x, scale = _same_batch(x, scale)
    batch = x.shape[0]
    wide = torch.promote_types(scale.dtype, torch.float32)
    factor = scale.to(wide) + 1
    weight, bias = layer.weight * factor, torch.addcmul(offset.to(wide), layer.bias.to(wide), factor)

    def apply(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: operation(x, batch * layer.num_groups, weight, bias, layer.eps)

    y = _with_second_derivative(
        apply(group_norm_silu),
        apply(group_norm_silu_reference),
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(),
        bias.flatten(),
    )
    return y.reshape(x.shape)


def _same_batch(x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, C, ...) and (B, C), if one of them has a batch of 1."""
    if x.shape[0] == channels.shape[0]:
        return x, channels
    batch = max(x.shape[0], channels.shape[0])
    return x.expand(batch, *x.shape[1:]), channels.expand(batch, -1)


def can_modulate(x: Tensor) -> bool:
    """Whether `modulated_norm` reads x in place."""
    return x.shape[0] == 1 or x.is_contiguous()


def upsampled_convolution(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(nearest-neighbor upsampling of x by 2) of a convolution that `reason_not_to_fuse` accepts."""
    return _with_second_derivative(upsample_conv3d, upsample_conv3d_reference, x, conv.weight, conv.bias)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | Tensor) -> Tensor:
    """The attention of q (B, N, C) to k and v (B, L, C) -> (B, N, C). `scale` multiplies the scores."""
    usual = (q.shape[-1] // heads) ** -0.5  # that of the kernel
    if isinstance(scale, Tensor) or not math.isclose(scale, usual):  # a tensor may be learned, whatever its value is
        q = q * (scale / usual)
    q, k, v = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return attention_of_heads(q, k, v).transpose(1, 2).flatten(2)


def attention_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of q (B, M, N, K) to k and v (B, M, L, K) -> (B, M, N, K)."""
    return _with_second_derivative(attention, attention_reference, q, k, v)


def norm_and_silu_pay(x: Tensor) -> bool:
    """Whether GroupNorm and SiLU together are faster than PyTorch's one after the other.

    On a CPU that is so for large fp32 tensors without gradients, where the SiLU is computed in place.
    """
    if not x.is_cpu:
        return x.ndim > 2 and x.dtype != torch.float64
    if x.dtype != torch.float32 or x.numel() < _LARGE_ON_CPU:
        return False
    computes_in_place = not (torch.is_grad_enabled() and x.requires_grad)
    return computes_in_place and x.is_contiguous()


def attention_pays(x: Tensor, scores: int) -> bool:
    """Whether attention with so many scores (queries times keys) is faster than with the matrix of scores in memory."""
    large = _MANY_SCORES_ON_CPU if x.dtype == torch.float32 else 16 * _MANY_SCORES_ON_CPU
    return not x.is_cpu or scores >= large


def upsampling_pays(x: Tensor) -> bool:
    """Whether a convolution of x upsampled is faster on the small grid."""
    if not x.is_cpu:
        return True
    voxels = x.shape[0] * x.shape[2:].numel()
    return voxels >= MIN_PHASE_VOXELS and (x.dtype == torch.float32 or x.numel() >= _LARGE_TO_UPSAMPLE_ON_CPU)


def fusion_of(first: Any, second: Any, x: Any = None) -> Callable[[Tensor], Tensor] | None:
    """The function that computes second(first(x)) with one kernel, None if there is none, or if it would not pay for x."""
    if not (x is None or isinstance(x, Tensor)):
        return None
    # The cheapest question first: on a CPU the answer is often no, and is asked at each call.
    if isinstance(first, nn.GroupNorm):
        pays = x is None or norm_and_silu_pay(x)
        return functools.partial(norm, first, silu=True) if pays and is_norm(first) and is_silu(second) else None
    if type(first) is not nn.Upsample or not (x is None or (x.ndim == 5 and upsampling_pays(x))):
        return None
    if is_plain(first, nn.Upsample) and first.mode in NEAREST:
        conv = unwrap_convolution(second)
        if reason_not_to_fuse(first, conv) is None:
            return functools.partial(upsampled_convolution, conv)
    return None


def unwrap_convolution(module: Any) -> Any:
    """The only child of a MONAI `Convolution` without norm and activation; otherwise `module`."""
    children = list(module.children())
    is_wrapper = isinstance(module, nn.Sequential) and len(children) == 1 and is_plain(module, nn.Sequential)
    return children[0] if is_wrapper else module


def reason_not_to_fuse(upsample: nn.Upsample, conv: nn.Module) -> str | None:
    """Why an upsampling and the module after it, see `unwrap_convolution`, are not one kernel; None if they may be."""
    scale = upsample.scale_factor
    if type(conv) is nn.Conv2d:
        return "it is two-dimensional"
    if type(conv) is not nn.Conv3d:
        return "the upsampling is not followed by a plain convolution"
    if upsample.size is not None or scale not in (2, (2, 2, 2)):
        return f"it upsamples by {scale}, not by 2"
    if (conv.kernel_size, conv.stride, conv.dilation, conv.groups) != ((3, 3, 3), (1, 1, 1), (1, 1, 1), 1):
        return "its convolution is not a dense 3x3x3 convolution"
    if conv.padding not in ((1, 1, 1), "same") or conv.padding_mode != "zeros":
        return "its convolution is not padded with one zero"
    return None if is_plain(conv, nn.Conv3d) else "its convolution has a hook"
