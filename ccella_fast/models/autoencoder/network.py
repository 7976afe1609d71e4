"""The autoencoder between images and latents: `AutoencoderKlMaisi` of MAISI (Guo et al. 2024).

docs/explanation/method.md, section 2.5. Weights of the reference implementation load unchanged. Its split convolutions,
group-by-group norms and cache flushes affect only time and memory and are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import AutoencoderConfig
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.kernels.upsample_trilinear import upsample_trilinear
from ccella_fast.models.autoencoder.tiling import can_tile, run_tiled, tiling_plan_for
from ccella_fast.models.autoencoder.tiling_plan import TiledConv, TilingPlan, find_conv3d, residual_block_convs
from ccella_fast.models.blocks import conv3d, nest

_NAMES = ("conv", "conv")  # the reference implementation wraps most convolutions twice


class AutoencoderResidualBlock(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1 x))))) + shortcut(x)."""

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, inputs, eps)
        self.conv1 = conv3d(inputs, outputs, 3, names=_NAMES)
        self.norm2 = GroupNormSiLU(groups, outputs, eps)
        self.conv2 = conv3d(outputs, outputs, 3, names=_NAMES)
        self.nin_shortcut = nn.Identity() if inputs == outputs else conv3d(inputs, outputs, 1, names=_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, X, Y, Z) -> (B, outputs, X, Y, Z)."""
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))

    def tiled_convs(self, name: str) -> list[TiledConv]:
        """See `AutoencoderBlocks.tiled_convs`."""
        return residual_block_convs(name, self)


class Downsample(nn.Module):
    """A plane of zeros appended to each axis, then a 3x3x3 convolution of stride 2 without padding."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nest(nn.Conv3d(channels, channels, 3, stride=2), *_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X/2, Y/2, Z/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1, 0, 1)))

    def tiled_convs(self, name: str) -> list[TiledConv]:
        """See `AutoencoderBlocks.tiled_convs`."""
        return [TiledConv(f"{name}.conv", find_conv3d(self.conv), resample="down")]


class Upsample(nn.Module):
    """Trilinear upsampling by 2, then a 3x3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3d(channels, channels, 3, names=_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z)."""
        return self.conv(upsample_trilinear(x))

    def tiled_convs(self, name: str) -> list[TiledConv]:
        """See `AutoencoderBlocks.tiled_convs`."""
        return [TiledConv(f"{name}.conv", find_conv3d(self.conv), resample="up")]


class AutoencoderBlocks(nn.Module):
    """The encoder or decoder: a convolution, residual blocks and resampling for each level, a norm and a convolution."""

    def __init__(
        self,
        config: AutoencoderConfig,
        inputs: int,
        outputs: int,
        levels: list[tuple[int, int]],
        resample: type[Downsample] | type[Upsample],
    ):
        """Create the blocks.

        Args:
            config: the norm settings.
            inputs: input channels.
            outputs: output channels.
            levels: (width, number of residual blocks) of each level, in the order of the data flow.
            resample: the block between two levels.
        """
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        width = levels[0][0]
        blocks: list[nn.Module] = [conv3d(inputs, width, 3, names=_NAMES)]
        for level, (level_width, count) in enumerate(levels):
            for _ in range(count):
                blocks.append(AutoencoderResidualBlock(width, level_width, groups, eps))
                width = level_width
            if level != len(levels) - 1:
                blocks.append(resample(width))
        # As in the reference implementation, there is no activation between the last norm and the last convolution.
        blocks += [GroupNormSiLU(groups, width, eps, silu=False), conv3d(width, outputs, 3, names=_NAMES)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *, memory: int | None = None) -> Tensor:
        """Apply the blocks to x (B, inputs, X, Y, Z); see `Autoencoder.decode` for `memory`."""
        if can_tile(self, x, memory):
            return run_tiled(self.tiled_convs(), x, memory)
        for block in self.blocks:
            x = block(x)
        return x

    def plan(self, shape: tuple[int, ...], device: torch.device, memory: int | None = None) -> TilingPlan:
        """Return the plan with which one volume of `shape` (C, X, Y, Z) is computed when no gradients are needed."""
        return tiling_plan_for(self.tiled_convs(), shape, device, memory)

    def tiled_convs(self) -> list[TiledConv]:
        """Return the same computation as a list of convolutions, for `tiling.run_tiled`."""
        last = len(self.blocks) - 1
        convs = [TiledConv("0", find_conv3d(self.blocks[0]))]
        for index, block in enumerate(self.blocks[1:-2], start=1):
            assert isinstance(block, AutoencoderResidualBlock | Downsample | Upsample)
            convs += block.tiled_convs(str(index))
        norm = self.blocks[-2]
        assert isinstance(norm, GroupNormSiLU)
        return [*convs, TiledConv(str(last), find_conv3d(self.blocks[-1]), norm)]


class Autoencoder(nn.Module):
    """Images (B, in_channels, X, Y, Z) <-> latents (B, latent_channels, X/f, Y/f, Z/f) with f = `config.factor`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        levels = list(zip(config.num_channels, config.num_res_blocks, strict=True))
        latent = config.latent_channels
        self.encoder = AutoencoderBlocks(config, config.in_channels, latent, levels, Downsample)
        self.decoder = AutoencoderBlocks(config, latent, config.out_channels, levels[::-1], Upsample)
        self.quant_conv_mu = conv3d(latent, latent, 1)
        self.quant_conv_log_sigma = conv3d(latent, latent, 1)
        self.post_quant_conv = conv3d(latent, latent, 1)

    def encode(self, x: Tensor, *, memory: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            x: images, (B, in_channels, X, Y, Z).
            memory: as in `decode`.

        Returns:
            Mean and standard deviation of the posterior, (B, latent_channels, X/f, Y/f, Z/f) each.

        Raises:
            ConfigError: as in `decode`.
            ValueError: as in `decode`, or an axis is not a multiple of `config.factor`.
        """
        factor = self.config.factor
        if any(size % factor for size in x.shape[2:]):
            raise ValueError(f"each axis of the image must be a multiple of {factor}, got {tuple(x.shape[2:])}")
        h = self.encoder(x, memory=memory)
        log_variance = self.quant_conv_log_sigma(h).clamp(-30.0, 20.0)
        return self.quant_conv_mu(h), torch.exp(0.5 * log_variance)

    def decode(self, z: Tensor, *, memory: int | None = None) -> Tensor:
        """Decode latents that have been divided by the scale factor.

        Without gradients, volumes are decoded one at a time, whole or in exact slabs, depending on the memory.

        Args:
            z: latents, (B, latent_channels, X, Y, Z).
            memory: bytes that may be allocated on the device; by default three quarters of the free memory.

        Returns:
            Images (B, out_channels, fX, fY, fZ), not clipped.

        Raises:
            ConfigError: the memory is not sufficient for any tiling.
            ValueError: `memory` is given although gradients are needed.
        """
        return self.decoder(self.post_quant_conv(z), memory=memory)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode images, for training.

        Args:
            x: images, (B, in_channels, X, Y, Z).
            noise: standard normal noise of the shape of the latents; None decodes the mean.

        Returns:
            The reconstruction from mean + sigma * noise, mean and sigma.
        """
        mean, sigma = self.encode(x)
        return self.decode(mean if noise is None else mean + sigma * noise), mean, sigma
