"""OpenAI's guided-diffusion (ADM) and networks derived from it, such as wdm-3d and med-ddpm: residual blocks and attention.

The time embedding is added before the second norm, or scales and shifts its result (use_scale_shift_norm).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import is_norm, is_plain, is_silu
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule


class _ResBlock(ReplacementMixin):
    updown: bool
    use_scale_shift_norm: bool
    in_layers: Any
    out_layers: Any
    emb_layers: nn.Module
    h_upd: nn.Module
    x_upd: nn.Module
    skip_connection: nn.Module


class EmbeddedResBlock(_ResBlock):
    """Replaces what `ResBlock` computes inside of its activation checkpoint."""

    methods = ("_forward", "forward")

    def suits(self, x: Tensor, emb: Tensor) -> bool:
        """Whether the last layers are plain, and fusing the first two of them pays."""
        return emb.ndim == 2 and _can_finish(self, x)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, ...), emb (B, E) -> (B, out_channels, ...)."""
        if self.updown:
            first, convolution = self.in_layers[:-1], self.in_layers[-1]
            h = self.h_upd(first(x))
            x = self.x_upd(x)
            h = convolution(h)
        else:
            h = self.in_layers(x)
        return self.skip_connection(x) + _finish(self, h, self.emb_layers(emb).type(h.dtype))


class WaveletResBlock(_ResBlock):
    """Replaces the `ResBlock` of wdm-3d, which also passes on the wavelet coefficients that a skip connection needs."""

    up: bool

    def suits(self, x: Any, temb: Tensor) -> bool:
        """Whether the last layers are plain, and fusing the first two of them pays."""
        return temb.ndim == 2 and _can_finish(self, x[0] if isinstance(x, tuple) else x)

    def forward(self, x: Any, temb: Tensor) -> tuple[Tensor, Any]:
        """x (B, C, X, Y, Z) or a pair of it and coefficients, temb (B, E) -> such a pair."""
        skip = x[1] if isinstance(x, tuple) else None
        if isinstance(x, tuple) and (self.up or not self.updown):
            x = x[0]
        h = self.in_layers(x)
        if self.updown:
            x, _ = self.x_upd((x, skip) if self.up else x)
            h, skip = self.h_upd((h, skip) if self.up else h)
        return self.skip_connection(x) + _finish(self, h, self.emb_layers(temb)), skip


def _can_finish(block: Any, x: Tensor) -> bool:
    if not fusion.norm_and_silu_pay(x):
        return False
    whole = block.use_scale_shift_norm or is_plain(block.out_layers, nn.Sequential)  # with hooks it must be called
    return whole and is_norm(block.out_layers[0]) and is_silu(block.out_layers[1])


def _finish(block: Any, h: Tensor, embedding: Tensor) -> Tensor:
    """The last layers of h (B, C, ...) with the embedding (B, C) or (B, 2C)."""
    norm, silu, *others = block.out_layers
    if not block.use_scale_shift_norm:
        h = fusion.norm(norm, h, silu=True, shift=embedding)
    elif fusion.can_modulate(h):
        h = fusion.modulated_norm(norm, h, *embedding.chunk(2, dim=1))
    else:
        scale, offset = embedding.reshape(*embedding.shape, *[1] * (h.ndim - 2)).chunk(2, dim=1)
        h = silu(norm(h) * (1 + scale) + offset)
    for layer in others:
        h = layer(h)
    return h


def _block(mixin: type[ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        layers = list(module.out_layers)
        if not is_norm(layers[0]) or not is_silu(layers[1]):
            names = " and ".join(type(each).__name__ for each in layers[:2])
            yield f"its last layers begin with {names}, not with a plain GroupNorm and SiLU"
        else:
            yield Replacement("group_norm_silu", module, mixin, computes=(module.out_layers, *layers[:2]))

    return rule


class QKVAttention(ReplacementMixin):
    """Replaces `QKVAttentionLegacy` and `QKVAttention`, which take queries, keys and values as channels of one tensor."""

    n_heads: int
    _heads_first = False

    def suits(self, qkv: Tensor) -> bool:
        """On a GPU. On a CPU the channels would have to be transposed, which takes longer than is gained."""
        return not qkv.is_cpu

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, 3C, N) -> (B, C, N)."""
        parts = (self.n_heads, 3) if self._heads_first else (3, self.n_heads)
        split = qkv.unflatten(1, (*parts, -1)).mT  # (B, M, 3, N, K) or (B, 3, M, N, K)
        tokens = split.unbind(2 if self._heads_first else 1)
        return fusion.attention_of_heads(*tokens).mT.flatten(1, 2)


class LegacyQKVAttention(QKVAttention):
    """Replaces `QKVAttentionLegacy`, in which the channels of a head are adjacent."""

    _heads_first = True


def _attention(mixin: type[ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        yield Replacement("attention", module, mixin)

    return rule


RULES: dict[Any, Rule] = {
    "8a951609d06215b3": _block(EmbeddedResBlock),  # guided_diffusion.unet.ResBlock._forward of OpenAI and med-ddpm
    "3359dd96d7abeb53": _block(WaveletResBlock),  # wdm-3d: guided_diffusion.wunet.ResBlock
    "5f1ef3329ab02f62": _attention(LegacyQKVAttention),  # guided_diffusion.unet.QKVAttentionLegacy
    "0d1c0d57a37214c8": _attention(QKVAttention),  # guided_diffusion.unet.QKVAttention
}
