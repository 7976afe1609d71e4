"""What `sample` warns about: outputs that cannot be what they are said to be, and schedulers with known defects."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from ccella_fast import Edm, RectifiedFlow, sample
from ccella_fast.diffusion.schedule import Schedule
from kernel_fixtures import draw

SHAPE = (2, 3, 4, 4)


def column(t: Tensor) -> Tensor:
    return t.double().view(-1, *[1] * (len(SHAPE) - 1))


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
        sample(lambda x, t: 0.9 * x, draw(*SHAPE, seed=17), solver=scheduler, num_inference_steps=steps)
    texts = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    assert texts == [] if message is None else any(message in text and "Fix:" in text for text in texts), texts


def test_a_first_timestep_that_is_not_pure_noise_is_warned_about():
    def times(steps: int | None, **settings) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x_T = draw(*SHAPE, seed=17)
            sample(lambda x, t: 0.9 * x, x_T, solver="ddim", num_inference_steps=steps, **settings)
        assert all(each.filename == __file__ for each in caught)
        return [str(each.message) for each in caught]

    (message,) = times(334, timestep_spacing="leading")  # 333 x 2
    assert "begins with pure noise at timestep 666 of 1000" in message and "'trailing'" in message
    assert times(20, timestep_spacing="leading") == times(334) == times(None, timesteps=[600, 300]) == []
    assert times(334, timestep_spacing="leading", start=draw(*SHAPE, seed=18)) == []


def test_timesteps_that_the_levels_do_not_follow_are_warned_about():
    from diffusers import FlowMatchEulerDiscreteScheduler

    def times(shift: float, **lists) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        sample(lambda x, t: 0.9 * x, draw(*SHAPE, seed=17), solver=scheduler, **lists)

    with pytest.warns(UserWarning, match="shifts the noise levels by 3"):
        times(3.0, timesteps=[1000.0, 500.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times(1.0, timesteps=[1000.0, 500.0])
        times(3.0, sigmas=[1.0, 0.5])


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
    for prediction in set(predictions) & {"epsilon", "velocity", "x0_minus_noise"}:
        right = exact_network(process, prediction, *data)
        with pytest.warns(UserWarning, match="does not look like"):
            sample(
                lambda x, t, right=right: -right(x, t), noise, prediction=prediction, num_inference_steps=3, **settings
            )


@pytest.mark.parametrize(
    ("process", "predicts", "declared"),
    [
        ("schedule", "v", "epsilon"), ("schedule", "x0", "epsilon"), ("schedule", "epsilon", "v"),
        ("flow", "velocity", "x0_minus_noise"), ("flow", "x0_minus_noise", "x0"), ("edm", "x0", "epsilon"),
    ],
)  # fmt: skip
def test_another_prediction_than_the_declared_one_is_warned_about(process, predicts, declared):
    right = exact_network(process, predicts, 0.5, 0.8)
    with pytest.warns(UserWarning, match="does not look like"):
        sample(right, draw(2, 1, 16, 16, seed=18), prediction=declared, num_inference_steps=3, **PROCESSES[process][0])


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_preconditioned_network_is_not_warned_about(name):
    """Its output, which diffusers calls epsilon, does not follow the noise."""
    import diffusers

    def network(x: Tensor, t: Tensor) -> Tensor:  # exact for data N(1, 0.2^2), with sigma_data = 0.5
        sigma, total = torch.exp(4 * column(t)), (torch.exp(8 * column(t)) + 0.25).sqrt()
        clean = 1 + 0.04 / (0.04 + sigma**2) * (x * total - 1)
        return (clean - 0.25 / total * x) / (0.5 * sigma / total)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = sample(
            network, draw(2, 1, 16, 16, seed=20), solver=getattr(diffusers, name)(), num_inference_steps=12
        )
    assert abs(samples.mean() - 1) < 0.05


def test_a_time_in_other_units_is_warned_about_if_the_output_shows_it():
    flow = exact_network("flow", "velocity", 0.0, 1.0)
    with pytest.warns(UserWarning, match="it received 1000 first"):
        sample(
            lambda x, t: flow(x, 1000 * t), draw(2, 1, 16, 16, seed=19), solver="euler_flow", schedule=RectifiedFlow(),
            prediction="velocity", num_inference_steps=3,
        )  # fmt: skip


def test_plausibility_of_a_time_that_runs_backwards():
    """A network that expects 0 at the noise gets 1000 there, where it sees data: the slope is that of no noise."""
    flow = exact_network("flow", "velocity", 0.0, 1.0)
    with pytest.warns(UserWarning, match="does not look like"):
        sample(
            lambda x, t: flow(x, 1000 - t + 1e-3), draw(2, 1, 16, 16, seed=19), solver="euler_flow", schedule=RectifiedFlow(),
            prediction="velocity", num_inference_steps=3,
        )  # fmt: skip
