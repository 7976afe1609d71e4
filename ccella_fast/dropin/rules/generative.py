"""GenerativeModels (monai-generative): residual blocks and attention of its diffusion U-Nets, ControlNets and autoencoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ccella_fast.dropin import fusion
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule
from ccella_fast.dropin.rules.monai import autoencoder_block, diffusion_block
from ccella_fast.models.channels_last import to_tokens, to_volume


class _Attention(ReplacementMixin):
    num_heads: int
    scale: float
    to_q: Any
    to_k: nn.Module
    to_v: nn.Module

    def _attend(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return fusion.multi_head_attention(q, k, v, self.num_heads, self.scale)


class ContextAttention(_Attention):
    """Replaces `CrossAttention`, which is self-attention without a context."""

    use_flash_attention: bool
    to_out: nn.Module

    def suits(self, x: Tensor, context: Tensor | None = None) -> bool:
        """Where it pays, unless it is to use xformers."""
        scores = x.shape[1] * (x if context is None else context).shape[1]
        return fusion.attention_pays(x, scores) and not self.use_flash_attention

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, L, E) or None for x itself -> (B, N, C)."""
        return self.to_out(self._attend(x, x if context is None else context))


class VoxelAttention(_Attention):
    """Replaces `AttentionBlock`: all voxels attend to each other."""

    use_flash_attention: bool
    norm: nn.Module

    def suits(self, x: Tensor) -> bool:
        """Where it pays, unless it is to use xformers."""
        scores = x.shape[2:].numel() ** 2
        return fusion.attention_pays(x, scores) and not self.use_flash_attention

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        tokens = to_tokens(self.norm(x))
        return to_volume(self._attend(tokens, tokens), x.shape[2:]) + x


def _attention(mixin: type[ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        if module.use_flash_attention:
            yield "it already uses the fused attention of xformers (use_flash_attention)"
        elif not isinstance(module.to_q, nn.Linear):
            yield f"its projections are {type(module.to_q).__name__}, not Linear"
        else:
            yield Replacement("attention", module, mixin)

    return rule


RULES: dict[Any, Rule] = {
    "789705b8171ee965": diffusion_block,  # generative.networks.nets.diffusion_model_unet.ResnetBlock
    "ce67381212e4eb20": _attention(ContextAttention),  # CrossAttention
    "63b0e7191648255b": _attention(VoxelAttention),  # AttentionBlock, also that of autoencoderkl
    "d160d4e94f88d689": autoencoder_block,  # generative.networks.nets.autoencoderkl.ResBlock
}
