"""Objectives of the training against MONAI, diffusers and closed forms for Gaussian data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from monai.networks.schedulers import RFlowScheduler
from monai.networks.schedulers.rectified_flow import timestep_transform

from ccella_fast.config import SchedulerConfig, make_config
from ccella_fast.diffusion.flow import RectifiedFlow
from ccella_fast.diffusion.objective import Objective, noise_process, process_in_words
from ccella_fast.diffusion.prediction import training_target
from ccella_fast.diffusion.sample import sample
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.losses import noise_loss
from ccella_fast.sampling.denoising import LoopSettings
from ccella_fast.sampling.request import Request

SHAPE = (5, 4, 8, 6, 4)  # a latent of 192 voxels
FLOW = {"schedule": "rectified_flow"}
ALL = [
    ("scaled_linear_beta", "epsilon"), ("scaled_linear_beta", "v"), ("scaled_linear_beta", "x0"),
    ("rectified_flow", "velocity"), ("rectified_flow", "x0_minus_noise"), ("rectified_flow", "x0"),
]  # fmt: skip


def objective(size=(64, 64, 32), gamma=None, **scheduler) -> Objective:
    config = SchedulerConfig.model_validate(scheduler)
    return Objective(
        noise_process(config, size), config.prediction, config.sample_method, config.loc, config.scale, gamma
    )


def monai(**settings) -> RFlowScheduler:
    """As NV-Generate-CTMR's config_network_rflow.json has it."""
    return RFlowScheduler(**{"use_discrete_timesteps": False, "use_timestep_transform": True, **settings})


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def times(of: Objective, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([of.draw_timestep(generator) for _ in range(count)])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two samples, times sqrt(n / 2): above 1.95 with a probability of 0.001."""
    both = torch.cat([one, other]).sort().values
    shares = [torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (one, other)]
    return float((shares[0] - shares[1]).abs().max()) * (len(one) / 2) ** 0.5


def test_noise_of_a_flow_is_added_as_in_monai(drawn):
    t = torch.tensor([0.0, 1.0, 250.5, 999.0, 1000.0])
    found = objective(**FLOW).add_noise(*drawn, t)
    torch.testing.assert_close(found, monai().add_noise(*drawn, t))
    assert torch.equal(found[0], drawn[0][0]) and torch.equal(found[-1], drawn[1][-1])  # the data, and pure noise
    assert not torch.allclose(found, monai(num_train_timesteps=1100).add_noise(*drawn, t))


def test_the_targets_are_those_of_diffusers_and_of_maisi(drawn):
    x0, noise = drawn
    t = torch.tensor([0, 1, 250, 998, 999])
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    v = objective(prediction="v").target(x0, noise, t)
    torch.testing.assert_close(v, theirs.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective().add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-5, rtol=0)
    assert objective().target(x0, noise, t) is noise  # no operation
    assert torch.equal(
        objective(**FLOW, prediction="x0_minus_noise").target(x0, noise, t), x0 - noise
    )  # model_gt of MAISI
    assert torch.equal(objective(**FLOW).target(x0, noise, t), noise - x0)


@pytest.mark.parametrize(("schedule", "prediction"), ALL)
def test_the_clean_sample_follows_from_the_target_as_the_solvers_compute_it(drawn, schedule, prediction):
    """The first step of a solver, with the target as the network's output, estimates the clean sample that it was made of."""
    of, noise = objective(schedule=schedule, prediction=prediction), drawn[1].double()
    t = of.process.levels(7, "trailing").timesteps[3:4]
    x0 = drawn[0].double()
    x_t = of.add_noise(x0, noise, torch.tensor(t).expand(5))
    estimates = []
    sample(
        lambda x, times: of.target(x0, noise, times), x_t, solver="heun_flow" if "flow" in schedule else "ddim",
        schedule=of.process if "flow" not in schedule else RectifiedFlow(), prediction=prediction, timesteps=t,
        callback=lambda i, t, x, estimate: estimates.append(estimate.clone()),
    )  # fmt: skip
    torch.testing.assert_close(estimates[0], x0, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(64, 64, 32), (8, 8, 4), (32, 32, 32)], ids=str)
def test_the_shift_is_that_of_monai(size):
    numel, even = int(np.prod(size)), torch.linspace(0, 1, 101, dtype=torch.float64)
    flow = noise_process(SchedulerConfig(schedule="rectified_flow", prediction="velocity"), size)
    exact = timestep_transform(1000 * even, input_img_size_numel=numel, base_img_size_numel=32**3)
    torch.testing.assert_close(flow.time(flow.shifted(even)), exact)
    assert (size == (32, 32, 32)) == torch.allclose(exact, 1000 * even)
    scaled = noise_process(SchedulerConfig.model_validate(FLOW | {"transform_scale": 1.4}), size)
    exact = timestep_transform(1000 * even, input_img_size_numel=numel, base_img_size_numel=32**3, scale=1.4)
    torch.testing.assert_close(scaled.time(scaled.shifted(even)), exact)


@pytest.mark.parametrize("settings", [
    {}, {"use_timestep_transform": False}, {"sample_method": "logit-normal"},
    {"sample_method": "logit-normal", "loc": -0.5, "scale": 1.4}, {"base_img_size_numel": 4096},
], ids=str)  # fmt: skip
def test_times_are_distributed_as_in_monai(settings):
    count, x = 4000, torch.empty(4000, 1, 16, 16, 8)
    torch.manual_seed(1)
    theirs = monai(**settings).sample_timesteps(x)
    ours = times(objective((16, 16, 8), **FLOW, **settings), count)
    assert ours.dtype == torch.float32 and ours.min() >= 0 and ours.max() <= 1000
    assert apart(ours, theirs) < 1.95
    other = {"sample_method": "logit-normal", "loc": 0.3}
    assert apart(ours, times(objective((16, 16, 8), **FLOW, **settings | other), count)) > 1.95  # negative control


