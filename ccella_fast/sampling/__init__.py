"""Sampling: `FastSampler` for Python, `folder.sample_to_folder` behind `ccella-fast sample`."""

from __future__ import annotations

from ccella_fast.sampling.fast_sampler import FastSampler
from ccella_fast.sampling.guidance import Reuse
from ccella_fast.sampling.levers import Levers
from ccella_fast.sampling.request import Request
from ccella_fast.sampling.results import Generated, Result

__all__ = ["FastSampler", "Generated", "Levers", "Request", "Result", "Reuse"]
