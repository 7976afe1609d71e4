"""The autoencoder between images and latents: MAISI's `AutoencoderKlMaisi` (Guo et al. 2024), computed plainly.

docs/explanation/method.md, section 2.5. Its weights load unchanged. The reference's split convolutions, group-by-group norms
and cache flushes are left out: they change nothing but time and memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import AutoencoderConfig
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.models.autoencoder.tiling import can_tile, run_tiled, tiling_plan_for
from ccella_fast.models.autoencoder.tiling_plan import TiledConv, TilingPlan
from ccella_fast.models.blocks import conv3d, nest

_NAMES = ("conv", "conv")  # the reference wraps most convolutions twice


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
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))

    def passes(self, name: str) -> list[TiledConv]:
        branch = None if isinstance(self.nin_shortcut, nn.Identity) else _leaf(self.nin_shortcut)
        return [
            TiledConv(f"{name}.conv1", _leaf(self.conv1), self.norm1, opens=True, branch=branch),
            TiledConv(f"{name}.conv2", _leaf(self.conv2), self.norm2, adds=True),
        ]


class Downsample(nn.Module):
    """One voxel of zeros at the high end of each axis, then a 3x3x3 convolution of stride 2 without padding."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nest(nn.Conv3d(channels, channels, 3, stride=2), *_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1, 0, 1)))

    def passes(self, name: str) -> list[TiledConv]:
        return [TiledConv(f"{name}.conv", _leaf(self.conv), resample="down")]


class Upsample(nn.Module):
    """Trilinear x2 (corners not aligned), then a 3x3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3d(channels, channels, 3, names=_NAMES)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False))

    def passes(self, name: str) -> list[TiledConv]:
        return [TiledConv(f"{name}.conv", _leaf(self.conv), resample="up")]


class AutoencoderBlocks(nn.Module):
    """Encoder or decoder: convolution, per level residual blocks and a resampling, norm, convolution."""

    def __init__(
        self,
        config: AutoencoderConfig,
        inputs: int,
        outputs: int,
        levels: list[tuple[int, int]],
        resample: type[Downsample] | type[Upsample],
    ):
        """levels: (width, number of residual blocks), in the order of the data flow."""
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
        # No activation between the last norm and the last convolution: so it is in the reference.
        blocks += [GroupNormSiLU(groups, width, eps, silu=False), conv3d(width, outputs, 3, names=_NAMES)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *, memory: int | None = None) -> Tensor:
        if can_tile(self, x, memory):
            return run_tiled(self.passes(), x, memory)
        for block in self.blocks:
            x = block(x)
        return x

    def plan(self, shape: tuple[int, ...], device: torch.device, memory: int | None = None) -> TilingPlan:
        """How one volume of `shape` (C, X, Y, Z) would go through without gradients."""
        return tiling_plan_for(self.passes(), shape, device, memory)

    def passes(self) -> list[TiledConv]:
        """The same computation, convolution by convolution."""
        last = len(self.blocks) - 1
        passes = [TiledConv("0", _leaf(self.blocks[0]))]
        for number, block in enumerate(self.blocks[1:-2], start=1):
            assert isinstance(block, AutoencoderResidualBlock | Downsample | Upsample)
            passes += block.passes(str(number))
        norm = self.blocks[-2]
        assert isinstance(norm, GroupNormSiLU)
        return [*passes, TiledConv(str(last), _leaf(self.blocks[-1]), norm)]


def _leaf(module: nn.Module) -> nn.Conv3d:
    """The convolution below the reference's names."""
    return next(child for child in module.modules() if isinstance(child, nn.Conv3d))


class Autoencoder(nn.Module):
    """Images (B, in_channels, X, Y, Z) <-> latents (B, latent_channels, X/f, Y/f, Z/f), f = `config.factor`."""

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
        """Mean and standard deviation of the posterior. `memory`: see `decode`.

        Raises ValueError when `config.factor` does not divide an axis."""
        factor = self.config.factor
        if any(size % factor for size in x.shape[2:]):
            raise ValueError(
                f"the image grid {tuple(x.shape[2:])} does not fit: each axis must be a multiple of {factor}"
            )
        h = self.encoder(x, memory=memory)
        log_variance = self.quant_conv_log_sigma(h).clamp(-30.0, 20.0)
        return self.quant_conv_mu(h), torch.exp(0.5 * log_variance)

    def decode(self, z: Tensor, *, memory: int | None = None) -> Tensor:
        """The image of a latent that has been divided by the scale factor. Not clipped.

        Without gradients, one volume after the other goes through whole, or in exact tiles where the memory asks for it.
        memory: bytes that may be allocated on the device (default: three quarters of what is free). Raises ConfigError when
        they are too few for any tiling, ValueError when `memory` is given although gradients are needed."""
        return self.decoder(self.post_quant_conv(z), memory=memory)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mean, sigma), decoded from mean + sigma * noise, or from the mean alone. Used in training."""
        mean, sigma = self.encode(x)
        return self.decode(mean if noise is None else mean + sigma * noise), mean, sigma
