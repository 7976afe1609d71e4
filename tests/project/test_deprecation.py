"""Public names of the previous release: each still works, and says what to write instead."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace

import pytest

from ccella_fast import FastSampler, build_model
from ccella_fast.config import make_config
from ccella_fast.sampling import Optimizations
from sampling_fixtures import TINY

RENAMED = [
    ("sampling", "Levers", "Optimizations"),
    ("sampling", "Generated", "GeneratedVolume"),
    ("models", "Denoiser", "DiffusionModel"),
    ("dropin", "SpedUp", "SpeedUpReport"),
    ("diffusion.solvers", "Plan", "SamplingPlan"),
    ("diffusion.solvers", "Step", "StepResult"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_is_the_new_one_with_a_warning(module, old, new):
    found = importlib.import_module(f"ccella_fast.{module}")
    with pytest.warns(DeprecationWarning, match=f"use ccella_fast.{module}.{new}$") as caught:
        assert getattr(found, old) is getattr(found, new)
    assert caught[0].filename == __file__  # where the name is used, not where it is defined
    with pytest.raises(AttributeError, match=f"{old}s"):
        getattr(found, f"{old}s")


def test_old_arguments_reach_the_new_ones():
    with pytest.warns(DeprecationWarning, match="use precompute_conditioning"):
        assert Optimizations(hoist=False) == Optimizations(precompute_conditioning=False) != Optimizations()
    with pytest.warns(DeprecationWarning):
        assert replace(Optimizations.off(), hoist=True) == replace(Optimizations.off(), precompute_conditioning=True)
    wanted = Optimizations.off()
    model = build_model(make_config({**TINY, "model.variant": "MAISI"}))
    with pytest.warns(DeprecationWarning, match="the argument levers .* use optimizations"):
        assert FastSampler(model, levers=wanted).optimizations is wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FastSampler(model, optimizations=wanted).optimizations is wanted
