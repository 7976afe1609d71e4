"""The conventions of other projects: whole trajectories against their own loops, called or written out here, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import diffusers
import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import ccella_fast
from ccella_fast import Edm, RectifiedFlow, edm_denoiser, sample
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import Ddim
from ccella_fast.diffusion.timesteps import beta_quantiles
from ccella_fast.errors import ConfigError
from diffusion_fixtures import SCHEDULE, SHAPE, column, network
from kernel_fixtures import draw


def unit_time(x: Tensor, t: Tensor) -> Tensor:
    """The same for a time from 0 to 1."""
    return network(x, 1000 * t)


@pytest.fixture(autouse=True)
def no_plausibility_check(monkeypatch):
    """These networks do not predict anything; `test_plausibility.py` tests the check."""
    monkeypatch.setattr("ccella_fast.diffusion.plausibility.plausible_slopes", lambda *_: None)


def assert_equal(found: Tensor, truth: Tensor, other: Tensor | None = None) -> None:
    """Equal to 1e-5 of the largest value; and unlike a similar convention."""
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
    if other is not None:
        assert (found - other).abs().max() > 1e-3 * truth.abs().max()


# Rectified flows


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("steps", [3, 10, 30])
def test_the_loop_of_monai(discrete, transform, steps):
    """MAISI's own setting is use_discrete_timesteps=False and use_timestep_transform=True: times with fractions."""
    from monai.networks.schedulers import RFlowScheduler

    scheduler = RFlowScheduler(
        use_discrete_timesteps=discrete, use_timestep_transform=transform, base_img_size_numel=8, spatial_dim=2,
        transform_scale=1.4,
    )  # fmt: skip
    noise = draw(*SHAPE, seed=1)
    scheduler.set_timesteps(steps, input_img_size_numel=16)
    x, times = noise, scheduler.timesteps
    for t, following in zip(times, [*times[1:], 0], strict=True):
        x, _ = scheduler.step(network(x, t.expand(len(x))), t, x, following)
    found = sample(network, noise, solver=scheduler, num_inference_steps=steps)
    assert_equal(found, x, sample(network, noise, solver=scheduler, num_inference_steps=steps, prediction="velocity"))
    named = sample(network, noise, solver="euler_flow", schedule=scheduler, num_inference_steps=steps)
    assert torch.equal(named, found)
    plain = {"solver": "euler_flow", "prediction": "x0_minus_noise", "num_inference_steps": steps}
    if transform:
        assert (sample(network, noise, schedule=RectifiedFlow(), **plain) - found).abs().max() > 1e-3
    shift = 2**0.5 if transform else 1.0  # MONAI's transform_scale has no effect
    away, scaled = (
        float((sample(network, noise, schedule=RectifiedFlow(shift=each), **plain) - found).abs().max())
        for each in (shift, 1.4 * shift)
    )
    assert away < 0.1 and (away < scaled or not transform)


