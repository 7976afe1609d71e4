"""What a solver is: a table of numbers. One function, `Plan.step`, takes every solver's step.

All of them are linear in the same few tensors. With x the sample that the network saw and `output` its answer:

    x0        = a x + b output                                        the clean sample, estimated now (prediction.py)
    velocity  = a x + b output                                        likewise; flows only
    corrected = a x + b x0 + c corrected_1 + d x0_1 + e x0_2          x, mended in hindsight; most solvers leave it as it is
    next      = a corrected + b x0 + c x0_1 + d noise                 the sample at the next level

where _1 and _2 mark the values of one and two evaluations ago, and a flow has velocity in x0's place. A solver gives a column
of float64 coefficients for each term that it needs, one entry an evaluation, computed before the loop starts. First and last
steps of lower order are zeros in that table, so every evaluation is the same sequence of kernels and can be captured once and
replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccella_fast.diffusion.prediction import check_prediction, velocity_coefficients, x0_coefficients
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.timesteps import NoiseLevels, diffusion_levels, flow_levels

Term = tuple[str, str]  # (what is formed, from what)
# What is remembered for the next evaluation, and which value of this one that is.
MEMORY = {"corrected_1": "corrected", "velocity_1": "velocity", "x0_1": "x0", "x0_2": "x0_1"}


class StepResult(NamedTuple):
    """x: the sample at the next level. x0: the clean sample as estimated now. state: for the next call."""

    x: Tensor
    x0: Tensor
    state: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """A trajectory's numbers: everything that is known before the first evaluation.

    timesteps: (E,) what the network is told, int64 (diffusion) or float64 (flow). coefficients: float64 (E, K), a row for each
    evaluation. terms: the K columns' meaning. For (next, corrected) it is a - 1: to add small changes to the sample instead of
    scaling it halves the fp32 rounding error of 1000 steps."""

    timesteps: np.ndarray
    coefficients: np.ndarray
    terms: tuple[Term, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def noise_scale(self) -> np.ndarray:
        """(E,): the factor of the noise that each evaluation adds; 0 where none is read."""
        if ("next", "noise") not in self.terms:
            return np.zeros(len(self))
        return self.coefficients[:, self.terms.index(("next", "noise"))]

    @property
    def stochastic(self) -> bool:
        return bool(self.noise_scale.any())

    @cached_property
    def memory(self) -> tuple[str, ...]:
        """The names of the tensors in `state`, all zeros before the first evaluation."""
        used = {source for _, source in self.terms}
        used |= {"x0_1"} if "x0_2" in used else set()
        return tuple(name for name in MEMORY if name in used)

    def step(
        self, x: Tensor, output: Tensor, row: Tensor, noise: Tensor | None, state: tuple[Tensor, ...]
    ) -> StepResult:
        """x, output, noise, state: (B, ...) of one dtype, fp32 or fp64; row: (K,) on their device; noise may be None where
        the plan is not stochastic. Pure arithmetic without host synchronisation: which terms exist is known beforehand."""
        tensors = {"x": x, "corrected": x, "output": output, **dict(zip(self.memory, state, strict=True))}
        if noise is not None:
            tensors["noise"] = noise
        terms = list(zip(self.terms, row.unbind(), strict=True))
        for target in ("x0", "velocity", "corrected", "next"):
            parts = [coefficient * tensors[source] for (formed, source), coefficient in terms if formed == target]
            if parts:
                tensors[target] = reduce(torch.add, parts)
        x = tensors["corrected"] + tensors["next"]
        following = tuple(tensors[MEMORY[name]] for name in self.memory)
        return StepResult(x, tensors["x0"], following)


class Tableau(NamedTuple):
    """evaluated_at: (E,) index of the level that each evaluation sees. columns: float64 (E,) each."""

    evaluated_at: np.ndarray
    columns: Mapping[Term, np.ndarray]


@dataclass(frozen=True)
class Solver(ABC):
    """A solver: a pure function from noise levels to coefficients, and the spacing that suits it."""

    name: ClassVar[str]
    order: ClassVar[int]  # the error falls with this power of the step (weak order, where noise is added)
    timestep_spacing: ClassVar[str]  # the default
    flow: ClassVar[bool] = False  # solves a rectified flow instead of a noise schedule
    includes_last: ClassVar[bool] = False  # see `diffusion_levels`

    @abstractmethod
    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """signal, sigma: float64 (N + 1,); the last level is where the trajectory ends. sigma may be 0 only there."""

    def plan(
        self,
        schedule: Schedule,
        num_steps: int,
        *,
        prediction: str = "epsilon",
        timestep_spacing: str | None = None,
    ) -> SamplingPlan:
        """The plan of `num_steps` steps. ConfigError: more steps than the schedule has, an unknown spacing, a prediction that
        does not fit."""
        prediction = check_prediction(prediction, flow=self.flow, solver=self.name)
        spacing = timestep_spacing or self.timestep_spacing
        if self.flow:
            levels = flow_levels(schedule, num_steps, spacing)
        else:
            levels = diffusion_levels(schedule, num_steps, spacing, includes_last=self.includes_last)
        return self.plan_levels(levels, prediction)

    def plan_levels(self, levels: NoiseLevels, prediction: str) -> SamplingPlan:
        """The plan through given noise levels."""
        at, columns = self.table(levels.signal, levels.sigma)
        columns = dict(columns)
        signal, sigma = levels.signal[at], levels.sigma[at]
        formed = {"x0": x0_coefficients(prediction, signal, sigma)}
        if self.flow:
            formed["velocity"] = velocity_coefficients(prediction, sigma)
        for target, (from_x, from_output) in reversed(formed.items()):
            columns = {(target, "x"): from_x, (target, "output"): from_output, **columns}
        columns["next", "corrected"] = columns["next", "corrected"] - 1
        columns = {term: column for term, column in columns.items() if column.any()}
        return SamplingPlan(levels.timesteps[at], np.stack(list(columns.values()), axis=1), tuple(columns))


def log_snr_steps(signal: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """h (N,): the growth of lambda = log(signal / sigma) over each step, infinite where the step ends at sigma 0."""
    with np.errstate(divide="ignore"):
        return np.diff(np.log(signal) - np.log(sigma))
