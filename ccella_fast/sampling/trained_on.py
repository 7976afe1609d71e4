"""What the training of a checkpoint has seen, and what a request asks beyond that.

Training writes `trained_on` to training_state.json: the number of studies of each class that the class head learned from, and
the smallest and largest voxel size along each axis. Checkpoints of earlier releases and of the reference do not have it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ccella_fast.config import Config
from ccella_fast.data.augmentation.parameters import augmented_spacings

logger = logging.getLogger("ccella_fast")
_TOLERANCE = 0.01  # relative; spacings of headers are rounded


def class_head_state(config: Config, trained_on: dict[str, Any] | None) -> str | None:
    """Whether predicted classes mean something: "trained", "untrained" or "unknown"; None if the variant predicts none.

    A head has learned classes if its loss had a weight and it saw studies of both classes with their reports.
    """
    if config.model.traits.class_input != "predicted":
        return None
    if config.class_loss_weight == 0 or config.training.report_dropout == 1:
        return "untrained"
    if trained_on is None:
        return "unknown"
    return "trained" if min(trained_on["classes"]) > 0 else "untrained"


def warn_of_untrained_spacings(
    spacings: Sequence[Sequence[float]], grid: Sequence[int], config: Config, trained_on: dict[str, Any] | None
) -> None:
    """Warn of voxel sizes and fields of view that the training data did not have.

    Args:
        spacings: voxel sizes in mm.
        grid: voxels of the volumes.
        config: the configuration of the training.
        trained_on: from training_state.json; None: the configured voxel size and its augmentation are taken as trained.
    """
    low, high = trained_spacings(config, trained_on)
    trained_fields = [_products(spacing, config.data.dim) for spacing in (low, high)]
    for spacing in dict.fromkeys(map(tuple, spacings)):
        _warn_if_outside("spacing", spacing, low, high)
        _warn_if_outside("field of view", _products(spacing, grid), *trained_fields)


def _warn_if_outside(what: str, lengths: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
    limits = list(zip(low, high, strict=True))
    inside = (
        (1 - _TOLERANCE) * least <= length <= (1 + _TOLERANCE) * most
        for length, (least, most) in zip(lengths, limits, strict=True)
    )
    if not all(inside):
        got = " x ".join(f"{length:g}" for length in lengths)
        trained = " x ".join(f"{a:g}" if a == b else f"({a:.3g} to {b:.3g})" for a, b in limits)
        why = "the %s of %s mm is outside of what the model was trained on, %s mm: volumes may be implausible"
        logger.warning(why, what, got, trained)


def _products(spacing: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [step * size for step, size in zip(spacing, sizes, strict=True)]


def trained_spacings(config: Config, trained_on: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """The smallest and the largest voxel size of the training along R, A, S, in mm."""
    if trained_on is not None:
        low, high = trained_on["spacing"]
        return low, high
    spacing = config.data.spacing
    return augmented_spacings(config.augmentation, spacing, spacing)
