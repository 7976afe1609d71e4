"""The noise levels of a trajectory, and the timestep that the network receives at each."""

from __future__ import annotations

from numbers import Integral
from typing import Literal, NamedTuple, get_args

import numpy as np

from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.errors import ConfigError, did_you_mean

TimestepSpacing = Literal["leading", "trailing", "linspace", "karras"]
_RHO = 7.0  # Karras et al. 2022, arXiv 2206.00364, eq. 5


class NoiseLevels(NamedTuple):
    """N noise levels and the end of the trajectory; x_t = signal x0 + sigma eps.

    Attributes:
        timesteps: (N,), the network's input, descending.
        signal: float64 (N + 1,); the last entry, the end of the trajectory, is 1.
        sigma: float64 (N + 1,); the last entry is 0.
    """

    timesteps: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray


def diffusion_levels(schedule: Schedule, num_inference_steps: int, spacing: str, *, includes_last: bool) -> NoiseLevels:
    """The levels of a noise schedule, with int64 timesteps. Names and values of the spacings are those of diffusers.

    linspace, leading, trailing   Lin et al. 2024, arXiv 2305.08891, table 2
    karras    sigma / signal spaced as in Karras et al. 2022 between the ends of the schedule; the network receives the nearest
              timestep, the solver uses the exact level

    Args:
        schedule: the noise schedule.
        num_inference_steps: N, from 1 to the number of training timesteps. With all of them, every spacing but karras visits
            each timestep once.
        spacing: a `TimestepSpacing`.
        includes_last: whether linspace and leading end at timestep 0, as for one-step solvers. Multi-step solvers gain nothing
            from that evaluation, so they use the first N of N + 1 such points.

    Raises:
        ConfigError: `num_inference_steps` is out of range, or the spacing is unknown.
    """
    total = len(schedule)
    _check_steps(num_inference_steps, total, spacing)
    if spacing == "karras":
        return _karras_levels(schedule, num_inference_steps)
    points = num_inference_steps if includes_last or num_inference_steps == total else num_inference_steps + 1
    match spacing:
        case "linspace":
            ascending = np.linspace(0, total - 1, points) if points > 1 else np.array([total - 1.0])
        case "leading":
            ascending = np.arange(points) * float(total // points)
        case _:  # trailing
            ascending = np.arange(total, 0, -total / num_inference_steps)[num_inference_steps - 1 :: -1].round() - 1
    timesteps = ascending.round()[::-1][:num_inference_steps].astype(np.int64)
    abar = np.append(schedule.alphas_cumprod[timesteps], 1.0)
    return NoiseLevels(timesteps, np.sqrt(abar), np.sqrt(1 - abar))


def flow_levels(schedule: Schedule, num_inference_steps: int, spacing: str) -> NoiseLevels:
    """The levels of a rectified flow: signal = 1 - sigma, timestep = sigma T (float64), where T is the schedule's length.

    trailing  sigma = 1, 1 - 1/N, ..., 1/N, then 0
    linspace  N values from 1 to 1/T, then 0 (the default of diffusers)
    karras    the same ends, spaced as in Karras et al. 2022

    Raises:
        ConfigError: `num_inference_steps` is out of range, or the spacing is unknown or "leading".
    """
    total = len(schedule)
    _check_steps(num_inference_steps, total, spacing)
    match spacing:
        case "trailing":
            sigma = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        case "linspace":
            sigma = np.linspace(1, 1 / total, num_inference_steps)
        case "karras":
            sigma = _karras_sigmas(1.0, 1 / total, num_inference_steps)
        case _:
            why = "leading timesteps do not include pure noise, where a rectified flow starts"
            raise ConfigError(why, field="timestep_spacing", fix="use trailing, linspace or karras")
    sigma = np.append(sigma, 0.0)
    return NoiseLevels(sigma[:-1] * total, 1 - sigma, sigma)


def _karras_levels(schedule: Schedule, num_inference_steps: int) -> NoiseLevels:
    known = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    ratio = _karras_sigmas(known[-1], known[0], num_inference_steps)
    timesteps = np.interp(np.log(ratio), np.log(known), np.arange(len(known))).round().astype(np.int64)
    signal = np.append(1 / np.sqrt(1 + ratio**2), 1.0)
    return NoiseLevels(timesteps, signal, np.append(ratio, 0.0) * signal)


def _karras_sigmas(first: float, last: float, num_inference_steps: int) -> np.ndarray:
    ramp = np.linspace(0, 1, num_inference_steps)
    return (first ** (1 / _RHO) + ramp * (last ** (1 / _RHO) - first ** (1 / _RHO))) ** _RHO


def _check_steps(num_inference_steps: int, total: int, spacing: str) -> None:
    if not isinstance(num_inference_steps, Integral) or not 1 <= int(num_inference_steps) <= total:
        why = f"the number of steps must be an integer from 1 to {total}, got {num_inference_steps!r}"
        fix = f"use 1 to {total}, the schedule's num_train_timesteps"
        raise ConfigError(why, field="num_inference_steps", fix=fix)
    if spacing not in get_args(TimestepSpacing):
        fix = did_you_mean(spacing, get_args(TimestepSpacing))
        raise ConfigError(f"there is no timestep spacing '{spacing}'", field="timestep_spacing", fix=fix)