def test_what_a_scheduler_of_monai_would_ignore_is_refused():
    from monai.networks.schedulers import RFlowScheduler

    noise = draw(*SHAPE, seed=1)
    scheduler = RFlowScheduler(use_timestep_transform=True, base_img_size_numel=8, spatial_dim=2)
    for settings, message in [
        ({"timestep_spacing": "karras"}, r"schedule=RectifiedFlow\(noise_at=1000, shift=1.41421\)"),
        ({"sigmas": [1.0, 0.5]}, "transform"), ({"timesteps": [1000, 500]}, "transform"),
        ({"num_inference_steps": 1001}, "takes at most 1000 steps"), ({"num_inference_steps": 0}, "positive integer"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            sample(network, noise, solver=scheduler, **settings)
    found = sample(network, noise, solver=RFlowScheduler(), timesteps=[1000, 555.5])
    flow = {"solver": "euler_flow", "schedule": RectifiedFlow(), "prediction": "x0_minus_noise"}
    # MONAI takes no list of the caller, so nothing is truncated as in its own steps.
    assert torch.equal(found, sample(network, noise, timesteps=[1000, 555.5], **flow))


def test_a_flow_has_no_limit_of_steps():
    settings = {"solver": "euler_flow", "schedule": RectifiedFlow(), "prediction": "velocity"}
    noise = draw(*SHAPE, seed=1)
    fine = sample(network, noise, num_inference_steps=4000, **settings)
    errors = [(sample(network, noise, num_inference_steps=n, **settings) - fine).abs().max() for n in (500, 2000)]
    assert errors[1] < errors[0] / 4  # of first order


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_time_from_noise_to_data(steps):
    """As in torchcfm and MOTFM: the velocity is data - noise."""
    x = noise = draw(*SHAPE, seed=2)
    for i in range(steps):
        x = x + unit_time(x, torch.full((2,), i / steps)) / steps
    flow, settings = RectifiedFlow(noise_at=0, data_at=1), {"solver": "euler_flow", "num_inference_steps": steps}
    found = sample(unit_time, noise, schedule=flow, prediction="x0_minus_noise", **settings)
    assert_equal(found, x, sample(unit_time, noise, schedule=flow, prediction="velocity", **settings))
    reversed_time = sample(
        unit_time, noise, schedule=RectifiedFlow(noise_at=1), prediction="x0_minus_noise", **settings
    )
    assert (found - reversed_time).abs().max() > 1e-3
    heun = sample(
        unit_time, noise, schedule=flow, prediction="x0_minus_noise", solver="heun_flow", num_inference_steps=steps
    )
    assert steps == 1 or (heun - found).abs().max() > 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_the_shift_of_diffusers(shift, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = draw(*SHAPE, seed=3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    truth = sample(network, noise, solver=scheduler, num_inference_steps=steps)
    settings = {
        "solver": "euler_flow",
        "prediction": "velocity",
        "num_inference_steps": steps,
        "timestep_spacing": "linspace",
    }
    found = sample(network, noise, schedule=RectifiedFlow(shift=shift), **settings)
    other = sample(network, noise, schedule=RectifiedFlow(shift=2.0), **settings)
    assert_equal(found, truth, other)


def test_the_dynamic_shift_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = np.linspace(1, 1 / 8, 8)
    scheduler.set_timesteps(sigmas=sigmas, mu=1.15)
    x = noise = draw(*SHAPE, seed=4)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    flow = RectifiedFlow(shift=math.exp(1.15))
    assert_equal(
        sample(network, noise, solver="euler_flow", schedule=flow, prediction="velocity", num_inference_steps=8), x
    )


# Lists of the caller


def test_sigmas_of_a_flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise, sigmas = draw(*SHAPE, seed=5), [1.0, 0.9, 0.5, 0.3, 0.05]
    truth = sample(network, noise, solver=FlowMatchEulerDiscreteScheduler(), sigmas=sigmas)
    flow = {"solver": "euler_flow", "schedule": RectifiedFlow(), "prediction": "velocity"}
    assert_equal(sample(network, noise, sigmas=[*sigmas, 0.0], **flow), truth)
    assert_equal(sample(network, noise, timesteps=[1000 * sigma for sigma in sigmas], **flow), truth)
    upward = {**flow, "schedule": RectifiedFlow(noise_at=0, data_at=1), "prediction": "velocity"}
    found = sample(lambda x, t: unit_time(x, 1 - t), noise, timesteps=[1 - sigma for sigma in sigmas], **upward)
    assert_equal(found, truth)


def test_timesteps_of_a_noise_schedule():
    from diffusers import DDPMScheduler

    noise, timesteps = draw(*SHAPE, seed=6), [999, 700, 500, 130, 20]
    truth = sample(
        network, noise, solver=DDPMScheduler(clip_sample=False, **SCHEDULE), timesteps=timesteps, seeds=[1, 2]
    )
    abar = Schedule.of().alphas_cumprod
    seen = []
    found = sample(lambda x, t: seen.append(int(t[0])) or network(x, t), noise, solver="ddim", timesteps=timesteps)
    assert seen == timesteps
    x = noise
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        after = 1.0 if following is None else abar[following]
        noise_now = network(x, torch.full((2,), t))
        x0 = (x - (1 - abar[t]) ** 0.5 * noise_now) / abar[t] ** 0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * noise_now
    assert_equal(found, x, truth)
    sigmas = np.sqrt((1 - abar[timesteps]) / abar[timesteps])
    assert_equal(sample(network, noise, solver="ddim", sigmas=sigmas), x)
    shifted = sample(network, noise, solver="ddim", sigmas=sigmas, timesteps=[990, 690, 490, 120, 10])
    assert (shifted - x).abs().max() > 1e-4


def test_invalid_lists_are_refused():
    noise = torch.zeros(1, 2)
    flow = {"solver": "euler_flow", "schedule": RectifiedFlow(), "prediction": "velocity"}
    for settings, message in [
        ({"timesteps": [0, 999]}, "from noise|to 0"), ({"timesteps": [999, 999]}, "without repetition"),
        ({"timesteps": [1000]}, "got 1000"), ({"timesteps": [99.5]}, "integers"), ({"timesteps": []}, "at least one"),
        ({"timesteps": "many"}, "list of numbers"), ({"sigmas": [[1.0]]}, "flat list"), ({"sigmas": [1e6]}, "got 1e"),
        ({"sigmas": [5.0, 1.0], "timesteps": [9]}, "same length"),
        ({"timesteps": [9, 1], "num_inference_steps": 3}, "has 2 entries"),
        ({"timesteps": [9, 1], "timestep_spacing": "karras"}, "used as given"),
        ({"sigmas": [1.1], **flow}, "got 1.1"), ({"sigmas": [0.5], **flow, "schedule": RectifiedFlow(shift=2)}, "no effect"),
        ({"timesteps": [5], "schedule": Edm()}, "no timesteps"), ({"schedule": Edm}, "class, not an object"),
        ({"strength": 0.5}, "without start"), ({"start": noise, "strength": 0}, "above 0"),
        ({"start": noise, "strength": 0.01}, "none of 20 steps"), ({"start": torch.zeros(3)}, "shaped like x_T"),
        ({"clip_x0": -1}, "clip_x0"), ({"clip_x0": (1, -1)}, "clip_x0"), ({"clip_x0": "yes"}, "clip_x0"),
        ({**flow, "solver": "dpmpp_2m"}, "rectified flow"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            sample(network, noise, **settings)
        assert len(str(caught.value).splitlines()) <= 5


# Sigma space


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma)."""
    return x / (1 + column(sigma) ** 2) + 0.2 * torch.sin(x + column(sigma).log())


def sigmas_of(spacing: str, count: int) -> np.ndarray:
    """The published formulas, k-diffusion's get_sigmas_karras and get_sigmas_exponential, and quantiles by integration."""
    low, high = 0.02, 30.0
    if spacing == "karras":
        ramp = np.linspace(0, 1, count)
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if spacing == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), count))
    quantiles = [beta_quantile(p) for p in np.linspace(1, 0, count)]
    return low + np.array(quantiles) * (high - low)


def beta_quantile(p: float) -> float:
    if p in (0.0, 1.0):
        return float(p)
    return float(
        mpmath.findroot(
            lambda x: mpmath.betainc(0.6, 0.6, 0, x, regularized=True) - p, (1e-9, 1 - 1e-9), solver="anderson"
        )
    )


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_the_loops_of_k_diffusion(spacing):
    """sample_euler, sample_heun and sample_dpmpp_2m, written out."""
    edm, noise, sigmas = Edm(sigma_min=0.02, sigma_max=30.0), draw(*SHAPE, seed=7), [*sigmas_of(spacing, 9), 0.0]
    at = lambda sigma: torch.full((2,), sigma, dtype=torch.float64)  # noqa: E731
    euler = heun = dpm = noise * sigmas[0]
    previous = None
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        euler = euler + (after - now) * (euler - denoiser(euler, at(now))) / now
        slope = (heun - denoiser(heun, at(now))) / now
        ahead = heun + (after - now) * slope
        if after > 0:
            slope = (slope + (ahead - denoiser(ahead, at(after))) / after) / 2
        heun = heun + (after - now) * slope
        clean = denoiser(dpm, at(now))
        if previous is None or after == 0:
            combined = clean
        else:
            r = math.log(sigmas[i - 1] / now) / math.log(now / after)
            combined = (1 + 1 / (2 * r)) * clean - previous / (2 * r)
        dpm, previous = after / now * dpm + (1 - after / now) * combined, clean
    settings = {"schedule": edm, "num_inference_steps": 9, "timestep_spacing": spacing}
    truths = {"euler_flow": euler, "heun_flow": heun, "dpmpp_2m": dpm}
    for solver, truth in truths.items():
        other = next(value for name, value in truths.items() if name != solver)
        assert_equal(sample(denoiser, noise, solver=solver, **settings), truth, other)
        assert_equal(sample(denoiser, noise, solver=solver, schedule=edm, sigmas=sigmas), truth)


def test_the_stochastic_loops_of_k_diffusion():
    """sample_euler_ancestral and sample_dpmpp_2m_sde (midpoint, eta = 1), written out, with the noise of the seeds."""
    from ccella_fast.diffusion.noise import generator

    edm, noise, seeds = Edm(sigma_min=0.02, sigma_max=30.0), draw(*SHAPE, seed=7), [3, 4]
    sources = [generator(seed, "step") for seed in seeds]
    sigmas = [*sigmas_of("karras", 9), 0.0]
    ancestral = sde = noise * sigmas[0]
    previous = None
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        added = torch.stack([torch.randn(SHAPE[1:], generator=source) for source in sources]).double()
        level = torch.full((2,), now, dtype=torch.float64)
        up = (after**2 * (now**2 - after**2) / now**2) ** 0.5
        slope = (ancestral - denoiser(ancestral, level)) / now
        ancestral = ancestral + ((after**2 - up**2) ** 0.5 - now) * slope + up * added
        clean = denoiser(sde, level)
        if after == 0:
            sde = clean
            break
        h = math.log(now / after)
        weight = -math.expm1(-2 * h)
        sde = after / now * math.exp(-h) * sde + weight * clean + after * weight**0.5 * added
        if previous is not None:
            r = math.log(sigmas[i - 1] / now) / h
            sde = sde + 0.5 * weight / r * (clean - previous)
        previous = clean
    settings = {"schedule": edm, "num_inference_steps": 9, "seeds": seeds}
    assert_equal(sample(denoiser, noise, solver="ddpm", **settings), ancestral, sde)
    assert_equal(sample(denoiser, noise, solver=Ddim(eta=1.0), timestep_spacing="karras", **settings), ancestral)
    assert_equal(sample(denoiser, noise, solver="dpmpp_2m_sde", **settings), sde, ancestral)


@pytest.mark.parametrize("spacing", ["exponential", "beta"])
@pytest.mark.parametrize(("solver", "name"), [("dpmpp_2m", "DPMSolverMultistep"), ("unipc", "UniPCMultistep")])
def test_spacings_of_noise_levels_of_a_schedule(monkeypatch, spacing, solver, name):
    """diffusers' own lists; beta sigmas need SciPy there, whose quantiles are computed by integration here."""
    import diffusers
    from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_unipc_multistep

    scipy = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=lambda p, a, b: beta_quantile(p))))
    for module in (scheduling_dpmsolver_multistep, scheduling_unipc_multistep):
        monkeypatch.setattr(module, "scipy", scipy, raising=False)
        monkeypatch.setattr(module, "is_scipy_available", lambda: True)
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SCHEDULE, **{f"use_{spacing}_sigmas": True})
    scheduler.set_timesteps(12)
    scheduler.set_begin_index(0)
    assert scheduler.timesteps[0] == 998  # by the rounding of its fp32 table: the first level is that of 999
    scheduler.timesteps[0] = 999
    x = noise = draw(*SHAPE, seed=21)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)).float(), t, x.float()).prev_sample.double()
    settings = {"solver": solver, "num_inference_steps": 12}
    found = sample(network, noise, timestep_spacing=spacing, **settings)
    assert (found - x).abs().max() < 1e-4 * x.abs().max()  # it computes in fp32
    other = sample(network, noise, timestep_spacing="karras", **settings)
    assert (found - other).abs().max() > 1e-3 * x.abs().max()


