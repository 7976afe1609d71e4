"""Estimates of the memory that sampling needs, and its out-of-memory errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ccella_fast.config import ModelConfig
from ccella_fast.errors import ConfigError
from ccella_fast.foreign_errors import is_out_of_memory
from ccella_fast.hardware import free_memory
from ccella_fast.quantities import format_bytes
from ccella_fast.sampling.conditioning import CACHE_BYTES

_FP32 = 4
_LESS = "use a smaller batch_size, dtype bfloat16, another device or, in Python, a smaller latent_shape"


def activation_bytes(config: ModelConfig, rows: int, grid: list[int], dtype: torch.dtype) -> int:
    """The peak size in bytes of the U-Net's activations.

    It occurs in the first residual block of the finest up level. That block's input is the concatenation of the features of the
    coarser level and a skip connection; all skip connections of the level and the fp32 copies of the norm are alive too.

    Args:
        config: the model's sizes.
        rows: rows per call: the number of volumes, twice that with guidance.
        grid: the latent grid [X, Y, Z].
        dtype: of the activations.
    """
    first = config.num_channels[0]
    coarser = config.num_channels[min(1, len(config.num_channels) - 1)]
    skips, concatenated = (config.num_res_blocks + 1) * first, coarser + first
    voxels = rows * math.prod(grid)
    return voxels * (dtype.itemsize * (skips + coarser + 2 * concatenated) + 3 * _FP32 * concatenated)


def cache_bytes(config: ModelConfig, rows: int, steps: int, dtype: torch.dtype) -> int:
    """The size in bytes of a window of the conditioning cache: the keys and values of every cross-attention."""
    attending = [width for width, on in zip(config.num_channels, config.attention_levels, strict=True) if on]
    widths = (2 * config.num_res_blocks + 1) * sum(attending) + config.num_channels[-1]
    return min(CACHE_BYTES, rows * steps * 2 * widths * config.num_latents * dtype.itemsize)


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Check that `needed` bytes are free on `device`.

    Raises:
        ConfigError: with the estimate and three remedies.
    """
    free = free_memory(device)
    if needed > free:
        estimate, available = format_bytes(needed), format_bytes(free)
        why = f"{what} needs about {estimate} in addition to the weights, but only {available} are free"
        raise ConfigError(why, field="batch_size", fix=_LESS)


@contextmanager
def out_of_memory(what: str, needed: int | None = None, *, fix: str = _LESS) -> Iterator[None]:
    """Convert out-of-memory errors of the allocators to ConfigError.

    Args:
        what: the operation.
        needed: the estimate of its size in bytes, if there is one.
        fix: what to do.
    """
    what += "" if needed is None else f" (estimated: {format_bytes(needed)} in addition to the weights)"
    try:
        yield
    except Exception as bad:
        if not is_out_of_memory(bad):
            raise
        where = "the GPU" if isinstance(bad, torch.OutOfMemoryError) else "the machine"
        raise ConfigError(f"{what}: {where} is out of memory", field="batch_size", fix=fix) from None
