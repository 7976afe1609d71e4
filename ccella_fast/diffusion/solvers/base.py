"""A solver is a table of coefficients; `SamplingPlan.step` performs the step of every solver.

All solvers are linear in the same few tensors. With x the network's input and `output` its prediction:

    x0        = a x + b output                                        the estimated clean sample (prediction.py)
    velocity  = a x + b output                                        dx/dsigma; solvers of rectified flows only
    corrected = a x + b x0 + c corrected_1 + d x0_1 + e x0_2          x after the corrector; equal to x for most solvers
    next      = a corrected + b x0 + c x0_1 + d noise                 the sample at the next level

where the suffixes _1 and _2 denote values from one and two evaluations ago; a solver of a rectified flow uses velocity in place
of x0. If x0 is clipped, that happens between the first line and the others, and velocity follows from x and the clipped x0; the
value before is the source `unclipped`, for the only solver that needs it.
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
from numbers import Real
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ccella_fast.deprecation import deprecated_arguments
from ccella_fast.diffusion.clipping import Clip, DynamicThreshold, clip_of
from ccella_fast.diffusion.flow import RectifiedFlow
from ccella_fast.diffusion.prediction import check_prediction, velocity_coefficients, x0_coefficients
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.timesteps import NoiseLevels
from ccella_fast.errors import ConfigError

DEFAULT_STEPS = 20
Term = tuple[str, str]  # (target, source)
# The tensors kept for the next evaluation, and the value of this evaluation that each takes.
MEMORY = {"corrected_1": "corrected", "velocity_1": "velocity", "x0_1": "x0", "x0_2": "x0_1"}


class NoiseProcess(Protocol):
    """How x_t and the network's time depend on the noise level: a Schedule, a RectifiedFlow or Edm.

    Attributes:
        kind: its name in a sentence.
        predictions: what its networks may predict.
        prediction: the default; None: the caller must tell.
        timestep_spacing: the default; None: that of the solver.
    """

    kind: ClassVar[str]
    predictions: ClassVar[tuple[str, ...]]
    prediction: ClassVar[str | None]
    timestep_spacing: ClassVar[str | None]

    def levels(self, num_inference_steps: int, spacing: str, *, includes_last: bool = False) -> NoiseLevels:
        """The levels of so many steps."""
        ...

    def levels_at(self, timesteps: Any, sigmas: Any) -> NoiseLevels:
        """The levels that the caller gives, at least one of the two lists."""
        ...


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
        signal: float64 (E + 1,), of the sample before each evaluation, and of the result.
        sigma: the same for the noise.
        prediction: what the network predicts.
        clip: applied to x0; None: nothing is.
    """

    timesteps: np.ndarray
    coefficients: np.ndarray
    terms: tuple[Term, ...]
    signal: np.ndarray
    sigma: np.ndarray
    prediction: str
    clip: Clip | DynamicThreshold | None = None

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

    def first_sample(self, noise: Tensor, start: Tensor | None = None) -> Tensor:
        """The sample before the first evaluation.

        Args:
            noise: standard normal, (B, ...), like x.
            start: a clean sample like x, which is noised to the first level; None: the first level is pure noise.
        """
        if start is not None:
            return float(self.signal[0]) * start + float(self.sigma[0]) * noise
        # In sigma space the signal is always 1. Otherwise pure noise has unit variance, so the rest of signal is neglected.
        return float(self.sigma[0]) * noise if self.signal[0] == 1 else noise

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
            if target == "x0" and self.clip is not None:
                tensors["unclipped"], tensors["x0"] = tensors["x0"], self.clip(tensors["x0"])
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
        process: NoiseProcess,
        num_inference_steps: int | None = None,
        *,
        prediction: str | None = None,
        timestep_spacing: str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        strength: float = 1.0,
        clip_x0: Any = None,
    ) -> SamplingPlan:
        """The plan of a trajectory; see {py:func}`ccella_fast.sample` for the arguments.

        Raises:
            ConfigError: an argument is invalid, or not supported by this process or solver.
        """
        if self.flow and isinstance(process, Schedule):  # of a flow, it only tells the number of timesteps
            process = RectifiedFlow(noise_at=len(process), sigma_min=1 / len(process))
        if not self.flow and isinstance(process, RectifiedFlow):
            why = f"{self.name} solves a noise schedule, but the schedule is a rectified flow"
            raise ConfigError(why, field="solver", fix="use euler_flow or heun_flow")
        prediction = _checked_prediction(prediction, process, self.name)
        if timesteps is None and sigmas is None:
            spacing = timestep_spacing or process.timestep_spacing or self.timestep_spacing
            count = DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
            levels = process.levels(count, spacing, includes_last=self.includes_last)
        else:
            levels = process.levels_at(timesteps, sigmas)
            _refuse_beside_lists(num_inference_steps, timestep_spacing, len(levels.timesteps))
        skipped = skipped_steps(strength, len(levels.timesteps), flow=isinstance(process, RectifiedFlow))
        return self.plan_levels(levels.without_first(skipped), prediction, clip=clip_of(clip_x0))

    def plan_levels(
        self, levels: NoiseLevels, prediction: str, *, clip: Clip | DynamicThreshold | None = None
    ) -> SamplingPlan:
        """The plan for given noise levels."""
        at, columns = self.table(levels.signal, levels.sigma)
        columns = dict(columns)
        signal, sigma = levels.signal[at], levels.sigma[at]
        from_x, from_output = x0_coefficients(prediction, signal, sigma)
        estimates = {("x0", "x"): from_x, ("x0", "output"): from_output}
        if self.flow and clip is None:
            from_x, from_output = velocity_coefficients(prediction, sigma)
            estimates |= {("velocity", "x"): from_x, ("velocity", "output"): from_output}
        elif self.flow:
            estimates |= {("velocity", "x"): 1 / sigma, ("velocity", "x0"): -1 / sigma}
        if clip is None and ("next", "unclipped") in columns:
            columns["next", "x0"] = columns["next", "x0"] + columns.pop(("next", "unclipped"))
        columns = estimates | columns
        columns["next", "corrected"] = columns["next", "corrected"] - 1  # see SamplingPlan.terms
        columns = {term: column for term, column in columns.items() if column.any()}
        before = np.append(at, len(levels.timesteps))
        return SamplingPlan(
            timesteps=levels.timesteps[at],
            coefficients=np.stack(list(columns.values()), axis=1),
            terms=tuple(columns),
            signal=levels.signal[before],
            sigma=levels.sigma[before],
            prediction=prediction,
            clip=clip,
        )


