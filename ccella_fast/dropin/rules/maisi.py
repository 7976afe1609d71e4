"""MAISI's autoencoder: without split convolutions, loops over groups and cache flushes, and with exact tiling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.dropin import fusion
from ccella_fast.dropin.layers import has_hooks
from ccella_fast.dropin.replacement import Replacement, ReplacementMixin, Replacements, Rule, plain_forward
from ccella_fast.dropin.rules.monai import AutoencoderResBlock
from ccella_fast.dropin.rules.torch_layers import block_with_two_norms
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.models.autoencoder.tiling import can_tile, run_tiled
from ccella_fast.models.autoencoder.tiling_plan import TiledConv, find_conv3d, residual_block_convs


class MaisiResBlock(AutoencoderResBlock):
    """Replaces `MaisiResBlock`, without cache flushes."""

    def suits(self, x: Tensor) -> bool:
        """Whether the norms are those of MAISI without hooks."""
        norms = (self.norm1, self.norm2)
        return all(
            plain_forward(each).__qualname__ == "MaisiGroupNorm3D.forward" and not has_hooks(each) for each in norms
        )


class MaisiGroupNorm(ReplacementMixin):
    """Replaces `MaisiGroupNorm3D`, which computes one group at a time."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X, Y, Z)."""
        return fusion.norm(self, input, silu=False)


class _TiledNorm(GroupNormSiLU):
    """The norm of a block as `run_tiled` needs it, with the weights of `layer`."""

    def __init__(self, layer: Any, *, silu: bool):
        super().__init__(layer.num_groups, layer.num_channels, layer.eps, silu=silu)
        self.weight, self.bias, self.norm_float16 = layer.weight, layer.bias, layer.norm_float16

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalize x (B, C, X, Y, Z) after adding the shift (B, C)."""
        return fusion.norm(self, x, silu=self.silu, shift=shift)


class MaisiConvolution(ReplacementMixin):
    """Replaces `MaisiConvolution`, without splits."""

    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, X', Y', Z')."""
        return self.conv(x)


class MaisiUpsample(ReplacementMixin):
    """Replaces `MaisiUpsample`, without splits."""

    use_convtranspose: bool
    conv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z)."""
        return self.conv(x if self.use_convtranspose else F.interpolate(x, scale_factor=2.0, mode="trilinear"))


class MaisiBlocks(ReplacementMixin):
    """Replaces `MaisiEncoder` and `MaisiDecoder`, without cache flushes."""

    blocks: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks to x (B, C, X, Y, Z)."""
        for block in self.blocks:
            x = block(x)
        return x


class TiledMaisi(MaisiBlocks):
    """Replaces `MaisiEncoder` and `MaisiDecoder`; without gradients, in exact slabs that fit the free memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks to x (B, C, X, Y, Z)."""
        return run_tiled(self._tiled_convs(), x) if can_tile(self, x) else super().forward(x)

    def _tiled_convs(self) -> list[TiledConv]:
        convs: list[TiledConv] = []
        for index, block in enumerate(self.blocks):
            name = str(index)
            if isinstance(block, MaisiResBlock):
                norms = [_TiledNorm(layer, silu=True) for layer in (block.norm1, block.norm2)]
                tiled = residual_block_convs(name, block)
                convs += [conv._replace(norm=each) for conv, each in zip(tiled, norms, strict=True)]
            elif not isinstance(block, MaisiGroupNorm):
                previous: Any = self.blocks[index - 1] if index else None
                tiled_norm = _TiledNorm(previous, silu=False) if isinstance(previous, MaisiGroupNorm) else None
                resample = "up" if isinstance(block, MaisiUpsample) else "down" if hasattr(block, "pad") else ""
                convs.append(TiledConv(name, find_conv3d(block), tiled_norm, resample))
        return convs


def _maisi_block(module: Any) -> Replacements:
    yield from block_with_two_norms("unsplit", module, MaisiResBlock)


def _maisi_layer(mixin: type[ReplacementMixin]) -> Rule:
    def rule(module: Any) -> Replacements:
        yield Replacement("unsplit", module, mixin)

    return rule


def _maisi_network(module: Any) -> Replacements:
    owners = {plain_forward(block).__qualname__.removesuffix(".forward") for block in module.blocks}
    known = {"MaisiConvolution", "MaisiResBlock", "MaisiUpsample", "MaisiDownsample", "MaisiGroupNorm3D"}
    transposed = any(getattr(block, "use_convtranspose", False) for block in module.blocks)
    can_tile = owners <= known and not transposed
    yield Replacement("unsplit", module, TiledMaisi if can_tile else MaisiBlocks)


# By name: these methods also write to the log and free memory, which is not read as a program.
_NETWORKS = "monai.apps.generation.maisi.networks.autoencoderkl_maisi."
RULES: dict[Any, Rule] = {
    _NETWORKS + "MaisiResBlock": _maisi_block,
    _NETWORKS + "MaisiConvolution": _maisi_layer(MaisiConvolution),
    _NETWORKS + "MaisiGroupNorm3D": _maisi_layer(MaisiGroupNorm),
    _NETWORKS + "MaisiUpsample": _maisi_layer(MaisiUpsample),
    _NETWORKS + "MaisiEncoder": _maisi_network,
    _NETWORKS + "MaisiDecoder": _maisi_network,
}
