"""The choice of the engine that reads and augments volumes: DALI on a GPU, torch elsewhere, or as configured."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Literal

import torch

from ccella_fast.config import AugmentationConfig
from ccella_fast.data.augmentation.engine import AugmentationEngine
from ccella_fast.errors import ConfigError
from ccella_fast.optional import install

logger = logging.getLogger("ccella_fast")


def check_engine(choice: str) -> None:
    """Check that the configured engine is available, for callers that write files before they create an engine.

    Raises:
        ConfigError: `choice` is "dali" and DALI cannot be used.
    """
    missing = _why_dali_is_unavailable() if choice == "dali" else None
    if missing:
        fix = f"{install('nvidia')}, or set data.engine=auto"
        raise ConfigError(f"DALI cannot be used: {missing}", field="data.engine", fix=fix)


def make_engine(
    choice: Literal["auto", "dali", "torch"], config: AugmentationConfig, device: torch.device, size: Sequence[int]
) -> AugmentationEngine:
    """Create the engine for volumes of `size` voxels on `device` and log the choice with its reason.

    Raises:
        ConfigError: as in `check_engine`.
    """
    check_engine(choice)
    missing = _why_dali_is_unavailable()
    if choice == "auto":
        if device.type != "cuda":
            choice, reason = "torch", "it is faster on a CPU"
        elif missing:
            choice, reason = "torch", f"DALI cannot be used: {missing}"
        else:
            choice, reason = "dali", "a GPU is available"
    else:
        reason = "as configured"
    logger.info("volumes are loaded and augmented by %s (%s)", choice, reason)
    if choice == "dali":
        from ccella_fast.data.augmentation.dali_engine import DaliEngine

        return DaliEngine(config, device, size)
    from ccella_fast.data.augmentation.torch_engine import TorchEngine

    return TorchEngine(config, device, size)


def _why_dali_is_unavailable() -> str | None:
    """The reason why DALI cannot be used, or None. It is imported because an installed DALI may not match Python or CUDA."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "it is not installed"
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"it cannot be imported ({' '.join(str(error).split()):.80})"
    return None
