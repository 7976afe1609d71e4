"""The 3D U-Net that predicts the noise: that of MAISI (Guo et al. 2024) with a class vector instead of body-region inputs.

docs/explanation/method.md, section 2.4. One class serves all variants. With a report, its attention is a transformer block that
also attends to the context; without one, it is self-attention. `pirads_layer` exists if the variant uses a class vector.
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
    ResamplingBlock,
    ResidualBlock,
    SpatialSelfAttention,
    SpatialTransformer,
    conv3d,
    nest,
    zero_module,
)
from ccella_fast.models.channels_last import join_channels, on_gpu
from ccella_fast.models.embeddings import perceptron, sinusoidal
from ccella_fast.models.thin_grids import on_three_voxels


class Conditioning(NamedTuple):
    """All inputs of the U-Net other than x. They depend only on the prompt and the timestep, so they can be precomputed.

    The first axis of every tensor is the batch: rows can be selected or stacked, also from different timesteps.

    Attributes:
        shifts: for each residual block, in order of use, the values added per channel, fp32 (B, C): the embedding of timestep,
            class and spacing, and a bias.
        keys_values: for each cross-attention, in order of use, keys and values, (B, M, num_latents, K) each.
        class_logits: (B, num_classes); None if the variant does not predict the class.
    """

    shifts: tuple[Tensor, ...]
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    class_logits: Tensor | None


class ConditioningCursor(NamedTuple):
    """Iterates over the entries of a `Conditioning` during a forward pass.

    Each entry is paired with the block that it was computed for, and only that block can consume it: the tensors of different
    blocks often have the same shape, so using the wrong one would otherwise not be noticed.
    """

    shifts: Iterator[tuple[nn.Module, Tensor]]
    keys_values: Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]

    def shift_of(self, block: nn.Module) -> Tensor:
        """Return the shift of a residual block, which must be the next one."""
        return _next_of(_uncompiled(block), self.shifts)

    def keys_values_of(self, attention: nn.Module) -> tuple[Tensor, ...]:
        """Return keys and values of a cross-attention, which must be the next one; () for self-attention."""
        attention = _uncompiled(attention)
        return _next_of(attention, self.keys_values) if isinstance(attention, SpatialTransformer) else ()

    def check_consumed(self) -> None:
        """Raise RuntimeError unless every entry has been consumed."""
        for kind, entries in (("residual block", self.shifts), ("cross-attention", self.keys_values)):
            if next(entries, None) is not None:
                raise RuntimeError(f"the forward pass ended before the conditioning of every {kind} was consumed")


def _uncompiled(block: nn.Module) -> nn.Module:
    """The block itself if `torch.compile(block)` has taken its place in the network."""
    return getattr(block, "_orig_mod", block)


def _next_of(block: nn.Module, entries: Iterator[tuple[nn.Module, Any]]) -> Any:
    owner, entry = next(entries, (None, None))
    if owner is not block:
        raise RuntimeError(
            f"a {type(block).__name__} is called, but the next conditioning belongs to another block: "
            "register the blocks of a UNet3d in the order in which its forward pass calls them"
        )
    return entry


class ResolutionLevel(Checkpointed):
    """The residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, config: ModelConfig, level: int, inputs: list[int], *, attentions_first: bool):
        """Create the blocks.

        Args:
            config: the sizes of the model.
            level: index of the level, 0 for the finest grid.
            inputs: input channels of each residual block.
            attentions_first: create the attention blocks before the residual blocks. The reference implementation does so on
                the way down and, in variants with a report, also on the way up. The order of creation is that of the parameters
                and of the random draws that initialize them.
        """
        super().__init__()
        count = len(inputs) if config.attention_levels[level] else 0
        attentions = nn.ModuleList(_attention(config, level) for _ in range(count))
        if attentions_first:
            self.attentions = attentions
        self.resnets = nn.ModuleList(_residual(config, width, config.num_channels[level]) for width in inputs)
        if not attentions_first:
            self.attentions = attentions

    def run_block(self, index: int, h: Tensor, cursor: ConditioningCursor) -> Tensor:
        """Apply the residual block `index` and the attention that follows it: (B, C, X, Y, Z) -> (B, width, X, Y, Z)."""
        resnet = self.resnets[index]
        h = self.run_module(resnet, h, cursor.shift_of(resnet))
        if not self.attentions:
            return h
        attention = self.attentions[index]
        return self.run_module(attention, h, *cursor.keys_values_of(attention))


