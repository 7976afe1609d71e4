"""The sampling loop and the state that it advances. A denoiser is any function of (x, t)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ccella_fast.diffusion.noise import generator, randn_per_sample
from ccella_fast.diffusion.solvers import SamplingPlan
from ccella_fast.errors import ConfigError
from ccella_fast.progress import refresh_interval

DenoiserFn = Callable[[Tensor, Tensor], Tensor]  # x (B, ...), t (B,) -> prediction (B, ...)
Callback = Callable[..., object]  # evaluation i, t, the new x, the estimated x0; optionally the level


class NoiseLevel(NamedTuple):
    """The level of a sample x = signal x0 + sigma noise."""

    signal: float
    sigma: float


class TrajectoryProtocol(Protocol):
    """What `run_trajectory` advances: a Trajectory, or the adapter of a diffusers scheduler."""

    @property
    def x(self) -> Tensor:
        """The current sample, (B, ...)."""

    @property
    def x0(self) -> Tensor | None:
        """The clean sample as estimated at the last evaluation, (B, ...)."""

    def __len__(self) -> int: ...

    def timestep(self, i: int) -> float:
        """The timestep of evaluation i."""

    def level(self, i: int) -> NoiseLevel:
        """The noise level of x after evaluation i."""
        ...

    def draw_noise(self, i: int) -> None:
        """Draw the noise that evaluation i adds."""

    def advance(self, denoiser: DenoiserFn) -> None:
        """One evaluation of the network and one solver step."""

    def result(self) -> Tensor:
        """The sample, (B, ...)."""


@torch.no_grad()
def run_trajectory(
    trajectory: TrajectoryProtocol,
    advance: Callable[[int], None],
    *,
    callback: Callback | None = None,
    description: str = "sampling",
    progress: bool = True,
) -> Tensor:
    """The sampling loop.

    Args:
        trajectory: the state, at its start.
        advance: performs evaluation i: calls `trajectory.advance(denoiser)`, or replays a CUDA graph of that call.
        callback: called after each evaluation; with the noise level of x if it has a parameter named `level`.
        description: the label of the progress bar.
        progress: show a progress bar on stderr.

    Returns:
        The sample, (B, ...).
    """
    with_level = callback is not None and "level" in inspect.signature(callback).parameters
    steps: Iterable[int] = range(len(trajectory))
    if progress:
        from tqdm import tqdm  # imported only here, as nothing else of `sample` needs more than torch and NumPy

        steps = tqdm(steps, desc=description, unit="step", mininterval=refresh_interval())
    for i in steps:
        trajectory.draw_noise(i)
        advance(i)
        if callback is not None:
            extra: dict[str, Any] = {"level": trajectory.level(i)} if with_level else {}
            returned = callback(i, trajectory.timestep(i), trajectory.x, trajectory.x0, **extra)
            if isinstance(returned, (Tensor, dict)):  # as the callbacks of diffusers do
                why = f"the callback returned a {type(returned).__name__}, which would have no effect"
                raise ConfigError(why, field="callback", fix="change x in place, with x.copy_(...), and return None")
    return trajectory.result()


class Trajectory:
    """The state of one batch along a sampling plan. Coefficients and position are on the device.

    Attributes:
        plan: the sampling plan, of E evaluations with K coefficients each.
        x: (B, ...) fp32, or fp64 if x_T is fp64: the current sample.
        x0: like x: the clean sample as estimated at the last evaluation.
        timesteps: (E,).
        rows: (E, K), the plan's coefficients in the dtype of x.
        index: (1,) int64: the next evaluation, for gathering from tables over all timesteps.
        noise: like x: the noise that the next evaluation adds; None if the plan is deterministic.
        state: the solver's memory, each tensor like x.
        static: whether every tensor keeps its address, as a captured CUDA graph requires. Otherwise each step allocates new
            tensors, and those that a denoiser or a callback has kept are not overwritten.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        x_T: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        start: Tensor | None = None,
        static: bool = False,
    ):
        self.plan, self.static, self.dtype = plan, static, x_T.dtype
        precision = torch.float64 if x_T.dtype == torch.float64 else torch.float32
        self.timesteps = torch.tensor(plan.timesteps, device=x_T.device)
        if self.timesteps.is_floating_point():
            self.timesteps = self.timesteps.to(precision)
        self.rows = torch.tensor(plan.coefficients, dtype=precision, device=x_T.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=x_T.device)
        self.x = torch.empty_like(x_T, dtype=precision)
        self.x0 = torch.zeros_like(self.x)
        self.noise = torch.zeros_like(self.x) if plan.stochastic else None
        self.state = tuple(torch.zeros_like(self.x) for _ in plan.memory)
        self.start(x_T, seeds, start)

    def start(self, x_T: Tensor, seeds: Sequence[int] | None = None, start: Tensor | None = None) -> None:
        """Restart from another x_T of the same shape, in the same buffers if they are static.

        Args:
            x_T: standard normal noise (B, ...).
            seeds: one per sample, for a stochastic plan.
            start: see `SamplingPlan.first_sample`.

        Raises:
            ConfigError: the plan is stochastic and the number of seeds is not the number of samples.
        """
        if self.plan.stochastic and (seeds is None or len(seeds) != len(x_T)):
            got = "none" if seeds is None else f"{len(seeds)} for {len(x_T)} samples"
            fix = "add seeds=[...], one per sample, or use a deterministic solver, such as dpmpp_2m"
            raise ConfigError(f"a stochastic solver needs a seed for each sample, got {got}", field="seeds", fix=fix)
        self._generators = step_generators(seeds if self.plan.stochastic else (), x_T.device)
        self.index.zero_()
        # A copy, because a denoiser may write to its input; nor may that reach the sample, see `advance`.
        noise = x_T.to(self.x.dtype, copy=not self.static)
        self._store(
            self.plan.first_sample(noise, None if start is None else start.to(noise)),
            torch.zeros_like(self.x),
            tuple(map(torch.zeros_like, self.state)),
        )

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def t(self) -> Tensor:
        """(B,): the timestep of the next evaluation, gathered on the device."""
        return self.timesteps.index_select(0, self.index).expand(len(self.x))

    def timestep(self, i: int) -> float:
        """The timestep of evaluation i, without a wait for the device."""
        return self.plan.timesteps[i].item()

    def level(self, i: int) -> NoiseLevel:
        """The noise level of x after evaluation i."""
        return NoiseLevel(float(self.plan.signal[i + 1]), float(self.plan.sigma[i + 1]))

    def draw_noise(self, i: int) -> None:
        """Draw the noise of evaluation i, outside any CUDA graph. Nothing is drawn if this evaluation adds none."""
        if self.noise is None or not self.plan.noise_scale[i]:
            return
        drawn = randn_per_sample(self.x.shape[1:], self._generators, device=self.x.device).to(self.x.dtype)
        self.noise = self.noise.copy_(drawn) if self.static else drawn

    def advance(self, denoiser: DenoiserFn) -> None:
        """One evaluation of the network and the solver's step, without host synchronization.

        If `static`, the call can be captured in a CUDA graph and replayed.
        """
        output = evaluate_denoiser(denoiser, self.x.to(self.dtype, copy=not self.static), self.t)
        row = self.rows.index_select(0, self.index)[0]
        self._store(*self.plan.step(self.x, output.to(self.x.dtype), row, self.noise, self.state))
        self.index += 1

    def result(self) -> Tensor:
        """The sample in the dtype of x_T; if `static`, a copy."""
        return self.x.to(self.dtype, copy=self.static)

    def _store(self, x: Tensor, x0: Tensor, state: tuple[Tensor, ...]) -> None:
        if not self.static:
            self.x, self.x0, self.state = x, x0, state
            return
        # The oldest first: a new value may be a tensor that is itself overwritten below.
        for memory, value in [*reversed(list(zip(self.state, state, strict=True))), (self.x0, x0), (self.x, x)]:
            if memory is not value:
                memory.copy_(value)


def evaluate_denoiser(denoiser: DenoiserFn, x: Tensor, t: Tensor) -> Tensor:
    """The denoiser's output, (B, ...).

    Raises:
        ConfigError: the output is not a tensor of the shape of `x`.
    """
    output = denoiser(x, t)
    if not isinstance(output, Tensor) or output.shape != x.shape:
        returned = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        why = f"the denoiser must return a tensor shaped like x, {tuple(x.shape)}; it returned {returned}"
        fix = "return the prediction alone, shaped like x"
        if not isinstance(output, Tensor):
            fix = "return the tensor alone, such as output[0], or output.sample of a diffusers model"
        elif x.ndim > 1 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
            fix = "if the second half of the channels is a variance, return output.chunk(2, dim=1)[0]"
        raise ConfigError(why, field="denoiser", fix=fix)
    return output


def step_generators(seeds: Sequence[int] | None, device: torch.device) -> list[torch.Generator]:
    """The generator of each sample's step noise."""
    return [generator(index(seed), "step", device=device) for seed in (() if seeds is None else seeds)]
