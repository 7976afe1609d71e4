"""The 3D U-Net that predicts the noise: MAISI's (Guo et al. 2024) with a class vector in place of its body-region inputs.

docs/explanation/method.md, section 2.4. One class for all variants: with a report its attention is a transformer that also
attends to the context, without one it is plain self-attention; `pirads_layer` exists where a class vector is used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import ModelConfig
from ccella_fast.kernels.upsample_conv3d import UpsampleConv3d
from ccella_fast.models.blocks import (
    Checkpointed,
    GroupNormSiLU,
    ResidualBlock,
    SpatialSelfAttention,
    SpatialTransformer,
    conv3d,
    nest,
    zero_module,
)
from ccella_fast.models.embeddings import perceptron, sinusoidal
from ccella_fast.models.thin_grids import on_three_voxels


class Conditioning(NamedTuple):
    """All that the U-Net needs besides x, and all that can be computed once for a prompt and a timestep.

    Rows are samples: the conditioning of some rows, or of other timesteps, is the rows of every tensor."""

    shifts: tuple[Tensor, ...]  # one a residual block in order of use, fp32 (B, C): time, class and spacing, and a bias
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # one a cross-attention in order of use, (B, M, num_latents, K) each
    class_logits: Tensor | None  # (B, num_classes); None where no class is predicted


class ConditioningCursor(NamedTuple):
    """A `Conditioning` on its way through the blocks. Each entry comes with the block that it was computed for, and only that
    block can take it: the tensors of two blocks often have the same shape, so a mix-up would go unnoticed."""

    shifts: Iterator[tuple[nn.Module, Tensor]]
    keys_values: Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]

    def shift_of(self, block: nn.Module) -> Tensor:
        """The shift of a residual block, which must be the next one."""
        return _next_of(block, self.shifts)

    def keys_values_of(self, attention: nn.Module) -> tuple[Tensor, ...]:
        """The keys and values of a cross-attention, which must be the next one; () for self-attention, which needs none."""
        return _next_of(attention, self.keys_values) if isinstance(attention, SpatialTransformer) else ()

    def check_used_up(self) -> None:
        """RuntimeError unless every entry has been taken."""
        for kind, entries in (("residual block", self.shifts), ("cross-attention", self.keys_values)):
            if next(entries, None) is not None:
                raise RuntimeError(f"the forward pass ended before the conditioning of every {kind} was used")


def _next_of(block: nn.Module, entries: Iterator[tuple[nn.Module, Any]]) -> Any:
    owner, entry = next(entries, (None, None))
    if owner is not block:
        raise RuntimeError(
            f"a {type(block).__name__} runs when the conditioning of another block is next: "
            "register the blocks of a UNet3d in the order in which its forward pass uses them"
        )
    return entry


class Level(Checkpointed):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, config: ModelConfig, level: int, inputs: list[int], *, attentions_first: bool):
        super().__init__()
        text = config.traits.text
        count = len(inputs) if config.attention_levels[level] else 0
        attentions = nn.ModuleList(_attention(config, level, text) for _ in range(count))
        if attentions_first:
            self.attentions = attentions
        self.resnets = nn.ModuleList(_residual(config, width, config.num_channels[level]) for width in inputs)
        if not attentions_first:
            self.attentions = attentions

    def block(self, index: int, h: Tensor, flow: ConditioningCursor) -> Tensor:
        resnet = self.resnets[index]
        h = self.run(resnet, h, flow.shift_of(resnet))
        if not self.attentions:
            return h
        attention = self.attentions[index]
        return self.run(attention, h, *flow.keys_values_of(attention))


class DownBlock(Level):
    def __init__(self, config: ModelConfig, level: int, inputs: list[int], *, resample: bool):
        super().__init__(config, level, inputs, attentions_first=True)
        channels = config.num_channels[level]
        self.downsampler = conv3d(channels, channels, 3, stride=2, names=("op", "conv")) if resample else None

    def forward(self, h: Tensor, flow: ConditioningCursor) -> list[Tensor]:
        """Every output of the level, the last one being what goes on: all of them are skips."""
        outputs = []
        for index in range(len(self.resnets)):
            h = self.block(index, h, flow)
            outputs.append(h)
        return outputs if self.downsampler is None else [*outputs, self.downsampler(h)]


class MiddleBlock(Checkpointed):
    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.num_channels[-1]
        self.resnet_1 = _residual(config, channels, channels)
        self.attention = _attention(config, -1, config.traits.text)
        self.resnet_2 = _residual(config, channels, channels)

    def forward(self, h: Tensor, flow: ConditioningCursor) -> Tensor:
        h = self.run(self.resnet_1, h, flow.shift_of(self.resnet_1))
        h = self.run(self.attention, h, *flow.keys_values_of(self.attention))
        return self.run(self.resnet_2, h, flow.shift_of(self.resnet_2))


class UpBlock(Level):
    def __init__(self, config: ModelConfig, level: int, inputs: list[int], *, resample: bool):
        super().__init__(config, level, inputs, attentions_first=config.traits.text)
        self.upsampler = nest(UpsampleConv3d(config.num_channels[level]), "postconv", "conv") if resample else None

    def forward(self, h: Tensor, skips: list[Tensor], flow: ConditioningCursor) -> Tensor:
        """skips: one a residual block, the last one is used first. Not changed: ZeRO-3 hands a module copies of lists."""
        for index, skip in enumerate(reversed(skips)):
            h = self.block(index, torch.cat([h, skip], dim=1), flow)
        return h if self.upsampler is None else on_three_voxels(self.upsampler, h, scale=2.0)


class UNet3d(nn.Module):
    """x (B, C, X, Y, Z) and a `Conditioning` -> predicted noise (B, C, X, Y, Z)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.variant = config, config.traits
        widths, levels = config.num_channels, range(len(config.num_channels))
        latent, first, last = sum(config.latent_channels), widths[0], levels[-1]
        has_class = self.variant.class_input != "none"

        self.conv_in = conv3d(latent, first, 3)
        self.time_embed = perceptron(first, 4 * first)
        self.pirads_layer = perceptron(config.num_classes, 4 * first) if has_class else None
        self.spacing_layer = perceptron(3, 4 * first)

        self.down_blocks = nn.ModuleList()
        h, skips = first, [first]  # channel counts: of what flows on, of what the up path will take from the end
        for level in levels:
            inputs = [h] + [widths[level]] * (config.num_res_blocks - 1)
            self.down_blocks.append(DownBlock(config, level, inputs, resample=level != last))
            h = widths[level]
            skips += [h] * (config.num_res_blocks + (level != last))

        self.middle_block = MiddleBlock(config)

        self.up_blocks = nn.ModuleList()
        for level in reversed(levels):
            inputs = []
            for _ in range(config.num_res_blocks + 1):
                inputs.append(h + skips.pop())
                h = widths[level]
            self.up_blocks.append(UpBlock(config, level, inputs, resample=level != 0))

        norm = GroupNormSiLU(config.norm_num_groups, first, config.norm_eps)
        self.out = nn.Sequential(OrderedDict({"0": norm, "2": zero_module(conv3d(first, latent, 3))}))

        # Modules of one kind are registered in the order of their use, which `Flow` checks. Plain lists: they are registered
        # already.
        self._residuals = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        self._transformers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]

    def embed(self, timesteps: Tensor, spacing: Tensor, class_vector: Tensor | None) -> Tensor:
        """timesteps (B,), spacing (B, 3) in mm x 100, class vector (B, num_classes) x 100 -> (B, embedding width)."""
        dtype = _dtype(self)
        parts = [self.time_embed(sinusoidal(timesteps, self.config.num_channels[0]).to(dtype))]
        if self.pirads_layer is not None:
            assert class_vector is not None
            parts.append(self.pirads_layer(class_vector.to(dtype)))
        parts.append(self.spacing_layer(spacing.to(dtype)))
        return torch.cat(parts, dim=1)

    def project(self, embedding: Tensor, context: Tensor | None, class_logits: Tensor | None) -> Conditioning:
        """Carry `embed`'s result (B, E) and the context (B, L, cross_attention_dim) into every block that reads them."""
        embedding = F.silu(embedding)
        shifts = tuple(block.shift(embedding) for block in self._residuals)
        keys_values = () if context is None else tuple(block.keys_values(context) for block in self._transformers)
        return Conditioning(shifts, keys_values, class_logits)

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """The predicted noise, in the dtype of the weights (under autocast: of its convolutions).

        Raises ValueError when x has other channels than the model, or a grid that the levels cannot halve."""
        flow = self.flow(conditioning)
        skips = [self.enter(x)]
        for down in self.down_blocks:
            skips += down(skips[-1], flow)
        h = self.middle_block(skips[-1], flow)
        each = self.config.num_res_blocks + 1
        for up in self.up_blocks:
            h = up(h, skips[-each:], flow)
            del skips[-each:]
        flow.check_used_up()
        return self.out(h)

    def flow(self, conditioning: Conditioning, first_shift: int = 0, first_keys_values: int = 0) -> ConditioningCursor:
        """The conditioning for a forward pass, or for its end: from these entries on."""
        return ConditioningCursor(
            zip(self._residuals[first_shift:], conditioning.shifts[first_shift:], strict=True),
            zip(self._transformers[first_keys_values:], conditioning.keys_values[first_keys_values:], strict=True),
        )

    def enter(self, x: Tensor) -> Tensor:
        """The first convolution, after a check of x."""
        self._check(x)
        return self.conv_in(x.to(_dtype(self)))

    def _check(self, x: Tensor) -> None:
        channels, divisor = sum(self.config.latent_channels), self.config.divisor
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model takes (B, {channels}, X, Y, Z)")
        if any(size % divisor for size in x.shape[2:]):
            raise ValueError(
                f"the latent grid {tuple(x.shape[2:])} does not fit: each axis must be a multiple of {divisor} "
                f"(2 ** (levels - 1), {len(self.config.num_channels)} levels)"
            )


def _residual(config: ModelConfig, inputs: int, outputs: int) -> ResidualBlock:
    parts = 2 if config.traits.class_input == "none" else 3
    embedding = parts * 4 * config.num_channels[0]
    return ResidualBlock(inputs, outputs, embedding, config.norm_num_groups, config.norm_eps)


def _attention(config: ModelConfig, level: int, text: bool) -> nn.Module:
    channels, head = config.num_channels[level], config.num_head_channels[level]
    if text:
        return SpatialTransformer(channels, head, config.cross_attention_dim, config.norm_num_groups, config.norm_eps)
    return SpatialSelfAttention(channels, head, config.norm_num_groups, config.norm_eps)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
