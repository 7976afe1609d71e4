"""MONAI: residual blocks, attention and the spatial transformer of its diffusion U-Nets, ControlNets and autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import computes, has_hooks, is_norm, is_plain, is_silu
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule
from ccella_fast.dropin.rules import torch_layers
from ccella_fast.dropin.rules.torch_layers import block_with_two_norms
from ccella_fast.models.channels_last import to_tokens, to_volume


class DiffusionResBlock(ReplacementMixin):
    """Replaces `DiffusionUNetResnetBlock`."""

    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    time_emb_proj: nn.Module
    skip_connection: nn.Module
    upsample: nn.Module | None
    downsample: nn.Module | None

    def suits(self, x: Tensor, emb: Tensor) -> bool:
        """Whether the norms and the SiLU are plain layers, and fusing them pays."""
        pays = fusion.norm_and_silu_pay(x)
        return pays and is_silu(self.nonlinearity) and is_norm(self.norm1) and is_norm(self.norm2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, ...), emb (B, E) -> (B, out_channels, ...)."""
        h = fusion.norm(self.norm1, x, silu=True)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = fusion.norm(self.norm2, self.conv1(h), silu=True, shift=self.time_emb_proj(self.nonlinearity(emb)))
        return self.skip_connection(x) + self.conv2(h)


class AutoencoderResBlock(ReplacementMixin):
    """Replaces `AEKLResBlock`."""

    norm1: Any
    norm2: Any
    conv1: nn.Module
    conv2: nn.Module
    nin_shortcut: nn.Module

    def suits(self, x: Tensor) -> bool:
        """Whether the norms are plain layers, and fusing them with the SiLU pays."""
        return fusion.norm_and_silu_pay(x) and is_norm(self.norm1) and is_norm(self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, out_channels, ...)."""
        h = self.conv1(fusion.norm(self.norm1, x, silu=True))
        return self.nin_shortcut(x) + self.conv2(fusion.norm(self.norm2, h, silu=True))


class FusedSelfAttention(ReplacementMixin):
    """Replaces `SABlock`."""

    num_heads: int
    scale: float
    use_combined_linear: bool
    include_fc: bool
    qkv: nn.Module
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def suits(self, x: Tensor, attn_mask: Tensor | None = None) -> bool:
        """Without a mask, with the settings of the rule, and where it pays."""
        return attn_mask is None and _pays(x, x) and _is_usual(self)

    def forward(self, x: Tensor, attn_mask: None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.use_combined_linear:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        y = fusion.multi_head_attention(q, k, v, self.num_heads, self.scale)
        return self.out_proj(y) if self.include_fc else y


class FusedCrossAttention(ReplacementMixin):
    """Replaces `CrossAttentionBlock`."""

    num_heads: int
    scale: float
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    out_proj: nn.Module

    def suits(self, x: Tensor, context: Tensor | None = None) -> bool:
        """With the settings of the rule, and where it pays."""
        return _pays(x, x if context is None else context) and _is_usual(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, L, E) or None for x itself -> (B, N, C)."""
        if context is None:
            context = x
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.out_proj(fusion.multi_head_attention(q, k, v, self.num_heads, self.scale))


def _pays(x: Tensor, context: Tensor) -> bool:
    """Without gradients the kernels are faster at any size: they need no changes of layout."""
    return not torch.is_grad_enabled() or fusion.attention_pays(x, x.shape[1] * context.shape[1])


def _is_usual(block: Any) -> bool:
    """Whether the kernels compute what the block does. Settings and dropout may have changed since `speed_up`."""
    layouts = (block.input_rearrange, block.out_rearrange)
    drops = not _keeps_all(block.drop_weights) or not _keeps_all(block.drop_output)
    return not drops and not any(map(has_hooks, layouts)) and _reason(block) is None


def _keeps_all(dropout: Any) -> bool:
    """Whether a dropout, whose mode may be another than that of its block, leaves all values as they are."""
    return is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p)


class FusedSpatialTransformer(ReplacementMixin):
    """Replaces `SpatialTransformer`, without the copy to channels-first memory; in two dimensions x is (B, C, X, Y)."""

    norm: nn.Module
    proj_in: nn.Module
    proj_out: nn.Module
    transformer_blocks: nn.ModuleList

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, X, Y, Z), context (B, L, E) or None -> (B, C, X, Y, Z)."""
        tokens = to_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(to_volume(tokens, x.shape[2:])) + x


def diffusion_block(module: Any) -> Replacements:
    """The residual block of diffusion U-Nets and ControlNets."""
    if module.spatial_dims not in (2, 3):
        yield f"it is {module.spatial_dims}-dimensional"
    elif computes(module.nonlinearity) != "silu":
        yield f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
    else:
        yield from block_with_two_norms("group_norm_silu", module, DiffusionResBlock)


def autoencoder_block(module: Any) -> Replacements:
    """The residual block of autoencoders."""
    yield from block_with_two_norms("group_norm_silu", module, AutoencoderResBlock)


def _reason(block: Any) -> str | None:
    """Why the settings of an attention are not those of the kernels; None if they are."""
    if block.save_attn:
        return "it stores the attention matrix (save_attn)"
    if block.causal:
        return "it is causal"
    if block.rel_positional_embedding is not None:
        return "it has a relative position embedding"
    if block.use_flash_attention:
        return "it already uses PyTorch's fused attention (use_flash_attention)"
    return None


def _attention(module: Any) -> Replacements:
    mixin = FusedSelfAttention if hasattr(module, "qkv") else FusedCrossAttention
    yield _reason(module) or Replacement("attention", module, mixin)


def spatial_transformer(module: Any) -> Replacements:
    """Also that of GenerativeModels, in two or three dimensions."""
    yield Replacement("attention", module, FusedSpatialTransformer)


RULES: dict[Any, Rule] = {
    "a0071837dbb04ce8": diffusion_block,  # monai.networks.nets.diffusion_model_unet.DiffusionUNetResnetBlock
    "8e5bece0eb390f4d": torch_layers.sequential,  # WrappedUpsample
    "2add39aac3aaef93": spatial_transformer,  # SpatialTransformer
    "6e91e448695f1f12": autoencoder_block,  # monai.networks.nets.autoencoderkl.AEKLResBlock
    "f50dbad2854a8e05": _attention,  # monai.networks.blocks.selfattention.SABlock
    "12ffddab630de3c1": _attention,  # monai.networks.blocks.crossattention.CrossAttentionBlock
}