def test_the_scheduler_of_edm():
    from diffusers import EDMDPMSolverMultistepScheduler

    noise = draw(*SHAPE, seed=8)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(12)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    found = sample(edm_denoiser(network, sigma_data=0.5), noise, schedule=Edm(), num_inference_steps=12)
    assert (found - x).abs().max() < 1e-3 * x.abs().max()  # its tables are fp32
    plain = sample(network, noise, schedule=Edm(), num_inference_steps=12)
    assert (found - plain).abs().max() > 0.1 * x.abs().max()


def test_quantiles_of_the_beta_distribution():
    probabilities = np.linspace(0, 1, 12)
    truth = [beta_quantile(p) for p in probabilities]
    np.testing.assert_allclose(beta_quantiles(probabilities, 0.6), truth, atol=1e-10)


def test_the_names_are_public():
    assert {"Edm", "RectifiedFlow", "DynamicThreshold", "guided", "edm_denoiser"} <= set(ccella_fast.__all__)


@pytest.mark.filterwarnings("ignore:.*implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["HeunDiscrete", "UniPCMultistep", "FlowMatchEulerDiscrete", "EulerAncestralDiscrete", "LCM"]
)
def test_a_scheduler_object_computes_in_float64_if_the_noise_is(name):
    kind = getattr(diffusers, f"{name}Scheduler")
    x_T = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        return torch.tanh(0.9 * x.roll(1, -1) + x + t.view(-1, 1, 1) / 1000)

    torch.manual_seed(1)
    found = sample(network, x_T, solver=kind(), num_inference_steps=6)
    torch.manual_seed(1)
    scheduler = kind()
    scheduler.set_timesteps(6)
    x = x_T * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
