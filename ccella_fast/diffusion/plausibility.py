"""A check of the network's first output against what it is said to predict. It costs no evaluation of the network.

At the first level x is nearly pure noise, independent of the clean sample. So the regression of the output on x, in units of
the standard deviation of x, is known for every data set: about 1 for the noise and for a velocity, -1 for a velocity of the
opposite sign, 0 for the clean sample. A wrong sign, time that runs in the wrong direction, or another kind of prediction than
the declared one gives a different slope. Time in wrong units does so only if the network's output at that time is different.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ccella_fast.diffusion.trajectory import DenoiserFn

_MIN_NOISE = 0.9  # the share of noise in the variance of x, below which the slope depends on the data
_NAMES = {
    "epsilon": "the noise",
    "velocity": "a velocity noise - x0",
    "x0_minus_noise": "x0 - noise",
    "x0": "x0",
    "v": "v",
}


class Slopes(NamedTuple):
    """The range of slopes that is plausible, wide enough for every data set and for networks that are not perfect."""

    lowest: float
    highest: float


class FirstOutput:
    """A denoiser that keeps the slope of its first output on x.

    Args:
        denoiser: the caller's.
        prediction: what it is said to predict; None: nothing is checked.
        signal: of the first level.
        sigma: of the first level.
    """

    def __init__(self, denoiser: DenoiserFn, prediction: str | None, signal: float, sigma: float):
        self._denoiser, self._prediction = denoiser, prediction
        self._slopes = plausible_slopes(prediction, signal, sigma)
        self._pending = self._slopes is not None
        self._t: Tensor | None = None
        self.statistics: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoiser's output."""
        if not self._pending:
            return self._denoiser(x, t)
        self._pending = False
        before = x.clone()  # a denoiser may write to its input
        output = self._denoiser(x, t)
        if isinstance(output, Tensor) and output.shape == before.shape:
            self.statistics, self._t = slope_and_error(before, output), t
        return output

    def warn(self, statistics: list[float]) -> None:
        """Warn if the slope is not plausible. statistics: the values of `self.statistics`."""
        slope, error = statistics
        assert self._slopes is not None and self._prediction is not None and self._t is not None
        low, high = self._slopes
        if not error > 0 or (slope + error >= low and slope - error <= high):  # a constant output tells nothing
            return
        fix = (
            f"check prediction, and the time that the network expects: it received {self._t[0].item():g} first; "
            "an untrained network has such an output too"
        )
        if -high <= slope <= -low:
            fix = {
                "velocity": "use prediction='x0_minus_noise', or the other direction of time (noise_at, data_at)",
                "x0_minus_noise": "use prediction='velocity', or the other direction of time (noise_at, data_at)",
            }.get(self._prediction, "return it with the opposite sign")
        expected = f"below {high:g}" if math.isinf(low) else f"from {low:g} to {high:g}"
        warnings.warn(
            f"the first output of the network does not look like {_NAMES[self._prediction]}: its slope on the noise is "
            f"{slope:.2f}, expected {expected}. Fix: {fix}.",
            stacklevel=4,  # of the line that calls `sample`
        )


def plausible_slopes(prediction: str | None, signal: float, sigma: float) -> Slopes | None:
    """The slopes of a correct network; None if nothing is known about them."""
    if prediction is None or sigma**2 < _MIN_NOISE * (signal**2 + sigma**2):
        return None
    match prediction:
        case "epsilon":
            return Slopes(0.3, 3.0)
        case "velocity":
            return Slopes(0.3, 3.0)
        case "x0_minus_noise":
            return Slopes(-3.0, -0.3)
        case "v":  # at most signal; how negative it is depends on the scale of the data
            return Slopes(-math.inf, 0.5)
        case "x0" if signal == 0:  # else it depends on the scale of the data
            return Slopes(-0.5, 0.5)
    return None


def slope_and_error(x: Tensor, output: Tensor) -> Tensor:
    """(2,) on the device: the slope of the output on x / std(x), and five standard errors of it."""
    x, output = x.float().flatten(), output.float().flatten()
    x, output = x - x.mean(), output - output.mean()
    slope = (x * output).mean() / x.square().mean().sqrt()
    return torch.stack([slope, 5 * output.square().mean().sqrt() / math.sqrt(max(len(x), 1))])
