"""Prediction types, and the clean sample as a linear function of the network's output.

x_t = signal x0 + sigma eps, with signal^2 + sigma^2 = 1 for a noise schedule, signal + sigma = 1 for a rectified flow and
signal = 1 in sigma space. For every prediction type, x0 = a x_t + b output, where a and b depend only on the timestep.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ccella_fast.errors import ConfigError, did_you_mean

DIFFUSION = ("epsilon", "v", "x0")
FLOW = ("velocity", "x0_minus_noise", "x0")
SIGMA_SPACE = ("x0", "epsilon")
# Names used by diffusers and MONAI.
ALIASES = {"eps": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}

IN_WORDS = {
    "epsilon": "the noise",
    "v": "v, which is signal x noise - sigma x latent",
    "x0": "the clean latent",
    "velocity": "the velocity, which is noise - latent",
    "x0_minus_noise": "latent - noise, the velocity with the sign of MONAI",
}


def check_prediction(name: str, allowed: tuple[str, ...], process: str) -> str:
    """The canonical name of a prediction type.

    Args:
        name: a prediction type or its alias.
        allowed: the prediction types of the noise process.
        process: what it is called, for messages.

    Raises:
        ConfigError: the name is unknown, or not one of those allowed.
    """
    known = dict.fromkeys((*DIFFUSION, *FLOW))
    canonical = ALIASES.get(name, name)
    if canonical not in known:
        fix = did_you_mean(name, [*known, *ALIASES])
        raise ConfigError(f"there is no prediction type '{name}'", field="prediction", fix=fix)
    if canonical not in allowed:
        fix = "set prediction to what the network was trained to predict, or use a solver and a schedule for it"
        if "velocity" in allowed:
            fix = "velocity is noise - x0 (diffusers); x0_minus_noise is the opposite (MONAI, torchcfm, MOTFM)"
        why = f"the networks of {process} predict {', '.join(allowed[:-1])} or {allowed[-1]}, not {canonical}"
        raise ConfigError(why, field="prediction", fix=fix)
    return canonical


def x0_coefficients(prediction: str, signal: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x_t + b output, float64, shaped like signal and sigma.

    epsilon   the noise (Ho et al. 2020, arXiv 2006.11239, eq. 9)
    v         signal eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512, section 4)
    x0        the clean sample
    velocity  dx/dsigma = eps - x0 of a rectified flow (Liu et al. 2022, arXiv 2209.03003)
    x0_minus_noise   x0 - eps, the same with the sign of MONAI's RFlowScheduler and of times that run from noise to data
    """
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
        case "x0_minus_noise":
            return one, sigma
    raise AssertionError(prediction)


def training_target(prediction: str, x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """What the network is trained to output for x_t = signal x0 + sigma noise, like x0; the inverse of `x0_coefficients`."""
    match prediction:
        case "epsilon":
            return noise
        case "v":
            return signal * noise - sigma * x0
        case "x0":
            return x0
        case "velocity":
            return noise - x0
        case "x0_minus_noise":
            return x0 - noise
    raise AssertionError(prediction)


def velocity_coefficients(prediction: str, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with dx/dsigma = (x_t - x0) / sigma = a x_t + b output, for a rectified flow and in sigma space."""
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    match prediction:
        case "velocity" | "epsilon":  # in sigma space, dx/dsigma is the noise
            return zero, one
        case "x0_minus_noise":
            return zero, -one
        case "x0":
            return 1 / sigma, -1 / sigma
    raise AssertionError(prediction)
