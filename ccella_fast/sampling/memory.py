"""How much memory sampling takes, before it is taken, and what to do when there is too little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ccella_fast.config import ModelConfig
from ccella_fast.errors import ConfigError
from ccella_fast.hardware import free_memory
from ccella_fast.sampling.conditioning import TABLE_BYTES

_FP32 = 4


def activation_bytes(config: ModelConfig, rows: int, grid: list[int], dtype: torch.dtype) -> int:
    """Peak of the U-Net's activations for `rows` rows (twice the volumes with guidance), on a latent grid [X, Y, Z].

    The peak is in the first residual block of the finest up level: its input is the concatenation of what comes from below
    and a skip; beside it lie all skips of that level, and the norm's fp32 copies."""
    first = config.num_channels[0]
    below = config.num_channels[min(1, len(config.num_channels) - 1)]
    skips, entering = (config.num_res_blocks + 1) * first, below + first
    voxels = rows * math.prod(grid)
    return voxels * (dtype.itemsize * (skips + below + 2 * entering) + 3 * _FP32 * entering)


def table_bytes(config: ModelConfig, rows: int, steps: int, dtype: torch.dtype) -> int:
    """A window of the conditioning table: keys and values of every cross-attention."""
    attending = [width for width, on in zip(config.num_channels, config.attention_levels, strict=True) if on]
    widths = (2 * config.num_res_blocks + 1) * sum(attending) + config.num_channels[-1]
    return min(TABLE_BYTES, rows * steps * 2 * widths * config.num_latents * dtype.itemsize)


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """ConfigError with the estimate and three remedies when `needed` bytes are not free."""
    free = free_memory(device)
    if needed > free:
        raise _too_much(
            f"{what} needs about {needed / 2**30:.1f} GiB beside the weights, {free / 2**30:.1f} GiB are free"
        )


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """The allocator's errors in the user's words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise _too_much(f"{what}: the GPU's memory is used up") from None
    except RuntimeError as bad:
        if "can't allocate memory" not in str(bad) and "not enough memory" not in str(bad):
            raise
        raise _too_much(f"{what}: this machine's memory is used up") from None


def _too_much(why: str) -> ConfigError:
    return ConfigError(why, field="batch_size", fix="a smaller batch_size, dtype bfloat16, or a smaller latent_shape")
