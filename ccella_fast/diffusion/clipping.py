"""Limits of the estimated clean sample: clipping, and the dynamic thresholding of Imagen (Saharia et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ccella_fast.errors import ConfigError


@dataclass(frozen=True)
class Clip:
    """Clamps to [low, high]."""

    low: float = -1.0
    high: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 (B, ...), clamped."""
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clamps each sample to [-s, s] and divides it by s, where s is a quantile of its absolute values, from 1 to `maximum`.

    Equal to diffusers' thresholding=True with dynamic_thresholding_ratio=ratio and sample_max_value=maximum (arXiv 2205.11487,
    section 2.3).

    Args:
        ratio: the quantile.
        maximum: the largest s; the default of diffusers, 1, is the same as clipping to [-1, 1].
    """

    ratio: float = 0.995
    maximum: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio must be above 0 and at most 1, got {self.ratio}", field="ratio", fix="use 0.995")
        if not self.maximum >= 1:
            raise ConfigError(f"maximum must be at least 1, got {self.maximum}", field="maximum", fix="use 1 or more")

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 (B, ...), thresholded."""
        s = _quantile(x0.abs().reshape(len(x0), -1), self.ratio).clamp(1, self.maximum).view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s


def clip_of(given: Any) -> Clip | DynamicThreshold | None:
    """What `clip_x0` of {py:func}`ccella_fast.sample` describes: None, a number r for [-r, r], a pair, or an object from here.

    Raises:
        ConfigError: it is none of these.
    """
    if given is None or isinstance(given, (Clip, DynamicThreshold)):
        return given
    if isinstance(given, Real) and not isinstance(given, bool) and float(given) > 0:
        return Clip(-float(given), float(given))
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(end, Real) for end in given):
        low, high = map(float, given)
        if low < high:
            return Clip(low, high)
    why = f"clip_x0 must be a positive number, an increasing pair or a DynamicThreshold, got {given!r:.40}"
    raise ConfigError(why, field="clip_x0", fix="write clip_x0=1.0 for [-1, 1]")


def _quantile(values: Tensor, ratio: float) -> Tensor:
    """(B,): the quantile of each row of (B, n). torch.quantile is limited to 2^24 values."""
    rank = ratio * (values.shape[1] - 1)
    below = int(rank)
    largest = values.topk(values.shape[1] - below, dim=1).values
    return torch.lerp(largest[:, -1], largest[:, max(len(largest[0]) - 2, 0)], rank - below)
