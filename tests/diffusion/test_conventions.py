"""The conventions of other projects: whole trajectories against their own loops, called or written out here, in float64."""

from __future__ import annotations

import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import ccella_fast
from ccella_fast import DynamicThreshold, Edm, RectifiedFlow, edm_denoiser, guided, sample
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import Ddim
from ccella_fast.diffusion.timesteps import beta_quantiles
from ccella_fast.errors import ConfigError
from kernel_fixtures import draw

SHAPE = (2, 3, 4, 4)
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


def column(t: Tensor) -> Tensor:
    return t.double().view(-1, *[1] * (len(SHAPE) - 1))


def network(x: Tensor, t: Tensor) -> Tensor:
    """Depends on x and t in a nonlinear way, so that any other coefficient or time gives another trajectory."""
    return 0.7 * torch.sin(1.5 * x + column(t) / 500) + 0.3 * x


def unit_time(x: Tensor, t: Tensor) -> Tensor:
    """The same for a time from 0 to 1."""
    return network(x, 1000 * t)


@pytest.fixture(autouse=True)
def no_plausibility_check(request, monkeypatch):
    """These networks do not predict anything; the check has its own tests."""
    if "plausib" not in request.node.name:
        monkeypatch.setattr("ccella_fast.diffusion.plausibility.plausible_slopes", lambda *_: None)


def assert_equal(found: Tensor, truth: Tensor, other: Tensor | None = None) -> None:
    """Equal to 1e-5 of the largest value; and unlike a similar convention."""
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
    if other is not None:
        assert (found - other).abs().max() > 1e-3 * truth.abs().max()


# Rectified flows


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("steps", [3, 10, 30])
def test_the_loop_of_monai(transform, steps):
    from monai.networks.schedulers import RFlowScheduler

    scheduler = RFlowScheduler(use_timestep_transform=transform, base_img_size_numel=8, spatial_dim=2)
    noise = draw(*SHAPE, seed=1)
    scheduler.set_timesteps(steps, input_img_size_numel=16)
    x, times = noise, scheduler.timesteps
    for t, following in zip(times, [*times[1:], 0], strict=True):
        x, _ = scheduler.step(network(x, t.expand(len(x))), t, x, following)
    found = sample(network, noise, solver=scheduler, num_inference_steps=steps)
    assert_equal(found, x, sample(network, noise, solver=scheduler, num_inference_steps=steps, prediction="velocity"))
    named = sample(network, noise, solver="euler_flow", schedule=scheduler, num_inference_steps=steps)
    assert torch.equal(named, found)
    if transform:
        plain = sample(
            network, noise, solver="euler_flow", schedule=RectifiedFlow(), prediction="x0_minus_noise",
            num_inference_steps=steps,
        )  # fmt: skip
        assert (plain - found).abs().max() > 1e-3


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
    ],
    ids=["clip", "threshold", "threshold-dpm"],
)  # fmt: skip
def test_the_limits_of_diffusers(name, solver, theirs, ours):
    import diffusers

    noise = draw(*SHAPE, seed=13)
    settings = {"set_alpha_to_one": True} if name == "DDIMScheduler" else {"final_sigmas_type": "zero"}
    spacing = "leading" if name == "DDIMScheduler" else "linspace"
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, **SCHEDULE, **settings, **theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = sample(network, noise, solver=scheduler, num_inference_steps=20)
    common = {"solver": solver, "num_inference_steps": 20, "timestep_spacing": spacing}
    found = sample(network, noise, clip_x0=ours, **common)
    assert (found - truth).abs().max() < 3e-4 * truth.abs().max()  # the adapter computes in fp32
    assert (found - sample(network, noise, **common)).abs().max() > 1e-2
    if theirs.get("clip_sample"):
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
    for condition, null in [({"a": one}, {"b": two}), (one, (two,)), ((one, 1.0), (two, 2.0)), (one, weight)]:
        with pytest.raises(ConfigError):
            guided(conditional, condition, null, 2.0)(x, t)


