"""What a network predicts, and how the clean sample follows from it.

x_t = signal x0 + sigma eps, where a diffusion schedule has signal^2 + sigma^2 = 1 and a rectified flow signal + sigma = 1.
Every kind of prediction gives x0 as a x_t + b output, with two numbers that depend on the timestep alone.
"""

from __future__ import annotations

import numpy as np

from ccella_fast.errors import ConfigError, did_you_mean

DIFFUSION = ("epsilon", "v", "x0")
FLOW = ("velocity", "x0")
# The names of diffusers and MONAI.
ALIASES = {"eps": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}


def check_prediction(name: str, *, flow: bool, solver: str = "this solver") -> str:
    """The canonical name of a prediction that fits the solver; ConfigError otherwise."""
    canonical, allowed = ALIASES.get(name, name), FLOW if flow else DIFFUSION
    if canonical not in (*DIFFUSION, *FLOW):
        fix = did_you_mean(name, [*DIFFUSION, *FLOW, *ALIASES])
        raise ConfigError(f"there is no prediction '{name}'", field="prediction", fix=fix)
    if canonical not in allowed:
        kind, other = (
            ("a rectified flow", "ddim or dpmpp_2m") if flow else ("a noise schedule", "euler_flow or heun_flow")
        )
        raise ConfigError(
            f"{solver} solves {kind}, whose networks predict {' or '.join(allowed)}, not {canonical}",
            field="prediction",
            fix=f"name what the network was trained to predict, or use {other}",
        )
    return canonical


def x0_coefficients(prediction: str, signal: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x_t + b output, float64, shaped like signal and sigma.

    epsilon   the noise (Ho et al. 2020, arXiv 2006.11239, eq. 9)
    v         signal eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512, section 4)
    x0        the clean sample
    velocity  dx/dsigma = eps - x0 (rectified flow, Liu et al. 2022, arXiv 2209.03003); MONAI's RFlowScheduler trains the
              opposite sign, so its networks are wrapped as `lambda x, t: -network(x, t)`"""
    one, zero = np.ones_like(signal), np.zeros_like(signal)
    match prediction:
        case "epsilon":
            return 1 / signal, -sigma / signal
        case "v":
            return signal, -sigma
        case "x0":
            return zero, one
        case "velocity":
            return one, -sigma
    raise AssertionError(prediction)


def velocity_coefficients(prediction: str, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with velocity = a x_t + b output on a rectified flow: (x_t - x0) / sigma where x0 is predicted."""
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    return (zero, one) if prediction == "velocity" else (1 / sigma, -1 / sigma)
