"""Evaluation of generated volumes: are they good, are they new, and do they show what the report says?

Every metric is a function on arrays of features of shape (n, d). This package imports neither `ccella_fast.sampling` nor
`ccella_fast.training`, so it judges the volumes of any generator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ccella_fast.evaluation.copying import memorisation
    from ccella_fast.evaluation.frechet import frechet_distance
    from ccella_fast.evaluation.mmd import kernel_distance
    from ccella_fast.evaluation.neighbours import precision_recall
    from ccella_fast.evaluation.run import evaluate
    from ccella_fast.evaluation.volumes import Volume, VolumeSet, open_volumes

__all__ = [
    "Volume",
    "VolumeSet",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "memorisation",
    "open_volumes",
    "precision_recall",
]

# Imported on first use: `ccella-fast --help` must answer before torch is loaded. No function has the name of a module of this
# package: the import of such a module would replace the function.
_HOMES = {
    "Volume": "volumes",
    "VolumeSet": "volumes",
    "evaluate": "run",
    "frechet_distance": "frechet",
    "kernel_distance": "mmd",
    "memorisation": "copying",
    "open_volumes": "volumes",
    "precision_recall": "neighbours",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
