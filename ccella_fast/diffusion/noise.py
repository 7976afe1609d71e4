"""Randomness that belongs to one sample: the same seed gives the same numbers whatever the batch around it.

Nearby seeds must give unrelated streams, so seed and key are mixed by SHA-256 instead of being added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose: `generator(seed, "start")`, `generator(seed, "noise", epoch, index)`.

    Equal (seed, key) give an equal stream on one kind of device; a CPU and a CUDA stream differ."""
    if not all(type(part) in (int, str) for part in (seed, *key)):
        raise ValueError(f"seed and key are integers and strings, not {[type(part).__name__ for part in (seed, *key)]}")
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits


def randn_per_sample(
    shape: Sequence[int], generators: Sequence[torch.Generator], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal fp32 (B, *shape) on `device`: row i comes from `generators[i]` alone, drawn on its own device."""
    rows = [torch.randn(tuple(shape), generator=source, device=source.device) for source in generators]
    return torch.stack(rows).to(device, non_blocking=True)


def start_noise(shape: Sequence[int], seeds: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """x_T of each seed, fp32 (B, *shape), drawn on the CPU: a deterministic solver starts alike on every device."""
    return randn_per_sample(shape, [generator(seed, "start") for seed in seeds], device=device)
