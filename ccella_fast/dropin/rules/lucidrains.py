"""lucidrains' video diffusion and networks derived from it, such as medicaldiffusion.

A block is a convolution, a GroupNorm, a scale and a shift from the time embedding, and a SiLU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import is_norm, is_silu
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule


class ModulatedBlock(ReplacementMixin):
    """Replaces `Block`."""

    proj: nn.Module
    norm: Any
    act: nn.Module

    def suits(self, x: Tensor, scale_shift: Any = None) -> bool:
        """Whether the layers are plain, and fusing them pays."""
        if not fusion.norm_and_silu_pay(x):
            return False
        per_channel = scale_shift is None or all(each.shape[2:].numel() == 1 for each in scale_shift)
        return per_channel and is_norm(self.norm) and is_silu(self.act)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, C, ...), scale and shift (B, out_channels, 1, ...) -> (B, out_channels, ...)."""
        h = self.proj(x)
        if scale_shift is None:
            return fusion.norm(self.norm, h, silu=True)
        scale, shift = scale_shift
        if fusion.can_modulate(h) and scale.shape[:2] == shift.shape[:2] == h.shape[:2]:
            return fusion.modulated_norm(self.norm, h, scale.flatten(1), shift.flatten(1))
        return self.act(self.norm(h) * (scale + 1) + shift)


def _block(module: Any) -> Replacements:
    if is_norm(module.norm) and is_silu(module.act):
        yield Replacement("group_norm_silu", module, ModulatedBlock, computes=(module.norm, module.act))
    else:
        yield f"it has {type(module.norm).__name__} and {type(module.act).__name__}, not a plain GroupNorm and SiLU"


RULES: dict[Any, Rule] = {
    "30429fdd8da2c3b8": _block,  # video_diffusion_pytorch.Block; medicaldiffusion: ddpm.diffusion.Block
    "0c08ebfaffd236d5": _block,  # the same without the helper `exists`
}
