"""Our kernels in other projects' MONAI networks: `matching` finds the modules, `replacements` holds what takes their place."""

from __future__ import annotations

from ccella_fast.deprecation import deprecated_names
from ccella_fast.dropin.matching import SpeedUpReport, speed_up

__all__ = ["SpeedUpReport", "speed_up"]
__getattr__ = deprecated_names(__name__, {"SpedUp": "SpeedUpReport"})
