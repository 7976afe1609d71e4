"""Prediction types, and the clean sample as a linear function of the network's output.

x_t = signal x0 + sigma eps, with signal^2 + sigma^2 = 1 for a noise schedule and signal + sigma = 1 for a rectified flow.
For every prediction type, x0 = a x_t + b output, where a and b depend only on the timestep.
"""

from __future__ import annotations

import numpy as np

from ccella_fast.errors import ConfigError, did_you_mean

DIFFUSION = ("epsilon", "v", "x0")
FLOW = ("velocity", "x0")
# Names used by diffusers and MONAI.
ALIASES = {"eps": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}


def check_prediction(name: str, *, flow: bool, solver: str = "this solver") -> str:
    """The canonical name of a prediction type.

    Raises:
        ConfigError: the name is unknown, or the solver does not support this prediction type.
    """
    canonical, allowed = ALIASES.get(name, name), FLOW if flow else DIFFUSION
    if canonical not in (*DIFFUSION, *FLOW):
        fix = did_you_mean(name, [*DIFFUSION, *FLOW, *ALIASES])
        raise ConfigError(f"there is no prediction type '{name}'", field="prediction", fix=fix)
    if canonical not in allowed:
        process = "a rectified flow" if flow else "a noise schedule"
        other = "a noise schedule, such as dpmpp_2m" if flow else "a rectified flow, such as heun_flow"
        raise ConfigError(
            f"{solver} solves {process}, whose networks predict {' or '.join(allowed)}, not {canonical}",
            field="prediction",
            fix=f"set prediction to what the network was trained to predict, or use a solver for {other}",
        )
    return canonical


def x0_coefficients(prediction: str, signal: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x_t + b output, float64, shaped like signal and sigma.

    epsilon   the noise (Ho et al. 2020, arXiv 2006.11239, eq. 9)
    v         signal eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512, section 4)
    x0        the clean sample
    velocity  dx/dsigma = eps - x0 (rectified flow, Liu et al. 2022, arXiv 2209.03003); MONAI's RFlowScheduler uses the
              opposite sign, so wrap its networks as `lambda x, t: -network(x, t)`
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
    raise AssertionError(prediction)


def velocity_coefficients(prediction: str, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with velocity = a x_t + b output for a rectified flow; for "x0", velocity = (x_t - x0) / sigma."""
    one, zero = np.ones_like(sigma), np.zeros_like(sigma)
    return (zero, one) if prediction == "velocity" else (1 / sigma, -1 / sigma)