# Schedulers of diffusers with known defects


@pytest.mark.parametrize(
    ("name", "settings", "steps", "message"),
    [
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, 7, "evaluates the network at"),
        ("DDIMScheduler", {"timestep_spacing": "leading"}, 334, "begins with pure noise at"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 15, "begins with pure noise at"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, "zero terminal SNR"),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 10, None),
        ("UniPCMultistepScheduler", {}, 20, None),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 20, None),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 20, None),
    ],
)  # fmt: skip
def test_known_defects_are_warned_about(name, settings, steps, message):
    import diffusers

    scheduler = getattr(diffusers, name)(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(network, draw(*SHAPE, seed=17), solver=scheduler, num_inference_steps=steps)
    texts = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    assert texts == [] if message is None else any(message in text and "Fix:" in text for text in texts), texts


# Plausibility of the first output

DATA = [(0.0, 1.0), (3.0, 0.2), (-1.0, 4.0), (0.5, 1e-3)]  # mean and standard deviation
PROCESSES = {
    "schedule": ({}, ("epsilon", "v", "x0")),
    "flow": ({"solver": "euler_flow", "schedule": RectifiedFlow()}, ("velocity", "x0_minus_noise", "x0")),
    "edm": ({"schedule": Edm()}, ("x0", "epsilon")),
}


def exact_network(process: str, prediction: str, mean: float, std: float):
    """The best prediction for normally distributed data."""
    abar = torch.tensor(Schedule.of().alphas_cumprod)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if process == "schedule":
            signal, sigma = column(abar[t]).sqrt(), (1 - column(abar[t])).sqrt()
        elif process == "flow":
            signal, sigma = 1 - column(t) / 1000, column(t) / 1000
        else:
            signal, sigma = torch.ones(1, dtype=torch.float64), column(t)
        x0 = mean + std**2 * signal / (std**2 * signal**2 + sigma**2) * (x - signal * mean)
        eps = (x - signal * x0) / sigma
        return {
            "x0": x0,
            "epsilon": eps,
            "v": signal * eps - sigma * x0,
            "velocity": eps - x0,
            "x0_minus_noise": x0 - eps,
        }[prediction]

    return predict


@pytest.mark.parametrize("data", DATA, ids=str)
@pytest.mark.parametrize("process", PROCESSES)
def test_plausible_outputs_are_not_warned_about_and_others_are(process, data):
    settings, predictions = PROCESSES[process]
    noise = draw(2, 1, 16, 16, seed=18)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prediction in predictions:
            sample(
                exact_network(process, prediction, *data),
                noise,
                prediction=prediction,
                num_inference_steps=3,
                **settings,
            )
    wrong = {"epsilon": -1, "velocity": -1, "x0_minus_noise": -1}
    for prediction in set(predictions) & set(wrong):
        right = exact_network(process, prediction, *data)
        if process == "edm":
            continue  # at the first level, 80 times the data, the sign of the noise is all that D gives
        with pytest.warns(UserWarning, match="does not look like"):
            sample(
                lambda x, t, right=right: -right(x, t), noise, prediction=prediction, num_inference_steps=3, **settings
            )


def test_plausibility_of_a_time_that_runs_backwards():
    """A network that expects 0 at the noise gets 1000 there, where it sees data: the slope is that of no noise."""
    flow = exact_network("flow", "velocity", 0.0, 1.0)
    with pytest.warns(UserWarning, match="does not look like"):
        sample(
            lambda x, t: flow(x, 1000 - t + 1e-3), draw(2, 1, 16, 16, seed=19), solver="euler_flow", schedule=RectifiedFlow(),
            prediction="velocity", num_inference_steps=3,
        )  # fmt: skip


def test_the_names_are_public():
    assert {"Edm", "RectifiedFlow", "DynamicThreshold", "guided", "edm_denoiser"} <= set(ccella_fast.__all__)
