"""Building blocks of the U-Net: convolutions, the residual block, and spatial attention with and without a context.

Shapes: B batch, C channels, X Y Z latent axes, N = X*Y*Z voxels as tokens, M heads, K head width, L context tokens, E context
width.

Child modules have the names of the reference implementation, so that its weights load unchanged, and are created in its order.
That order determines the order of the parameters and of the random draws that initialize them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.kernels import conv3d as fused_conv3d
from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.backend import choose
from ccella_fast.kernels.conv3d import kernel_layout
from ccella_fast.kernels.cross_attention import cross_attention
from ccella_fast.kernels.derived_weight import DerivedWeight
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.kernels.residual_shift import backend_support, residual_shift
from ccella_fast.models.channels_last import has_tokens, on_gpu, pointwise_conv3d, to_tokens, to_volume
from ccella_fast.models.few_channels import FEW, conv3d_few_channels
from ccella_fast.models.few_voxels import conv3d_few_voxels, trains_few_voxels
from ccella_fast.models.thin_grids import on_three_voxels

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# runner(module, *tensors) returns module(*tensors), which it may recompute in the backward pass
ModuleRunner = Callable[..., Tensor]


def nest(module: nn.Module, *names: str) -> nn.Module:
    """Nest `module` below child modules called `names`.

    For example, `nest(conv, "op", "conv")` has the parameter `op.conv.weight`.
    """
    for name in reversed(names):
        module = nn.Sequential(OrderedDict({name: module}))
    return module


class Conv3d(nn.Conv3d):
    """A convolution of stride 1 that is correct in bf16 on grids of any size (see `thin_grids`), and fast on a GPU.

    The Triton kernel reads the weight in an order of its own, which is kept between calls that need no gradient, see
    `DerivedWeight`.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__(inputs, outputs, kernel, stride, padding)
        self._kernel_weight = DerivedWeight(kernel_layout)

    def uses_triton(self, x: Tensor) -> bool:
        """Whether the Triton kernel `conv3d` convolves x: only 3x3x3, and more than a few channels."""
        if self.kernel_size != (3, 3, 3) or min(self.in_channels, self.out_channels) <= FEW:
            return False
        return fused_conv3d.choose_backend(x, self.out_channels) == "triton"

    def _triton(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        kept = self._kernel_weight.of(weight)
        weight = weight if kept is None else kept
        return fused_conv3d.conv3d(x, weight, bias, residual=residual, backend="triton")

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel_size == (1, 1, 1):
            convolve = pointwise_conv3d if has_tokens(input) else super()._conv_forward
            return convolve(input, weight, bias)
        if on_gpu(input) and torch.is_grad_enabled() and min(self.in_channels, self.out_channels) <= FEW:
            return conv3d_few_channels(input, weight, bias)
        if self.uses_triton(input):
            return self._triton(input, weight, bias)
        if trains_few_voxels(input, weight):
            return conv3d_few_voxels(input, weight, bias)
        return on_three_voxels(lambda x: super(Conv3d, self)._conv_forward(x, weight, bias), input)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in `nn.Module`, and clear the kept weight."""
        self._kernel_weight.clear()
        return super().train(mode)


class StridedConv3d(nn.Conv3d):
    """A 3x3x3 convolution of stride 2 and padding 1 that is correct in bf16 on grids of any size (see `thin_grids`)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, X/2, Y/2, Z/2), rounded up."""
        return on_three_voxels(super().forward, x, scale=0.5)


def conv3d(inputs: int, outputs: int, kernel: int, stride: int = 1, *, names: tuple[str, ...] = ("conv",)) -> nn.Module:
    """A convolution with bias that keeps the grid, or divides it by `stride`, nested below `names`."""
    conv_class = Conv3d if stride == 1 else StridedConv3d
    return nest(conv_class(inputs, outputs, kernel, stride, padding=kernel // 2), *names)


def zero_module(module: ModuleT) -> ModuleT:
    """Set all parameters to zero, so that a residual block that ends in `module` is initially the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def run_module(module: nn.Module, *tensors: Tensor) -> Tensor:
    """Return `module(*tensors)`: the `ModuleRunner` without activation checkpointing."""
    return module(*tensors)


