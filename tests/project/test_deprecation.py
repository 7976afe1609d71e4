"""Public names of the previous release: each still works, and says what to write instead."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace

import pytest
import torch

from ccella_fast import FastSampler, build_model, sample
from ccella_fast.config import make_config
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import get_solver
from ccella_fast.errors import ConfigError
from ccella_fast.sampling import Optimizations, Request
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


def test_old_attributes_and_methods_are_the_new_ones():
    model = build_model(make_config({**TINY, "model.variant": "MAISI"}))
    sampler = FastSampler(
        model, optimizations=Optimizations.off(), config=make_config({**TINY, "model.variant": "MAISI"})
    )
    request = Request(
        seeds=[3, 4, 5], batch_size=2, decode=False, num_inference_steps=2, guidance_interval=(0.2, 0.6), progress=False
    )
    result = sampler(**vars(request))
    for owner, old, new in [
        (sampler, "levers", "optimizations"),
        (sampler.optimizations, "hoist", "precompute_conditioning"),
        (result, "writing", "writer"),
        (result, "jobs", "outputs"),
    ]:
        name = type(owner).__name__
        with pytest.warns(DeprecationWarning, match=rf"^{name}\.{old} is .* use {name}\.{new}$") as caught:
            assert getattr(owner, old) is getattr(owner, new)
        assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"Request\.\w+ is deprecated") as caught:
        assert request.shape(sampler.config) == [4, 8, 6, 4]
        assert request.batch(sampler.config) == 2
        assert request.guidance(sampler.config).interval == (0.2, 0.6)
    assert len(caught) == 3
    with pytest.warns(DeprecationWarning, match="the argument jobs"):
        assert replace(result, jobs=[]).outputs == []


def test_the_old_name_of_the_number_of_steps():
    """In a call it is corrected where the user's line is, and a wrong value is still an error."""
    sampler = FastSampler(build_model(make_config({**TINY, "model.variant": "MAISI"})))
    common = {"seeds": [3], "decode": False, "latent_shape": [4, 4, 4, 4], "progress": False}
    with pytest.warns(DeprecationWarning, match="the argument num_steps .* use num_inference_steps") as caught:
        old = sampler(num_steps=2, **common)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler(num_inference_steps=2, **common).latents, old.latents)
        assert not torch.equal(sampler(num_inference_steps=3, **common).latents, old.latents)
    x_T = torch.ones(1, 3)
    for call in (
        lambda: sample(lambda x, t: x, x_T, num_steps=1001),
        lambda: get_solver("ddim").plan(Schedule.of(None), num_steps=1001),
        lambda: list(sampler.iter(num_steps=1001, **common)),
    ):
        with pytest.warns(DeprecationWarning, match="num_steps"), pytest.raises(ConfigError, match="got 1001"):
            call()
    with pytest.warns(DeprecationWarning, match="num_steps"):
        assert Request(num_steps=7).num_steps == 7


def test_a_checked_request_is_generated_in_part_under_the_old_argument():
    model = build_model(make_config({**TINY, "model.variant": "MAISI"}))
    sampler = FastSampler(model)
    checked = sampler.check(
        Request(seeds=[3, 4, 5], decode=False, num_inference_steps=2, latent_shape=[4, 4, 4, 4], progress=False)
    )
    with pytest.warns(DeprecationWarning, match="the argument only .* use indices"):
        assert [volume.seed for volume in sampler.generate(run=checked, only=[2])] == [5]
