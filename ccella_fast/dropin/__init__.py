"""Fused kernels for the networks of other projects: `matching` finds modules, `rules` say which are known and replace them."""

from __future__ import annotations

from ccella_fast.deprecation import deprecated_names
from ccella_fast.dropin.matching import SpeedUpReport, speed_up

__all__ = ["SpeedUpReport", "speed_up"]
__getattr__ = deprecated_names(__name__, {"SpedUp": "SpeedUpReport"})