class Checkpointed(nn.Module):
    """A module that calls its blocks through `self.run_module`, which activation checkpointing replaces."""

    run_module: ModuleRunner = staticmethod(run_module)


class BiaslessConv3d(Conv3d):
    """A convolution that does not add its bias: the caller adds it together with other terms per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x (B, C, X, Y, Z) without the bias."""
        return self._conv_forward(x, self.weight, None)


class ResidualConv3d(Conv3d):
    """conv(x) + residual.

    The Triton kernel adds the bias together with the residual, which saves a pass over memory. Without it, the convolution adds
    the bias at no cost.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Both of shape (B, C, X, Y, Z)."""
        if self.uses_triton(x):
            return self._triton(x, self.weight, self.bias, residual)
        if choose("residual_shift", backend_support(x.device, x.dtype)) == "triton":
            return residual_shift(self._conv_forward(x, self.weight, None), residual, self.bias)
        return residual + self._conv_forward(x, self.weight, self.bias)


class ResidualBlock(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1 x)) + proj(embedding)))) + skip(x)."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, inputs, eps)
        self.conv1 = nest(BiaslessConv3d(inputs, outputs, 3, padding=1), "conv")
        self.time_emb_proj = nn.Linear(embedding, outputs)
        self.norm2 = GroupNormSiLU(groups, outputs, eps)
        self.conv2 = zero_module(nest(ResidualConv3d(outputs, outputs, 3, padding=1), "conv"))
        self.skip_connection = nn.Identity() if inputs == outputs else conv3d(inputs, outputs, 1)

    def shift(self, embedding: Tensor) -> Tensor:
        """The values added per channel between conv1 and norm2: the projected embedding plus the bias of conv1.

        Args:
            embedding: (B, E), after its SiLU.

        Returns:
            (B, outputs), in fp32 or wider.
        """
        projected = self.time_emb_proj(embedding)
        wide = torch.promote_types(projected.dtype, torch.float32)
        return projected.to(wide) + self.conv1.get_parameter("conv.bias").to(wide)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x (B, C, X, Y, Z) and the result of `shift` (B, outputs) -> (B, outputs, X, Y, Z)."""
        h = self.norm2(self.conv1(self.norm1(x)), shift=shift)
        return self.conv2.get_submodule("conv")(h, self.skip_connection(x))


class ResamplingBlock(ResidualBlock):
    """A residual block that halves or doubles the grid: MONAI's `resblock_updown`."""

    def __init__(self, channels: int, embedding: int, groups: int, eps: float, *, up: bool):
        super().__init__(channels, channels, embedding, groups, eps)
        self.up = up

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """x (B, C, X, Y, Z) and the result of `shift` (B, C) -> (B, C, 2X, 2Y, 2Z), or half of each axis."""
        h = self.norm2(self.conv1(self._resample(self.norm1(x))), shift=shift)
        return self.conv2.get_submodule("conv")(h, self._resample(x))

    def _resample(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool3d(x, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with an output projection if `include_fc`.

    On a GPU queries, keys and values are one matrix product with the three weights stacked, which inference stacks once. That
    needs plain linear layers: others, such as those of LoRA, are called one by one.
    """

    def __init__(self, width: int, head_width: int, *, bias: bool = False, include_fc: bool = False):
        super().__init__()
        self.head_width = head_width
        self.out_proj = nn.Linear(width, width) if include_fc else None
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self._weight, self._bias = DerivedWeight(_stack), DerivedWeight(_stack)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        linears = (self.to_q, self.to_k, self.to_v)
        if on_gpu(tokens) and all(type(linear) is nn.Linear for linear in linears):
            weight = _stacked(self._weight, [linear.weight for linear in linears])
            bias = None if self.to_q.bias is None else _stacked(self._bias, [linear.bias for linear in linears])
            projected = F.linear(tokens, weight, bias).chunk(3, dim=-1)
        else:
            projected = tuple(linear(tokens) for linear in linears)
        q, k, v = (to_heads(each, self.head_width) for each in projected)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        return attended if self.out_proj is None else self.out_proj(attended)

    def train(self, mode: bool = True) -> SelfAttention:
        """Set the mode as in `nn.Module`, and clear the stacked weights."""
        self._weight.clear()
        self._bias.clear()
        return super().train(mode)


def _stack(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def _stacked(derived: DerivedWeight, weights: list[Tensor]) -> Tensor:
    kept = derived.of(*weights)
    return _stack(*weights) if kept is None else kept


class CrossAttention(nn.Module):
    """Multi-head cross-attention to a context, with the normalization of its input and the residual connection."""

    def __init__(self, width: int, head_width: int, context_width: int):
        super().__init__()
        self.head_width = head_width
        self.out_proj = nn.Linear(width, width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Context (B, L, E) -> keys and values, (B, M, L, K) each."""
        return to_heads(self.to_k(context), self.head_width), to_heads(self.to_v(context), self.head_width)

    def forward(self, tokens: Tensor, added: Tensor, norm: nn.LayerNorm, keys: Tensor, values: Tensor) -> Tensor:
        """Return sum + out_proj(attention(norm(sum))), sum = tokens + added: (B, N, C) -> (B, N, C)."""
        return cross_attention(
            tokens,
            keys,
            values,
            ln_weight=norm.weight,
            ln_bias=norm.bias,
            w_q=self.to_q.weight,
            w_out=self.out_proj.weight,
            b_out=self.out_proj.bias,
            num_heads=keys.shape[1],
            eps=norm.eps,
            added=added,
        )


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): linear2(value * gelu(gate)) with [value, gate] = linear1(tokens) and the exact GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 8 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.linear2(geglu(self.linear1(tokens)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context and a feed-forward network, each with a LayerNorm and a residual."""

    def __init__(self, width: int, head_width: int, context_width: int, *, include_fc: bool = False):
        super().__init__()
        self.attn1 = SelfAttention(width, head_width, include_fc=include_fc)
        self.ff = GatedFeedForward(width)
        self.attn2 = CrossAttention(width, head_width, context_width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """tokens (B, N, C), keys and values (B, M, L, K) -> (B, N, C)."""
        tokens = self.attn2(tokens, self.attn1(self.norm1(tokens)), self.norm2, keys, values)
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """One transformer block over all voxels, which attends to the context of the report."""

    def __init__(
        self, channels: int, head_width: int, context_width: int, groups: int, eps: float, *, include_fc: bool = False
    ):
        super().__init__()
        self.norm = GroupNormSiLU(groups, channels, eps, silu=False)
        self.proj_in = conv3d(channels, channels, 1)
        block = TransformerBlock(channels, head_width, context_width, include_fc=include_fc)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = zero_module(nest(ResidualConv3d(channels, channels, 1), "conv"))

    @property
    def _block(self) -> TransformerBlock:
        block = self.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        return block

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the cross-attention: context (B, L, E) -> (B, M, L, K) each."""
        return self._block.attn2.keys_values(context)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x (B, C, X, Y, Z) and the results of `keys_values` -> (B, C, X, Y, Z)."""
        tokens = to_tokens(self.proj_in(self.norm(x)))
        tokens = self._block(tokens, keys, values)
        return self.proj_out.get_submodule("conv")(to_volume(tokens, x.shape[2:]), x)


class SpatialSelfAttention(nn.Module):
    """Self-attention over all voxels, in the variants without a report."""

    def __init__(self, channels: int, head_width: int, groups: int, eps: float, *, include_fc: bool = False):
        super().__init__()
        self.norm = GroupNormSiLU(groups, channels, eps, silu=False)
        self.attn = SelfAttention(channels, head_width, bias=True, include_fc=include_fc)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        return x + to_volume(self.attn(to_tokens(self.norm(x))), x.shape[2:])


def to_heads(tokens: Tensor, head_width: int) -> Tensor:
    """(B, N, C) -> (B, M, N, K), as a view."""
    return tokens.unflatten(-1, (-1, head_width)).transpose(1, 2)