class DownBlock(ResolutionLevel):
    """One level of the down path: residual blocks, attention and, except on the last level, a strided convolution."""

    def __init__(self, config: ModelConfig, level: int, inputs: list[int], *, resample: bool):
        super().__init__(config, level, inputs, attentions_first=True)
        self.downsampler = _downsampler(config, config.num_channels[level]) if resample else None

    def forward(self, h: Tensor, cursor: ConditioningCursor) -> list[Tensor]:
        """Return the outputs of all blocks. Each is a skip connection, and the last is the input of the next level."""
        outputs = []
        for index in range(len(self.resnets)):
            h = self.run_block(index, h, cursor)
            outputs.append(h)
        return outputs if self.downsampler is None else [*outputs, self.downsample(h, cursor)]

    def downsample(self, h: Tensor, cursor: ConditioningCursor) -> Tensor:
        """Halve the grid, on a level that has a downsampler."""
        assert self.downsampler is not None
        if isinstance(self.downsampler, ResamplingBlock):
            return self.run_module(self.downsampler, h, cursor.shift_of(self.downsampler))
        return self.downsampler(h)


class MiddleBlock(Checkpointed):
    """Two residual blocks with attention between them, on the coarsest grid."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        channels = config.num_channels[-1]
        self.resnet_1 = _residual(config, channels, channels)
        self.attention = _attention(config, -1)
        self.resnet_2 = _residual(config, channels, channels)

    def forward(self, h: Tensor, cursor: ConditioningCursor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        h = self.run_module(self.resnet_1, h, cursor.shift_of(self.resnet_1))
        h = self.run_module(self.attention, h, *cursor.keys_values_of(self.attention))
        return self.run_module(self.resnet_2, h, cursor.shift_of(self.resnet_2))


class UpBlock(ResolutionLevel):
    """One level of the up path: residual blocks, attention and, except on the finest level, an upsampling convolution."""

    def __init__(self, config: ModelConfig, level: int, inputs: list[int], *, resample: bool):
        super().__init__(config, level, inputs, attentions_first=config.traits.text)
        self.upsampler = _upsampler(config, config.num_channels[level]) if resample else None

    def forward(self, h: Tensor, skips: list[Tensor], cursor: ConditioningCursor) -> Tensor:
        """Apply the level to h (B, C, X, Y, Z).

        Args:
            h: output of the level below.
            skips: one skip connection per residual block, the last of which is used first. The list is not modified, because
                ZeRO-3 passes modules copies of lists.
            cursor: the conditioning.
        """
        for index, skip in enumerate(reversed(skips)):
            h = self.run_block(index, join_channels(h, skip), cursor)
        return h if self.upsampler is None else self.upsample(h, cursor)

    def upsample(self, h: Tensor, cursor: ConditioningCursor) -> Tensor:
        """Double the grid, on a level that has an upsampler."""
        assert self.upsampler is not None
        if isinstance(self.upsampler, ResamplingBlock):
            return self.run_module(self.upsampler, h, cursor.shift_of(self.upsampler))
        return on_three_voxels(self.upsampler, h, scale=2.0)


class UNet3d(nn.Module):
    """The U-Net: `embed` and `project` compute the `Conditioning`, `denoise` the predicted noise.

    Attributes:
        channels_last: whether, on a GPU, all volumes are in channels_last_3d, which its tensor cores require.
    """

    channels_last: bool = True

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
        h, skips = first, [first]  # channels of the current activation and of the skip connections
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

        # Modules of one kind are registered in the order of their use, which `ConditioningCursor` verifies. These are plain
        # lists because the modules are registered already.
        self._residuals = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        self._transformers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]

    def embed(self, timesteps: Tensor, spacing: Tensor, class_vector: Tensor | None) -> Tensor:
        """Embed the conditions.

        Args:
            timesteps: (B,), integer or float.
            spacing: voxel size in mm times 100, (B, 3).
            class_vector: class probabilities times 100, (B, num_classes); ignored if the variant does not use a class.

        Returns:
            The concatenated embeddings, (B, E).
        """
        dtype = _dtype(self)
        parts = [self.time_embed(sinusoidal(timesteps, self.config.num_channels[0]).to(dtype))]
        if self.pirads_layer is not None:
            assert class_vector is not None
            parts.append(self.pirads_layer(class_vector.to(dtype)))
        parts.append(self.spacing_layer(spacing.to(dtype)))
        return torch.cat(parts, dim=1)

    def project(self, embedding: Tensor, context: Tensor | None, class_logits: Tensor | None) -> Conditioning:
        """Project the embedding and the context into every block that uses them.

        Args:
            embedding: the result of `embed`, (B, E).
            context: (B, L, cross_attention_dim), or None for variants without a report.
            class_logits: passed on in the result.
        """
        embedding = F.silu(embedding)
        shifts = tuple(block.shift(embedding) for block in self._residuals)
        keys_values = () if context is None else tuple(block.keys_values(context) for block in self._transformers)
        return Conditioning(shifts, keys_values, class_logits)

    def denoise(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the noise in x.

        Args:
            x: noisy latent, (B, C, X, Y, Z).
            conditioning: the result of `project`.

        Returns:
            (B, C, X, Y, Z), in the dtype of the weights; under autocast, in that of the convolutions.

        Raises:
            ValueError: x has a wrong number of channels, or a grid that the levels cannot halve.
        """
        cursor = self.conditioning_cursor(conditioning)
        skips = [self.input_conv(x)]
        for down in self.down_blocks:
            skips += down(skips[-1], cursor)
        h = self.middle_block(skips[-1], cursor)
        per_level = self.config.num_res_blocks + 1
        for up in self.up_blocks:
            h = up(h, skips[-per_level:], cursor)
            del skips[-per_level:]
        cursor.check_consumed()
        return self.out(h)

    def conditioning_cursor(
        self, conditioning: Conditioning, first_shift: int = 0, first_keys_values: int = 0
    ) -> ConditioningCursor:
        """Return a cursor over `conditioning` for a whole forward pass, or for its end, starting at these entries."""
        return ConditioningCursor(
            zip(self._residuals[first_shift:], conditioning.shifts[first_shift:], strict=True),
            zip(self._transformers[first_keys_values:], conditioning.keys_values[first_keys_values:], strict=True),
        )

    def input_conv(self, x: Tensor) -> Tensor:
        """Validate x and apply the first convolution: (B, C, X, Y, Z) -> (B, num_channels[0], X, Y, Z)."""
        self._check_input(x)
        if self.channels_last and on_gpu(x):
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.conv_in(x.to(_dtype(self)))

    def _check_input(self, x: Tensor) -> None:
        channels, divisor = sum(self.config.latent_channels), self.config.divisor
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, (B, {channels}, X, Y, Z) is expected")
        if any(size % divisor for size in x.shape[2:]):
            raise ValueError(
                f"each axis of the latent grid must be a multiple of {divisor} "
                f"(2 ** (levels - 1) with {len(self.config.num_channels)} levels), got {tuple(x.shape[2:])}"
            )


