"""Are generated volumes good, new, and what the report says?

See docs/how-to/evaluate.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume, VolumeSet, open_volumes

__all__ = ["Volume", "VolumeSet", "open_volumes"]

# Imported on first use: `import ccella_fast.evaluation` must not load torch.
_HOMES = {"Volume": "volumes", "VolumeSet": "volumes", "open_volumes": "volumes"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
