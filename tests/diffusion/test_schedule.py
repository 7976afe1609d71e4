"""The noise schedule compared with the golden file and with diffusers."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from ccella_fast.config import SchedulerConfig
from ccella_fast.diffusion.objective import Objective
from ccella_fast.diffusion.schedule import Schedule


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.from_config(SchedulerConfig())


def golden_input(name: str) -> torch.Tensor:
    state = np.random.RandomState(zlib.crc32(f"input:{name}".encode()))
    return torch.from_numpy(state.standard_normal(size=(1, 4, 4, 4, 4)).astype(np.float32))


def assert_summary(value: torch.Tensor, expected: dict) -> None:
    samples = value.flatten()[:: expected["samples_stride"]][:16].double().numpy()
    np.testing.assert_allclose(samples, expected["samples"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(value.double().std(correction=0).item(), expected["std"], rtol=1e-3)


def test_tables_equal_golden(schedule, golden):
    for t, value in golden["SCHEDULER"]["alphas_cumprod"].items():
        np.testing.assert_allclose(schedule.alphas_cumprod[int(t)], value, rtol=2e-5)
    np.testing.assert_allclose(
        schedule.betas[[0, 999]], [golden["SCHEDULER"]["betas_0"], golden["SCHEDULER"]["betas_999"]], rtol=1e-6
    )


def test_add_noise_equals_golden(schedule, golden):
    x0, noise = golden_input("xt"), golden_input("eps")
    expected = golden["SCHEDULER"]["add_noise_t500"]
    assert_summary(Objective(schedule).add_noise(x0, noise, torch.tensor([500])), expected)
    with pytest.raises(AssertionError):  # negative control: one timestep off
        assert_summary(Objective(schedule).add_noise(x0, noise, torch.tensor([501])), expected)


def test_add_noise_equals_diffusers_for_mixed_timesteps(schedule):
    from diffusers import DDPMScheduler

    truth = DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    x0, noise = torch.randn(5, 4, 3, 2, 2), torch.randn(5, 4, 3, 2, 2)
    timesteps = torch.tensor([0, 1, 499, 998, 999])
    torch.testing.assert_close(
        Objective(schedule).add_noise(x0, noise, timesteps), truth.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-5
    )


def test_low_precision_input_is_computed_in_fp32(schedule):
    x0, noise = torch.randn(2, 4, 3, 2, 2).bfloat16(), torch.randn(2, 4, 3, 2, 2)
    timesteps = torch.tensor([3, 900])
    got = Objective(schedule).add_noise(x0, noise, timesteps)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, Objective(schedule).add_noise(x0.float(), noise, timesteps).bfloat16())


def test_tables_cannot_be_changed(schedule):
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 1.0
    with pytest.raises(AttributeError):
        schedule.betas = np.zeros(1000)