def _residual(config: ModelConfig, inputs: int, outputs: int) -> ResidualBlock:
    return ResidualBlock(inputs, outputs, _embedding_width(config), config.norm_num_groups, config.norm_eps)


def _downsampler(config: ModelConfig, channels: int) -> nn.Module:
    if config.resblock_updown:
        return ResamplingBlock(channels, _embedding_width(config), config.norm_num_groups, config.norm_eps, up=False)
    return conv3d(channels, channels, 3, stride=2, names=("op", "conv"))


def _upsampler(config: ModelConfig, channels: int) -> nn.Module:
    if config.resblock_updown:
        return ResamplingBlock(channels, _embedding_width(config), config.norm_num_groups, config.norm_eps, up=True)
    return nest(UpsampleConv3d(channels), "postconv", "conv")


def _embedding_width(config: ModelConfig) -> int:
    conditions = 2 if config.traits.class_input == "none" else 3  # timestep, spacing and perhaps the class
    return conditions * 4 * config.num_channels[0]


def _attention(config: ModelConfig, level: int) -> nn.Module:
    channels, head = config.num_channels[level], config.num_head_channels[level]
    groups, eps, fc = config.norm_num_groups, config.norm_eps, config.include_fc
    if config.traits.text:
        return SpatialTransformer(channels, head, config.cross_attention_dim, groups, eps, include_fc=fc)
    return SpatialSelfAttention(channels, head, groups, eps, include_fc=fc)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
