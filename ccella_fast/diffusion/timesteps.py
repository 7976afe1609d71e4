"""Which noise levels a trajectory visits, and what the network is told there."""

from __future__ import annotations

from numbers import Integral
from typing import Literal, NamedTuple, get_args

import numpy as np

from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.errors import ConfigError, did_you_mean

TimestepSpacing = Literal["leading", "trailing", "linspace", "karras"]
_RHO = 7.0  # Karras et al. 2022, arXiv 2206.00364, eq. 5


class NoiseLevels(NamedTuple):
    """timesteps: (N,) for the network, descending. signal, sigma: float64 (N + 1,), x_t = signal x0 + sigma eps; the last
    entry is where the trajectory ends, signal 1 and sigma 0."""

    timesteps: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray


def diffusion_levels(schedule: Schedule, num_steps: int, spacing: str, *, includes_last: bool) -> NoiseLevels:
    """Levels of a noise schedule. Timesteps are int64; names and values are those of diffusers:

    linspace, leading, trailing   Lin et al. 2024, arXiv 2305.08891, table 2
    karras    sigma / signal spaced as in Karras et al. 2022 between the schedule's ends; the network is told the nearest
              timestep, the arithmetic uses the exact level

    includes_last: linspace and leading end at timestep 0 (one-step solvers). Multi-step solvers gain nothing from that last
    evaluation, so theirs are the first N of N + 1 such points. With every timestep in use there is only one spacing."""
    total = len(schedule)
    _check(num_steps, total, spacing)
    if spacing == "karras":
        return _karras_levels(schedule, num_steps)
    points = num_steps if includes_last or num_steps == total else num_steps + 1
    match spacing:
        case "linspace":
            ascending = np.linspace(0, total - 1, points) if points > 1 else np.array([total - 1.0])
        case "leading":
            ascending = np.arange(points) * float(total // points)
        case _:  # trailing
            ascending = np.arange(total, 0, -total / num_steps)[num_steps - 1 :: -1].round() - 1
    timesteps = ascending.round()[::-1][:num_steps].astype(np.int64)
    abar = np.append(schedule.alphas_cumprod[timesteps], 1.0)
    return NoiseLevels(timesteps, np.sqrt(abar), np.sqrt(1 - abar))


def flow_levels(schedule: Schedule, num_steps: int, spacing: str) -> NoiseLevels:
    """Levels of a rectified flow: signal = 1 - sigma, timestep = sigma T (float64), T the schedule's length.

    trailing: sigma = 1, 1 - 1/N, ..., 1/N, then 0. linspace: N values from 1 to 1/T, then 0 (diffusers' default). karras: the
    same ends, spaced as in Karras et al. 2022."""
    total = len(schedule)
    _check(num_steps, total, spacing)
    match spacing:
        case "trailing":
            sigma = np.linspace(1, 1 / num_steps, num_steps)
        case "linspace":
            sigma = np.linspace(1, 1 / total, num_steps)
        case "karras":
            sigma = _karras(1.0, 1 / total, num_steps)
        case _:
            why, fix = "leading timesteps leave out pure noise, where a flow starts", "use trailing, linspace or karras"
            raise ConfigError(why, field="timestep_spacing", fix=fix)
    sigma = np.append(sigma, 0.0)
    return NoiseLevels(sigma[:-1] * total, 1 - sigma, sigma)


def _karras_levels(schedule: Schedule, num_steps: int) -> NoiseLevels:
    known = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    ratio = _karras(known[-1], known[0], num_steps)
    timesteps = np.interp(np.log(ratio), np.log(known), np.arange(len(known))).round().astype(np.int64)
    signal = np.append(1 / np.sqrt(1 + ratio**2), 1.0)
    return NoiseLevels(timesteps, signal, np.append(ratio, 0.0) * signal)


def _karras(first: float, last: float, num_steps: int) -> np.ndarray:
    ramp = np.linspace(0, 1, num_steps)
    return (first ** (1 / _RHO) + ramp * (last ** (1 / _RHO) - first ** (1 / _RHO))) ** _RHO


def _check(num_steps: int, total: int, spacing: str) -> None:
    if not isinstance(num_steps, Integral) or not 1 <= int(num_steps) <= total:
        fix = f"use 1 to {total}, the schedule's num_train_timesteps"
        raise ConfigError(f"{num_steps} steps are not possible", field="num_inference_steps", fix=fix)
    if spacing not in get_args(TimestepSpacing):
        fix = did_you_mean(spacing, get_args(TimestepSpacing))
        raise ConfigError(f"there is no timestep spacing '{spacing}'", field="timestep_spacing", fix=fix)
