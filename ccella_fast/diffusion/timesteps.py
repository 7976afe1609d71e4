"""The noise levels of a trajectory, and how they are spaced. Each noise process makes its own levels from these functions."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ccella_fast.errors import ConfigError, did_you_mean

TimestepSpacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "beta"]
SIGMA_SPACINGS = ("karras", "exponential", "beta")  # of noise levels instead of timesteps


class NoiseLevels(NamedTuple):
    """N noise levels and the end of the trajectory; x_t = signal x0 + sigma noise.

    Attributes:
        timesteps: (N,), the network's input.
        signal: float64 (N + 1,); the last entry, the end of the trajectory, is 1.
        sigma: float64 (N + 1,); the last entry is 0.
    """

    timesteps: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray

    def without_first(self, count: int) -> NoiseLevels:
        """The trajectory that starts `count` levels later."""
        return NoiseLevels(self.timesteps[count:], self.signal[count:], self.sigma[count:])


def spaced_sigmas(first: float, last: float, count: int, spacing: str, *, rho: float = 7.0) -> np.ndarray:
    """`count` noise levels from `first` down to `last`, float64.

    karras       equal steps in sigma^(1 / rho) (Karras et al. 2022, arXiv 2206.00364, eq. 5)
    exponential  equal steps in log(sigma)
    beta         quantiles of Beta(0.6, 0.6) (Lee et al. 2024, arXiv 2407.12173): dense at both ends
    """
    ramp = np.linspace(0, 1, count)
    match spacing:
        case "karras":
            return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
        case "exponential":
            return np.exp(np.log(first) + ramp * (np.log(last) - np.log(first)))
        case "beta":
            return last + beta_quantiles(1 - ramp, 0.6) * (first - last)
    raise AssertionError(spacing)


def beta_quantiles(probability: np.ndarray, alpha: float) -> np.ndarray:
    """The quantiles of the symmetric distribution Beta(alpha, alpha), to rounding.

    Up to x = 1/2, the incomplete beta function is x^alpha S(x) with the power series S(x) = sum_n (1 - alpha)_n / n! x^n /
    (alpha + n), which hardly varies, so the fixed point of x = (value / S(x))^(1 / alpha) is reached in a few iterations.
    """
    n = np.arange(64)
    series = np.cumprod(np.append(1.0, (n[1:] - alpha) / n[1:])) / (alpha + n)

    def power_series(x: np.ndarray) -> np.ndarray:
        return (series * x[..., None] ** n).sum(-1)

    whole = 2 * 0.5**alpha * power_series(np.array(0.5))  # B(alpha, alpha)
    value = np.minimum(probability, 1 - probability) * whole
    x = np.zeros_like(value)
    for _ in range(60):
        x = (value / power_series(x)) ** (1 / alpha)
    return np.where(probability <= 0.5, x, 1 - x)


def given_levels(given: Any, field: str, noise: float, data: float, *, end: float | None = None) -> np.ndarray:
    """The caller's timesteps or sigmas as float64 (N,), in order from noise to data.

    Args:
        given: a sequence of numbers, an array or a tensor.
        field: its name, for messages.
        noise: the bound on the side of the noise.
        data: the bound on the side of the data, above or below `noise`.
        end: where the trajectory ends and nothing is evaluated: a last entry of this value is left out.

    Raises:
        ConfigError: the list is not of that form.
    """
    values = numbers(given, field)
    if len(values) > 1 and values[-1] == end:
        values = values[:-1]
    lowest, highest = min(noise, data), max(noise, data)
    outside = values[~((values >= lowest) & (values <= highest) & (values != end))]
    if len(outside):
        why = f"{field} must be from {noise:g} (noise) to {data:g} (data), got {outside[0]:g}"
        raise ConfigError(why, field=field, fix="give values that the network was trained on, from noise to data")
    backward = np.flatnonzero(np.diff(values) * (data - noise) <= 0)
    if len(backward):
        pair = values[backward[0] : backward[0] + 2].tolist()
        why = f"{field} must go from {noise:g} (noise) to {data:g} (data) without repetition, got {pair} in a row"
        raise ConfigError(why, field=field, fix="reverse the list, or remove repeated values")
    return values


def numbers(given: Any, field: str) -> np.ndarray:
    """A list from the caller as float64 (N,). Raises ConfigError."""
    try:
        values = np.asarray(given.tolist() if hasattr(given, "tolist") else list(given), dtype=np.float64)
    except (TypeError, ValueError):
        why = f"{field} must be a list of numbers, got {given!r:.40}"
        raise ConfigError(why, field=field, fix=f"give one number per step: {field}=[...]") from None
    if values.ndim != 1 or not len(values):
        why = f"{field} must be a flat list of at least one number, got the shape {values.shape}"
        raise ConfigError(why, field=field, fix=f"give one number per step: {field}=[...]")
    return values


def check_steps(num_inference_steps: Any, total: int | None) -> None:
    """Raises ConfigError unless the number of steps is an integer from 1 to `total`, if there is such a limit."""
    if isinstance(num_inference_steps, Integral) and 1 <= int(num_inference_steps) <= (total or math.inf):
        return
    allowed = f"an integer from 1 to {total}" if total else "a positive integer"
    why = f"the number of steps must be {allowed}, got {num_inference_steps!r:.40}"
    fix = f"use 1 to {total}, the schedule's num_train_timesteps" if total else "use 20, for example"
    raise ConfigError(why, field="num_inference_steps", fix=fix)


def check_spacing(spacing: str, allowed: tuple[str, ...] = get_args(TimestepSpacing), why_not: str = "") -> None:
    """Raises ConfigError unless the spacing exists and is one of those allowed."""
    if spacing not in get_args(TimestepSpacing):
        fix = did_you_mean(spacing, list(allowed))
        raise ConfigError(f"there is no timestep spacing '{spacing}'", field="timestep_spacing", fix=fix)
    if spacing not in allowed:
        raise ConfigError(why_not, field="timestep_spacing", fix=f"use {', '.join(allowed[:-1])} or {allowed[-1]}")


def with_timesteps(levels: NoiseLevels, timesteps: Any) -> NoiseLevels:
    """The levels at which the network receives the caller's timesteps; unchanged if there are none. Raises ConfigError."""
    if timesteps is None:
        return levels
    received = numbers(timesteps, "timesteps")
    if len(received) != len(levels.timesteps):
        why = f"timesteps and sigmas must have the same length, got {len(received)} and {len(levels.timesteps)}"
        raise ConfigError(why, field="timesteps", fix="give one timestep for each sigma, or only one of the lists")
    whole = (received == received.round()).all()
    return levels._replace(timesteps=received.astype(levels.timesteps.dtype) if whole else received)
