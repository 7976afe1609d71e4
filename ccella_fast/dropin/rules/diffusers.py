"""diffusers: residual blocks of video U-Nets (UNet3DConditionModel, SVD) and video autoencoders (HunyuanVideo, CogVideoX).

Temporal convolutions are containers, see `torch_layers`. Wan's autoencoder has no GroupNorm, so there is no kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import computes, is_norm, is_silu
from ccella_fast.dropin.replacement import ReplacementMixin, Replacements, Rule
from ccella_fast.dropin.rules.torch_layers import block_with_two_norms


class _Block(ReplacementMixin):
    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    dropout: nn.Module
    conv_shortcut: nn.Module | None

    def _is_plain(self, x: Tensor) -> bool:
        pays = fusion.norm_and_silu_pay(x)
        return pays and is_norm(self.norm1) and is_norm(self.norm2) and is_silu(self.nonlinearity)


class ImageResBlock(_Block):
    """Replaces `ResnetBlock2D`."""

    upsample: Callable[[Tensor], Tensor] | None
    downsample: Callable[[Tensor], Tensor] | None
    time_emb_proj: nn.Module | None
    time_embedding_norm: str
    skip_time_act: bool
    output_scale_factor: float

    def suits(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether the layers are plain, fusing them pays, and the embedding is a vector if it scales and shifts."""
        if args or kwargs or not self._is_plain(input_tensor):
            return False
        if self.time_emb_proj is None:
            return temb is None and self.time_embedding_norm != "scale_shift"
        return temb is not None and temb.ndim == 2

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """input_tensor (B, C, Y, Z), temb (B, E) -> (B, out_channels, Y', Z')."""
        x, h = input_tensor, fusion.norm(self.norm1, input_tensor, silu=True)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and h.shape[0] >= 64:
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        h = self.dropout(self._second_norm(self.conv1(h), temb))
        h = self.conv2(h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + h) / self.output_scale_factor

    def _second_norm(self, h: Tensor, temb: Tensor | None) -> Tensor:
        embedding = None
        if self.time_emb_proj is not None:
            embedding = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "default" or embedding is None:
            return fusion.norm(self.norm2, h, silu=True, shift=embedding)
        if self.time_embedding_norm != "scale_shift":
            return fusion.norm(self.norm2, h, silu=True)
        if fusion.can_modulate(h):
            return fusion.modulated_norm(self.norm2, h, *embedding.chunk(2, dim=1))
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
        return self.nonlinearity(self.norm2(h) * (1 + scale) + shift)


class FrameResBlock(_Block):
    """Replaces `TemporalResnetBlock`, whose embedding differs from frame to frame."""

    time_emb_proj: nn.Module | None

    def suits(self, input_tensor: Tensor, temb: Tensor | None) -> bool:
        """Whether the layers are plain, and fusing them pays."""
        return self._is_plain(input_tensor)

    def forward(self, input_tensor: Tensor, temb: Any) -> Tensor:
        """input_tensor (B, C, F, Y, Z), temb (B, F, E) -> (B, out_channels, F, Y, Z)."""
        h = self.conv1(fusion.norm(self.norm1, input_tensor, silu=True))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, :, None, None].permute(0, 2, 1, 3, 4)
        h = self.conv2(self.dropout(fusion.norm(self.norm2, h, silu=True)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + h


class CausalResBlock(_Block):
    """Replaces `HunyuanVideoResnetBlockCausal3D`."""

    def suits(self, hidden_states: Tensor) -> bool:
        """Whether the layers are plain, and fusing them pays."""
        return self._is_plain(hidden_states)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, F, Y, Z) -> (B, out_channels, F, Y, Z)."""
        x = hidden_states.contiguous()
        h = self.conv1(fusion.norm(self.norm1, x, silu=True))
        h = self.conv2(self.dropout(fusion.norm(self.norm2, h, silu=True)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class CachedResBlock(_Block):
    """Replaces `CogVideoXResnetBlock3D` in the encoder, whose norms do not depend on a latent.

    Its convolutions also take and return the last frames, for the next part of a video.
    """

    in_channels: int
    out_channels: int
    use_conv_shortcut: bool
    temb_proj: nn.Module

    def suits(self, inputs: Tensor, temb: Any = None, zq: Any = None, conv_cache: Any = None) -> bool:
        """Without a latent: whether the layers are plain, and fusing them pays."""
        return zq is None and (temb is None or temb.ndim == 2) and self._is_plain(inputs)

    def forward(
        self, inputs: Tensor, temb: Tensor | None = None, zq: None = None, conv_cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """inputs (B, C, F, Y, Z), temb (B, E) -> (B, out_channels, F, Y, Z) and the new frames."""
        before, after = conv_cache or {}, {}
        h = fusion.norm(self.norm1, inputs, silu=True)
        h, after["conv1"] = self.conv1(h, conv_cache=before.get("conv1"))
        shift = None if temb is None else self.temb_proj(self.nonlinearity(temb))
        h = self.dropout(fusion.norm(self.norm2, h, silu=True, shift=shift))
        h, after["conv2"] = self.conv2(h, conv_cache=before.get("conv2"))
        shortcut: Any = self.conv_shortcut if self.in_channels != self.out_channels else None
        if shortcut is not None and self.use_conv_shortcut:
            inputs, after["conv_shortcut"] = shortcut(inputs, conv_cache=before.get("conv_shortcut"))
        elif shortcut is not None:
            inputs = shortcut(inputs)
        return h + inputs, after


def _block(mixin: type[ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        if computes(module.nonlinearity) != "silu":
            yield f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
        else:
            yield from block_with_two_norms("group_norm_silu", module, mixin)

    return rule


RULES: dict[Any, Rule] = {
    "53010854f7a87c73": _block(ImageResBlock),  # diffusers 0.42: models.resnet.ResnetBlock2D
    "6b83881b4ad6e5f7": _block(FrameResBlock),  # models.resnet.TemporalResnetBlock
    # models.autoencoders.autoencoder_kl_hunyuan_video.HunyuanVideoResnetBlockCausal3D
    "eaf0b2425b4d11de": _block(CausalResBlock),
    "944035eb2d1bd3ac": _block(CachedResBlock),  # models.autoencoders.autoencoder_kl_cogvideox.CogVideoXResnetBlock3D
}
