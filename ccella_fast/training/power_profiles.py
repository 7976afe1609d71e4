"""Profiles of power-function averages of the weights, and their fit by stored ones: Karras et al. 2024, arXiv 2312.02696.

The average at step t counts the weights of step s <= t in proportion to s^gamma. Its *width* is the standard deviation of this
profile, divided by t: 0.05 looks back over about the last 10 % of the training, whatever its length. An average that is updated
from step r to step t keeps the share (r / t)^(gamma + 1) of what it was: that is the part of the profile before r.

All averages are sums of the same weights, so a sum of stored averages is an average too. Its profile is the sum of theirs, and
least squares finds the sum that comes closest to a wanted profile. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def exponent(width: float) -> float:
    """gamma of a relative width, the root of width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); width < 1 / sqrt(12)."""
    square = float(width) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - square, 12.0 - square]).real.max())


def kept_share(gamma: float, before: int, now: int) -> float:
    """What is kept of the average of step `before` in that of step `now`."""
    return (before / now) ** (gamma + 1)


def profile(width: float, step: int, updates: np.ndarray) -> np.ndarray:
    """The weight of the weights of each of the steps `updates` in the average of `step`; they are 0 after it, and add up to 1.

    updates: (n,) the steps at which averages were updated, ascending; `step` is one of them.
    """
    reached = np.minimum(updates / step, 1.0) ** (exponent(width) + 1)
    return np.diff(reached, prepend=0.0)


class Fit(NamedTuple):
    """Profiles as sums of stored ones.

    Attributes:
        coefficients: (stored, wanted), which add up to 1 for each.
        errors: (wanted,) the norm of what the sums lack, relative to that of the wanted profile.
        gains: (wanted,) by how much a sum magnifies independent errors of the stored averages, such as those of rounding.
    """

    coefficients: np.ndarray
    errors: np.ndarray
    gains: np.ndarray


def fit(stored: Sequence[tuple[float, int]], widths: Sequence[float], step: int, every: int) -> Fit:
    """The sums of stored averages that are closest to the averages of `widths` at `step`.

    Args:
        stored: width and step of each average; a step is a multiple of `every` or the last one of a run.
        widths: what is wanted.
        step: that of the wanted averages.
        every: steps between two updates.
    """
    steps = {at for _, at in stored} | {step}
    updates = np.array(sorted(steps | set(range(every, max(steps) + 1, every))), dtype=np.float64)
    # Profiles are densities: the share of an update is divided by its number of steps, and squares are summed over steps.
    scale = np.sqrt(np.diff(updates, prepend=0.0))[:, None]
    known = np.stack([profile(width, at, updates) for width, at in stored], axis=1) / scale
    wanted = np.stack([profile(width, step, updates) for width in widths], axis=1) / scale
    coefficients = np.linalg.lstsq(known, wanted, rcond=None)[0]
    coefficients /= coefficients.sum(axis=0)  # else the weights themselves would be scaled
    errors = np.linalg.norm(known @ coefficients - wanted, axis=0) / np.linalg.norm(wanted, axis=0)
    return Fit(coefficients, errors, np.linalg.norm(coefficients, axis=0))
