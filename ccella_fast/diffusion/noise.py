"""Per-sample random numbers: a seed gives the same numbers in any batch.

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

    Equal (seed, key) give an equal stream on one type of device; CPU and CUDA streams differ.

    Raises:
        ValueError: the seed or a part of the key is neither an integer nor a string.
    """
    if not all(type(part) in (int, str) for part in (seed, *key)):
        types = [type(part).__name__ for part in (seed, *key)]
        raise ValueError(f"seed and key must be integers and strings, got {types}")
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits


def randn_per_sample(
    shape: Sequence[int], generators: Sequence[torch.Generator], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal fp32 noise (B, *shape) on `device`; row i is drawn from `generators[i]`, on that generator's device."""
    rows = [torch.randn(tuple(shape), generator=each, device=each.device) for each in generators]
    return torch.stack(rows).to(device, non_blocking=True)


def start_noise(shape: Sequence[int], seeds: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """x_T for each seed, fp32 (B, *shape). Drawn on the CPU, so that the starting noise is the same on every device."""
    return randn_per_sample(shape, [generator(seed, "start") for seed in seeds], device=device)
