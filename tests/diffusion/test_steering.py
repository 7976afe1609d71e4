"""What steers a trajectory: a start part-way, a known region, limits of x0 and guidance, against the loops of diffusers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from ccella_fast import DynamicThreshold, Edm, RectifiedFlow, guided, sample
from ccella_fast.diffusion.solvers import Ddim
from ccella_fast.errors import ConfigError
from diffusion_fixtures import SCHEDULE, SHAPE, network
from kernel_fixtures import draw


@pytest.fixture(autouse=True)
def no_plausibility_check(monkeypatch):
    """These networks do not predict anything; `test_plausibility.py` tests the check."""
    monkeypatch.setattr("ccella_fast.diffusion.plausibility.plausible_slopes", lambda *_: None)


# Part of a trajectory


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_image_to_image_as_in_diffusers(name, strength):
    """The loop of its image-to-image pipelines."""
    import diffusers

    flow = name.startswith("Flow")
    settings = {} if flow else {"timestep_spacing": "leading", **SCHEDULE}
    settings |= {"clip_sample": False, "set_alpha_to_one": True} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(20)
    clean, noise = draw(*SHAPE, seed=9), draw(*SHAPE, seed=10)
    first = int(max(20 - 20 * strength, 0)) if flow else max(20 - min(int(20 * strength), 20), 0)
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    x = (
        scheduler.scale_noise(clean, timesteps[:1], noise) if flow else scheduler.add_noise(clean, noise, timesteps[:1])
    ).double()
    for t in timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sample(
            network,
            noise,
            solver=getattr(diffusers, name)(**settings),
            num_inference_steps=20,
            start=clean,
            strength=strength,
        )
    assert (theirs - x).abs().max() < 2e-4 * x.abs().max()  # the adapter computes in fp32
    if name != "DPMSolverMultistepScheduler":  # whose leading timesteps differ
        solver = {
            "solver": "euler_flow",
            "prediction": "velocity",
            "schedule": RectifiedFlow(),
            "timestep_spacing": "linspace",
        }
        solver = solver if flow else {"solver": "ddim", "timestep_spacing": "leading"}
        ours = sample(network, noise, num_inference_steps=20, start=clean, strength=strength, **solver)
        assert (ours - x).abs().max() < 1e-4 * x.abs().max()
        if strength < 1:
            whole = sample(network, noise, num_inference_steps=20, **solver)
            assert (ours - whole).abs().max() > 1e-2 * x.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ddim"}, {"solver": "dpmpp_2m", "timestep_spacing": "karras"},
        {"solver": "heun_flow", "schedule": RectifiedFlow(), "prediction": "velocity"}, {"schedule": Edm()},
    ],
    ids=["schedule", "karras", "flow", "edm"],
)  # fmt: skip
def test_a_known_region_is_noised_to_the_level_of_x(settings):
    """With an exact denoiser of one clean image, x stays signal * image + sigma * noise, for every process."""
    image, noise, levels = draw(*SHAPE, seed=11), draw(*SHAPE, seed=12), []
    is_flow = "solver" in settings and settings["solver"] == "heun_flow"

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return noise - image if is_flow else image

    def keep(i, t, x, x0, level):
        torch.testing.assert_close(x, level.signal * image + level.sigma * noise, rtol=1e-9, atol=1e-9)
        levels.append(level)

    found = sample(exact, noise, start=image, callback=keep, **{"prediction": "x0", **settings})
    torch.testing.assert_close(found, image)
    assert levels[-1] == (1.0, 0.0) and len({level.sigma for level in levels}) == 20
    without_level = []
    sample(exact, noise, callback=lambda *given: without_level.append(len(given)), **{"prediction": "x0", **settings})
    assert set(without_level) == {4}


# Limits of x0

THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}


@pytest.mark.parametrize(
    ("name", "solver", "theirs", "ours"),
    [
        ("DDIMScheduler", "ddim", {"clip_sample": True, "clip_sample_range": 0.8}, 0.8),
        ("DDIMScheduler", "ddim", {"clip_sample": False, **THRESHOLD}, DynamicThreshold(0.9, 2.0)),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", THRESHOLD, DynamicThreshold(0.9, 2.0)),
        ("DDPMScheduler", "ddpm", {"clip_sample": True}, 1.0),
        ("DDPMScheduler", "ddpm", {"clip_sample": False, **THRESHOLD}, DynamicThreshold(0.9, 2.0)),
    ],
    ids=["clip", "threshold", "threshold-dpm", "clip-ddpm", "threshold-ddpm"],
)  # fmt: skip
def test_the_limits_of_diffusers(name, solver, theirs, ours):
    import diffusers

    noise = draw(*SHAPE, seed=13).float()  # in fp64, diffusers draws other noise from the same seed
    settings = {
        "DDIMScheduler": {"set_alpha_to_one": True}, "DDPMScheduler": {"variance_type": "fixed_small"},
        "DPMSolverMultistepScheduler": {"final_sigmas_type": "zero"},
    }[name]  # fmt: skip
    spacing = "leading" if name == "DDIMScheduler" else "linspace"
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, **SCHEDULE, **settings, **theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = sample(network, noise, solver=scheduler, num_inference_steps=20, seeds=[1, 2])
    common = {"solver": solver, "num_inference_steps": 20, "timestep_spacing": spacing, "seeds": [1, 2]}
    found = sample(network, noise, clip_x0=ours, **common)
    assert (found - truth).abs().max() < 3e-4 * truth.abs().max()
    assert (found - sample(network, noise, **common)).abs().max() > 1e-2
    if solver == "ddim" and theirs["clip_sample"]:
        again = Ddim(use_clipped_model_output=True)
        assert (sample(network, noise, clip_x0=ours, **{**common, "solver": again}) - found).abs().max() > 1e-3


# Guidance


def test_both_conditions_are_one_batch():
    weight, sizes = draw(3, seed=14), []

    def conditional(x: Tensor, t: Tensor, text: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        sizes.append(len(x))
        return network(x, t) * scale + text.view(-1, *[1] * (x.ndim - 1)) + (0 if mask is None else mask)

    x, t = draw(*SHAPE, seed=15), torch.tensor([500, 500])
    one, two = draw(2, seed=16), torch.zeros(2, dtype=torch.float64)
    expected = conditional(x, t, two) + 3.0 * (conditional(x, t, one) - conditional(x, t, two))
    sizes.clear()
    found = [
        guided(conditional, one, two, 3.0)(x, t),
        guided(conditional, (one, 1.0), (two, 1.0), 3.0)(x, t),
        guided(conditional, {"text": one}, {"text": two[:1]}, 3.0)(x, t),
    ]
    assert sizes == [4, 4, 4]
    for each in found:
        torch.testing.assert_close(each, expected)
    torch.testing.assert_close(guided(conditional, one, two, 1.0)(x, t), conditional(x, t, one))
    assert sizes[3:] == [2, 2]
    for condition, null, words in [
        ({"a": one}, {"b": two}, "got a dict of a and a dict of b"),
        (one, (two,), "got a Tensor and a tuple of 1"),
        (one, None, "got a Tensor and None"),
        ((one, 1.0), (two, 2.0), "two tensors, or equal"),
        (one, weight, "one per sample"),
    ]:
        with pytest.raises(ConfigError, match=words):
            guided(conditional, condition, null, 2.0)(x, t)
