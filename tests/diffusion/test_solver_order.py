"""The order of convergence of each solver, in float64 on Gaussian data, for which the exact solution is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ccella_fast import sample
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import SOLVERS, Ddim, SamplingPlan
from ccella_fast.diffusion.timesteps import NoiseLevels

MEAN, WIDTH = 0.7, 0.4  # the data: N(MEAN, WIDTH^2)
COUNTS = (32, 64, 128, 256)


def levels(flow: bool, num_inference_steps: int) -> NoiseLevels:
    """Smooth noise levels; timesteps are their indices.

    Those of a noise schedule end before sigma 0, so that the error depends on the step size alone; those of a flow end at 0.
    """
    if flow:
        sigma = np.linspace(1, 0, num_inference_steps + 1)
        return NoiseLevels(np.arange(num_inference_steps), 1 - sigma, sigma)
    log_snr = np.linspace(-2.5, 2.5, num_inference_steps + 1)  # of amplitudes, not powers
    return NoiseLevels(
        np.arange(num_inference_steps), 1 / np.sqrt(1 + np.exp(-2 * log_snr)), 1 / np.sqrt(1 + np.exp(2 * log_snr))
    )


def variance(signal, sigma):
    return signal**2 * WIDTH**2 + sigma**2


def run(plan: SamplingPlan, at: NoiseLevels, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """All steps of the plan with the exact network. noise: (E, ...), each like x."""
    state = tuple(torch.zeros_like(x) for _ in plan.memory)
    for t, row, now in zip(plan.timesteps, torch.tensor(plan.coefficients), noise, strict=True):
        signal, sigma = at.signal[t], at.sigma[t]
        away = (x - signal * MEAN) / variance(signal, sigma)
        eps, x0 = sigma * away, MEAN + signal * WIDTH**2 * away
        x, _, state = plan.step(x, eps - x0 if at.sigma[0] == 1 else eps, row, now, state)
    return x


def ode_error(plan: SamplingPlan, at: NoiseLevels) -> float:
    """The largest error; the exact ODE solution keeps each sample at its quantile."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    scale = np.sqrt(variance(at.signal, at.sigma))
    truth = at.signal[-1] * MEAN + scale[-1] / scale[0] * (x - at.signal[0] * MEAN)
    return (run(plan, at, x, torch.zeros(len(plan), 9)) - truth).abs().max().item()


def sde_error(plan: SamplingPlan, at: NoiseLevels) -> float:
    """The error of the final variance: the result is affine in x_T and each step's noise, so unit inputs give all weights."""
    inputs = torch.eye(len(plan) + 1, dtype=torch.float64)
    inputs = torch.cat([torch.zeros_like(inputs[:1]), inputs])
    out = run(plan, at, inputs[:, 0], inputs[:, 1:].T)
    weights = (out[1:] - out[0]).numpy()
    weights[0] *= np.sqrt(variance(at.signal[0], at.sigma[0]))
    return abs((weights**2).sum() - variance(at.signal[-1], at.sigma[-1]))


def slope(solver, change=lambda plan: plan) -> float:
    errors = []
    for count in COUNTS:
        at = levels(solver.flow, count)
        plan = change(solver.plan_levels(at, "velocity" if solver.flow else "epsilon"))
        errors.append((sde_error if plan.stochastic else ode_error)(plan, at))
    return -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]


@pytest.mark.parametrize("solver", [*(kind() for kind in SOLVERS.values()), Ddim(eta=1.0)], ids=lambda s: s.name)
def test_the_error_has_the_declared_order(solver):
    assert abs(slope(solver) - solver.order) < 0.15


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun_flow"])
def test_a_5_percent_change_of_the_coefficients_lowers_the_order(name):
    def perturbed(plan: SamplingPlan) -> SamplingPlan:
        """The weight of the previous estimate 5 % larger, that of the current one smaller by the same amount."""
        table = plan.coefficients.copy()
        target = "corrected" if name in ("unipc", "heun_flow") else "next"
        estimate = "velocity" if name == "heun_flow" else "x0"
        past, now = plan.terms.index((target, f"{estimate}_1")), plan.terms.index((target, estimate))
        table[:, now] -= 0.05 * table[:, past]
        table[:, past] *= 1.05
        return replace(plan, coefficients=table)

    solver = SOLVERS[name]()
    assert slope(solver, perturbed) < solver.order - 0.3


def mixture(schedule: Schedule):
    """The exact noise prediction for 8 Gaussians in 64 dimensions, with noise samples.

    The standard deviations fall from 0.7 to 0.02, a spectrum as steep as that of an image.
    """
    source = torch.Generator().manual_seed(1)
    means = torch.randn(8, 64, generator=source, dtype=torch.float64) * torch.logspace(0, -1.5, 64, dtype=torch.float64)
    variances, abar = torch.logspace(-0.3, -3.4, 64, dtype=torch.float64), torch.tensor(schedule.alphas_cumprod)

    def denoise(x, t):
        abar_t = abar[t].view(-1, 1, 1)
        total = abar_t * variances + 1 - abar_t
        away = x[:, None] - abar_t.sqrt() * means
        weights = (-(away**2 / total + total.log()).sum(-1) / 2).softmax(1)[..., None]
        return ((1 - abar_t).sqrt() * away / total * weights).sum(1)

    return denoise, torch.randn(64, 64, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_the_default_spacing_suits_data_of_many_scales(solver):
    """At equal cost, the other spacings lose accuracy in the last step, from their coarse last timestep to 0."""
    schedule = Schedule.of()
    denoise, x = mixture(schedule)
    truth = sample(denoise, x, solver=solver, num_inference_steps=1000, schedule=schedule)

    def error(spacing):
        result = sample(denoise, x, solver=solver, num_inference_steps=20, schedule=schedule, timestep_spacing=spacing)
        return ((result - truth).norm(dim=1) / truth.norm(dim=1)).mean()

    assert error(None) < 0.03 < 0.12 < min(error("linspace"), error("leading"), error("trailing"))