@pytest.mark.parametrize("size", [(4, 16, 16, 8), (4, 64, 64, 32)], ids=str)
@pytest.mark.parametrize("solver", ["euler_flow", "heun_flow"])
def test_sampling_hands_the_network_the_times_and_levels_of_the_training(size, solver):
    """At each time of a sampling plan, training mixes latent and noise in exactly the proportion that the solver assumes."""
    config = make_config({"scheduler.schedule": "rectified_flow", "data.dim": [4 * length for length in size[1:]]})
    request = Request(reports=["a"], solver=solver, num_inference_steps=12)
    settings = LoopSettings.resolve(request, config)
    plan, of = settings.plan, Objective.from_config(config)
    assert settings.prediction == plan.prediction == of.prediction == "velocity" and plan.timesteps[0] == pytest.approx(
        1000
    )
    received = torch.tensor(plan.timesteps).float()  # as the trajectory gives them to the network
    signal, sigma = of.process.mixture(received, 1)
    np.testing.assert_allclose(sigma, plan.sigma[:-1], atol=1e-6)
    np.testing.assert_allclose(signal, plan.signal[:-1], atol=1e-6)
    drawn = times(of, 500)
    assert of.process == noise_process(config.scheduler, size[1:]) and drawn.dtype == received.dtype
    # The shift of another latent is another one: both sizes have other numbers of voxels.
    request = Request(reports=["a"], solver=solver, num_inference_steps=12, latent_shape=(4, 32, 32, 8))
    assert not np.allclose(LoopSettings.resolve(request, config).plan.sigma, plan.sigma)


@pytest.mark.parametrize(("schedule", "prediction"), ALL)
def test_the_optimum_of_each_objective_generates_the_data(schedule, prediction):
    """Data N(m, s^2). The regression of the target on x_t is known; with it as the network, sampling gives N(m, s^2).

    For Gaussian data the exact flow maps noise z to m + s z, which is known for each sample.
    """
    m, s = 0.7, 0.4
    of = objective(schedule=schedule, prediction=prediction)

    def optimum(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, sigma = of.process.mixture(t, x.ndim)
        gain = signal * s**2 / (signal**2 * s**2 + sigma**2)
        x0 = m + gain * (x - signal * m)
        noise = sigma * (x - signal * m) / (signal**2 * s**2 + sigma**2)
        return training_target(prediction, x0, noise, signal, sigma)

    generator = torch.Generator().manual_seed(0)
    x0, noise = m + s * torch.randn(200_000, generator=generator), torch.randn(200_000, generator=generator)
    for t in times(of, 5, seed=3):
        x_t, target = (f(x0, noise, t.expand(len(x0))) for f in (of.add_noise, of.target))
        design = torch.stack([x_t, torch.ones_like(x_t)], dim=1)
        slope, intercept = torch.linalg.lstsq(design, target[:, None]).solution.flatten()
        predicted = optimum(torch.tensor([0.0, 1.0]), t.expand(2))
        assert abs(intercept - predicted[0]) < 0.02 and abs(slope + intercept - predicted[1]) < 0.03
    z = torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    flow = "flow" in schedule
    result = sample(
        optimum, z, solver="heun_flow" if flow else "ddim", schedule=of.process, prediction=prediction,
        num_inference_steps=200 if flow else 1000,
    )  # fmt: skip
    torch.testing.assert_close(result, m + s * z, rtol=0, atol=0.02)


@pytest.mark.parametrize(("prediction", "plus"), [("epsilon", 0), ("v", 1), ("x0", None)])
def test_min_snr_weights_are_those_of_diffusers(prediction, plus):
    """As in examples/text_to_image: min(SNR, gamma) / SNR, and / (SNR + 1) for v; of x0 the paper's min(SNR, gamma)."""
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195), t)
    expected = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    expected = expected if plus is None else expected / (snr + plus)
    found = objective(prediction=prediction, gamma=5.0)
    torch.testing.assert_close(found.weights(t), expected, rtol=2e-4, atol=0)
    assert not torch.allclose(objective(prediction=prediction, gamma=4.0).weights(t), expected, rtol=2e-4)
    assert objective(prediction=prediction).weights(t) is None


def test_weights_multiply_the_loss_of_each_sample(drawn):
    predicted, target = drawn
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])
    per_sample = [abs(a - b).mean() for a, b in zip(predicted.double().numpy(), target.double().numpy(), strict=True)]
    expected = np.mean(np.array(per_sample) * weights.numpy())
    assert noise_loss(predicted, target, weights).item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(noise_loss(predicted, target), (predicted - target).abs().mean())
    assert noise_loss(predicted, target).item() != pytest.approx(expected, rel=1e-2)


def test_the_default_objective_is_that_of_the_reference():
    config, default = make_config(), Objective()
    of = Objective.from_config(config)
    assert isinstance(of.process, Schedule) and np.array_equal(of.process.betas, default.process.betas)
    assert (of.prediction, of.min_snr_gamma, of.weights(torch.tensor([1]))) == ("epsilon", None, None)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert of.draw_timestep(generators[0]) == torch.randint(1000, (), generator=generators[1])


def test_processes_in_words():
    assert process_in_words(SchedulerConfig(), (8, 8, 4)) == "1000 steps, scaled_linear_beta from 0.0015 to 0.0195"
    flow = SchedulerConfig.model_validate(FLOW)
    assert process_in_words(flow, (64, 64, 32)).endswith(
        "times t from 1000 to 0, shifted by 1.587 for this size of the latent"
    )
    assert process_in_words(flow, (32, 32, 32)).endswith("from 1000 to 0")
