"""The autoencoder between images and latents: MAISI's `AutoencoderKlMaisi` (Guo et al. 2024), computed plainly.

docs/explanation/method.md, section 2.5. Its weights load unchanged. The reference's split convolutions, group-by-group norms
and cache flushes are left out: they change nothing but time and memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.config import AutoencoderConfig
from ccella_fast.errors import CheckpointError
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.models.autoencoder.tiling import can_tile, run_tiled, tiling_plan_for
from ccella_fast.models.autoencoder.tiling_plan import TiledConv, TilingPlan
from ccella_fast.models.blocks import conv3d, nest
from ccella_fast.models.weights import load_weights, plain_tensors, read_pt
from ccella_fast.storage import atomic_path, read_json, sha256, write_json

FORMAT = {"format": "ccella_fast.autoencoder", "version": 1}
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


def save_autoencoder(vae: Autoencoder, folder: str | Path) -> None:
    """Write config.json, model.safetensors (float32, the reference's names) and, last, manifest.json with their SHA-256."""
    folder = Path(folder)
    write_json(folder / "config.json", vae.config.model_dump(mode="json"))
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    hashes = {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}
    write_json(folder / "manifest.json", {**FORMAT, "sha256": hashes})


def load_autoencoder(path: str | Path, config: AutoencoderConfig | None = None) -> Autoencoder:
    """Load a folder written by `save_autoencoder`, a folder with such a `vae/` inside, or a bare reference `.pt` state dict.

    config: what is expected; a `.pt` file is built with it (default: MAISI's sizes). On the CPU, in eval mode.
    Raises CheckpointError when anything is missing, damaged, or of another architecture: never a random autoencoder."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            "there are no autoencoder weights here", path=path, fix="run `ccella-fast train-vae` first"
        )
    if path.is_file():
        config = config or AutoencoderConfig()
        tensors = plain_tensors(read_pt(path), path=path)
    else:
        file = weights_file(path)
        config = _stored_config(file.parent, config)
        tensors = _read_safetensors(file)
    vae = Autoencoder(config)
    load_weights(vae, tensors, path=path, what="this autoencoder")
    return vae.eval().requires_grad_(False)


def weights_file(path: str | Path) -> Path:
    """The file with the weights that `load_autoencoder(path)` reads."""
    path = Path(path)
    if path.is_file():
        return path
    return (path / "vae" if (path / "vae").is_dir() else path) / "model.safetensors"


def _stored_config(folder: Path, expected: AutoencoderConfig | None) -> AutoencoderConfig:
    manifest = read_json(folder / "manifest.json", error=CheckpointError)
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in FORMAT} != FORMAT:
        fix = "name a folder that `ccella-fast train-vae` wrote"
        raise CheckpointError("this is not the manifest of an autoencoder", path=folder / "manifest.json", fix=fix)
    hashes = manifest.get("sha256")
    for name in ("config.json", "model.safetensors"):
        file = folder / name
        if not file.is_file():
            raise CheckpointError("this file is missing", path=file, fix="copy the whole folder again")
        if not isinstance(hashes, dict) or sha256(file) != hashes.get(name):
            raise CheckpointError("damaged: the SHA-256 differs from the manifest's", path=file, fix="copy it again")
    stored = read_json(folder / "config.json", error=CheckpointError)
    try:
        config = AutoencoderConfig.model_validate(stored)
    except ValueError as bad:
        first = str(bad).splitlines()[0]
        raise CheckpointError(f"not an autoencoder's settings: {first}", path=folder / "config.json") from None
    for key, value in (expected or config).model_dump().items():
        if getattr(config, key) != value:
            why = f"these weights have {key} {getattr(config, key)}, the configuration says {value}"
            fix = "use the configuration of their training, or train another autoencoder"
            raise CheckpointError(why, path=folder, field=f"autoencoder.{key}", fix=fix)
    return config


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as bad:
        raise CheckpointError(f"not a readable safetensors file: {bad}", path=file, fix="copy it again") from None
