"""Feature reuse between steps (DeepCache, Ma et al. 2023, arXiv 2312.00858): an approximation.

The U-Net's deep features change little from one step to the next. On a key step everything is computed, and the feature that
enters the outermost `depth` residual blocks of the up path is kept. On the steps between, only those blocks are computed and
the `depth` skips that they take. At the reference's size depth 1 is 9 % of a step's FLOPs, depth 3 (all of the finest grid)
40 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccella_fast.errors import ConfigError
from ccella_fast.models.unet3d import Conditioning, ConditioningCursor, DownBlock, UNet3d, UpBlock


def check_depth(unet: UNet3d, depth: int) -> None:
    """ConfigError unless the up path has more than `depth` residual blocks."""
    blocks = len(_up_path(unet))
    if not 1 <= depth < blocks:
        fix = f"use 1 to {blocks - 1}: the up path has {blocks} residual blocks"
        raise ConfigError(f"{depth} is not a possible depth", field="reuse.depth", fix=fix)


def denoise_keeping(unet: UNet3d, x: Tensor, conditioning: Conditioning, depth: int) -> tuple[Tensor, Tensor]:
    """What `UNet3d.denoise` predicts, and the feature that enters the last `depth` blocks of the up path."""
    flow = unet.flow(conditioning)
    skips = [unet.enter(x)]
    for down in unet.down_blocks:
        skips += down(skips[-1], flow)
    path = _up_path(unet)
    h = _run_up_path(path[:-depth], unet.middle_block(skips[-1], flow), skips, flow)
    output = _run_up_path(path[-depth:], h, skips, flow)
    flow.check_used_up()
    return unet.out(output), h


def denoise_reusing(unet: UNet3d, x: Tensor, conditioning: Conditioning, depth: int, feature: Tensor) -> Tensor:
    """The predicted noise, from a `feature` that was kept at an earlier timestep; conditioning is this timestep's."""
    flow = unet.flow(conditioning)
    skips = [unet.enter(x)]
    for level, index in _down_path(unet)[: depth - 1]:
        h = skips[-1]
        skips.append(level.block(index, h, flow) if index is not None else _downsampled(level, h))
    path = _up_path(unet)[-depth:]
    attending = sum(bool(level.attentions) for level, _ in path)
    last = len(conditioning.keys_values) - (attending if conditioning.keys_values else 0)
    flow = unet.flow(conditioning, -depth, last)
    output = _run_up_path(path, feature, skips, flow)
    flow.check_used_up()
    return unet.out(output)


def _downsampled(level: DownBlock, h: Tensor) -> Tensor:
    assert level.downsampler is not None
    return level.downsampler(h)


def _down_path(unet: UNet3d) -> list[tuple[DownBlock, int | None]]:
    """What makes the skips after the first, in order: a level's residual block by its index, or None, its downsampler."""
    path: list[tuple[DownBlock, int | None]] = []
    for level in unet.down_blocks:
        assert isinstance(level, DownBlock)
        path += [(level, index) for index in range(len(level.resnets))]
        path += [(level, None)] if level.downsampler is not None else []
    return path


def _up_path(unet: UNet3d) -> list[tuple[UpBlock, int]]:
    levels = [level for level in unet.up_blocks if isinstance(level, UpBlock)]
    return [(level, index) for level in levels for index in range(len(level.resnets))]


def _run_up_path(path: list[tuple[UpBlock, int]], h: Tensor, skips: list[Tensor], flow: ConditioningCursor) -> Tensor:
    """h through blocks of the up path, each with the last of the skips that are left."""
    for level, index in path:
        h = level.block(index, torch.cat([h, skips.pop()], dim=1), flow)
        if index + 1 == len(level.resnets) and level.upsampler is not None:
            h = level.upsampler(h)
    return h
