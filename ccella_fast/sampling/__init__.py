"""Sampling: `FastSampler` is the Python API; `command.sample_to_folder` implements `ccella-fast sample`."""

from __future__ import annotations

from ccella_fast.deprecation import deprecated_names
from ccella_fast.sampling.guidance import Reuse
from ccella_fast.sampling.optimizations import Optimizations
from ccella_fast.sampling.output import GeneratedVolume, Result
from ccella_fast.sampling.request import Request
from ccella_fast.sampling.sampler import FastSampler

__all__ = ["FastSampler", "GeneratedVolume", "Optimizations", "Request", "Result", "Reuse"]
__getattr__ = deprecated_names(__name__, {"Generated": "GeneratedVolume", "Levers": "Optimizations"})