def skipped_steps(strength: Any, count: int, *, flow: bool) -> int:
    """The number of steps before a trajectory that begins part-way, rounded as in diffusers' image-to-image pipelines.

    Raises:
        ConfigError: `strength` is not above 0 and at most 1, or so small that no step remains.
    """
    if not isinstance(strength, Real) or not 0 < float(strength) <= 1:
        why = f"strength must be above 0 and at most 1, got {strength!r:.40}"
        raise ConfigError(why, field="strength", fix="use 0.3 for small changes, 0.8 for large ones")
    strength = float(strength)
    # Those of Stable Diffusion truncate the steps that remain, those of the flows the steps that are left out.
    skipped = int(count - count * strength) if flow else count - int(count * strength)
    if skipped >= count:
        why = f"with a strength of {strength:g}, none of {count} steps remains"
        raise ConfigError(why, field="strength", fix=f"use at least {1 / count:.2g}, or more steps")
    return skipped


def _checked_prediction(prediction: str | None, process: NoiseProcess, solver: str) -> str:
    default = process.prediction
    if prediction is None and default is None:
        why = f"{solver} needs to know what the network predicts, because the sign differs between projects"
        fix = "prediction='velocity' is noise - x0 (diffusers), 'x0_minus_noise' the opposite (MONAI, torchcfm, MOTFM)"
        raise ConfigError(why, field="prediction", fix=fix)
    return check_prediction(prediction or str(default), process.predictions, process.kind)


def _refuse_beside_lists(num_inference_steps: int | None, timestep_spacing: str | None, count: int) -> None:
    if timestep_spacing is not None:
        why = "timestep_spacing cannot be combined with timesteps or sigmas, which are used as given"
        raise ConfigError(why, field="timestep_spacing", fix="remove one of them")
    if num_inference_steps not in (None, count):
        why = f"num_inference_steps is {num_inference_steps}, but timesteps or sigmas has {count} entries"
        raise ConfigError(why, field="num_inference_steps", fix="remove num_inference_steps")


def log_snr_steps(signal: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The increase of lambda = log(signal / sigma) over each step, (N,); infinite if the step ends at sigma 0."""
    with np.errstate(divide="ignore"):
        return np.diff(np.log(signal) - np.log(sigma))
