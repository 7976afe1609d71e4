"""CompVis' latent-diffusion, and autoencoders derived from it, such as the VQ-GAN of medicaldiffusion: residual blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import is_norm
from ccella_fast.dropin.replacement import ReplacementMixin, Replacements, Rule
from ccella_fast.dropin.rules.torch_layers import block_with_two_norms


class LatentResBlock(ReplacementMixin):
    """Replaces `ResnetBlock`, in two or three dimensions."""

    in_channels: int
    out_channels: int
    use_conv_shortcut: bool
    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    temb_proj: nn.Module
    dropout: nn.Module
    conv_shortcut: nn.Module
    nin_shortcut: nn.Module

    def suits(self, x: Tensor, temb: Tensor | None = None) -> bool:
        """Whether the norms are plain, and fusing them with the SiLU pays."""
        is_vector = temb is None or temb.ndim == 2
        return fusion.norm_and_silu_pay(x) and is_vector and is_norm(self.norm1) and is_norm(self.norm2)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, C, ...), temb (B, E) or None -> (B, out_channels, ...)."""
        h = self.conv1(fusion.norm(self.norm1, x, silu=True))
        shift = None if temb is None else self.temb_proj(F.silu(temb))
        h = self.conv2(self.dropout(fusion.norm(self.norm2, h, silu=True, shift=shift)))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class SamePaddingResBlock(ReplacementMixin):
    """Replaces the `ResBlock` of medicaldiffusion."""

    in_channels: int
    out_channels: int
    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    conv_shortcut: nn.Module

    def suits(self, x: Tensor) -> bool:
        """Whether the norms are plain, and fusing them with the SiLU pays."""
        return fusion.norm_and_silu_pay(x) and is_norm(self.norm1) and is_norm(self.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, X, Y, Z)."""
        h = self.conv1(fusion.norm(self.norm1, x, silu=True))
        h = self.conv2(fusion.norm(self.norm2, h, silu=True))
        return (x if self.in_channels == self.out_channels else self.conv_shortcut(x)) + h


def _block(mixin: type[ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        yield from block_with_two_norms("group_norm_silu", module, mixin)

    return rule


RULES: dict[Any, Rule] = {
    "92c2de86f409e572": _block(LatentResBlock),  # ldm.modules.diffusionmodules.model.ResnetBlock
    "af4f179198466d8b": _block(SamePaddingResBlock),  # medicaldiffusion: vq_gan_3d.model.vqgan.ResBlock
}
