"""A solver is a table of coefficients; `SamplingPlan.step` performs the step of every solver.

All solvers are linear in the same few tensors. With x the network's input and `output` its prediction:

    x0        = a x + b output                                        the estimated clean sample (prediction.py)
    velocity  = a x + b output                                        the estimated velocity; rectified flows only
    corrected = a x + b x0 + c corrected_1 + d x0_1 + e x0_2          x after the corrector; equal to x for most solvers
    next      = a corrected + b x0 + c x0_1 + d noise                 the sample at the next level

where the suffixes _1 and _2 denote values from one and two evaluations ago; a rectified flow uses velocity in place of x0.
A `Term` is one product on the right: the target that it is added to and the source tensor that it multiplies. For each term
that it needs, a solver provides a column of float64 coefficients with one entry per evaluation, computed before the loop. First
and last steps of lower order have zeros in that table, so every evaluation launches the same sequence of kernels and can be
captured once and replayed.
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

from ccella_fast.deprecation import deprecated_arguments
from ccella_fast.diffusion.prediction import check_prediction, velocity_coefficients, x0_coefficients
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.timesteps import NoiseLevels, diffusion_levels, flow_levels

Term = tuple[str, str]  # (target, source)
# The tensors kept for the next evaluation, and the value of this evaluation that each takes.
MEMORY = {"corrected_1": "corrected", "velocity_1": "velocity", "x0_1": "x0", "x0_2": "x0_1"}


class StepResult(NamedTuple):
    """The result of one step.

    Attributes:
        x: (B, ...), the sample at the next level.
        x0: (B, ...), the estimated clean sample.
        state: the solver's memory, for the next call.
    """

    x: Tensor
    x0: Tensor
    state: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """The coefficients of a trajectory of E evaluations, all known before the first one.

    Attributes:
        timesteps: (E,), the network's input, int64 for a noise schedule and float64 for a rectified flow.
        coefficients: float64 (E, K), one row per evaluation.
        terms: the terms of the K columns. The column of ("next", "corrected") holds a - 1: adding a small change to the sample
            instead of scaling it halves the fp32 rounding error of 1000 steps.
    """

    timesteps: np.ndarray
    coefficients: np.ndarray
    terms: tuple[Term, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def noise_scale(self) -> np.ndarray:
        """The factor of the noise that each evaluation adds, float64 (E,); 0 if it adds none."""
        if ("next", "noise") not in self.terms:
            return np.zeros(len(self))
        return self.coefficients[:, self.terms.index(("next", "noise"))]

    @property
    def stochastic(self) -> bool:
        """Whether any evaluation adds noise."""
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
        """One solver step, without host synchronization: which terms exist is known beforehand.

        Args:
            x: (B, ...), the network's input, fp32 or fp64.
            output: like x, the network's prediction.
            row: (K,), the evaluation's row of `coefficients`, with the device and dtype of x.
            noise: like x; may be None if the plan is deterministic.
            state: the solver's memory, each tensor like x.
        """
        tensors = {"x": x, "corrected": x, "output": output, **dict(zip(self.memory, state, strict=True))}
        if noise is not None:
            tensors["noise"] = noise
        terms = list(zip(self.terms, row.unbind(), strict=True))
        for target in ("x0", "velocity", "corrected", "next"):
            products = [coefficient * tensors[source] for (into, source), coefficient in terms if into == target]
            if products:
                tensors[target] = reduce(torch.add, products)
        x = tensors["corrected"] + tensors["next"]  # the column of ("next", "corrected") holds a - 1
        new_state = tuple(tensors[MEMORY[name]] for name in self.memory)
        return StepResult(x, tensors["x0"], new_state)


class Tableau(NamedTuple):
    """A solver's coefficients.

    Attributes:
        evaluated_at: (E,), the index of the noise level of each evaluation.
        columns: the coefficients of each term, float64 (E,).
    """

    evaluated_at: np.ndarray
    columns: Mapping[Term, np.ndarray]


@dataclass(frozen=True)
class Solver(ABC):
    """A solver: a pure function from noise levels to coefficients, and its default timestep spacing."""

    name: ClassVar[str]
    order: ClassVar[int]  # of convergence in the step size; the weak order for stochastic solvers
    timestep_spacing: ClassVar[str]  # the default
    flow: ClassVar[bool] = False  # solves a rectified flow instead of a noise schedule
    includes_last: ClassVar[bool] = False  # see `diffusion_levels`

    @abstractmethod
    def table(self, signal: np.ndarray, sigma: np.ndarray) -> Tableau:
        """The coefficients for given noise levels.

        Args:
            signal: float64 (N + 1,); the last level is the end of the trajectory.
            sigma: float64 (N + 1,); only the last entry may be 0.
        """

    @deprecated_arguments(num_steps="num_inference_steps")
    def plan(
        self,
        schedule: Schedule,
        num_inference_steps: int,
        *,
        prediction: str = "epsilon",
        timestep_spacing: str | None = None,
    ) -> SamplingPlan:
        """The plan for `num_inference_steps` steps; `timestep_spacing` None is the solver's default.

        Raises:
            ConfigError: the schedule has fewer timesteps than `num_inference_steps`, or the spacing or the prediction type is
                unknown or not supported by this solver.
        """
        prediction = check_prediction(prediction, flow=self.flow, solver=self.name)
        spacing = timestep_spacing or self.timestep_spacing
        if self.flow:
            levels = flow_levels(schedule, num_inference_steps, spacing)
        else:
            levels = diffusion_levels(schedule, num_inference_steps, spacing, includes_last=self.includes_last)
        return self.plan_levels(levels, prediction)

    def plan_levels(self, levels: NoiseLevels, prediction: str) -> SamplingPlan:
        """The plan for given noise levels."""
        at, columns = self.table(levels.signal, levels.sigma)
        columns = dict(columns)
        signal, sigma = levels.signal[at], levels.sigma[at]
        estimates = {"x0": x0_coefficients(prediction, signal, sigma)}
        if self.flow:
            estimates["velocity"] = velocity_coefficients(prediction, sigma)
        for target, (from_x, from_output) in reversed(estimates.items()):
            columns = {(target, "x"): from_x, (target, "output"): from_output, **columns}
        columns["next", "corrected"] = columns["next", "corrected"] - 1  # see SamplingPlan.terms
        columns = {term: column for term, column in columns.items() if column.any()}
        return SamplingPlan(levels.timesteps[at], np.stack(list(columns.values()), axis=1), tuple(columns))


def log_snr_steps(signal: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The increase of lambda = log(signal / sigma) over each step, (N,); infinite if the step ends at sigma 0."""
    with np.errstate(divide="ignore"):
        return np.diff(np.log(signal) - np.log(sigma))
