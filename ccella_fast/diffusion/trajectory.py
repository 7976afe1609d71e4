"""The sampling loop and the state that it advances. A denoiser is any function of (x, t)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.diffusion.noise import generator, randn_per_sample
from ccella_fast.diffusion.solvers import SamplingPlan
from ccella_fast.errors import ConfigError
from ccella_fast.progress import refresh_interval

DenoiserFn = Callable[[Tensor, Tensor], Tensor]  # x (B, ...), t (B,) -> prediction (B, ...)
Callback = Callable[[int, float, Tensor, Tensor | None], None]  # evaluation, t, the new x, x0 as estimated there


class TrajectoryProtocol(Protocol):
    """What the loop drives: a Trajectory of ours, or one around a diffusers scheduler."""

    @property
    def x(self) -> Tensor: ...
    @property
    def x0(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def timestep(self, i: int) -> float: ...
    def draw_noise(self, i: int) -> None: ...
    def advance(self, denoiser: DenoiserFn) -> None: ...
    def result(self) -> Tensor: ...


@torch.no_grad()
def run_trajectory(
    trajectory: TrajectoryProtocol,
    advance: Callable[[int], None],
    *,
    callback: Callback | None = None,
    description: str = "sampling",
    progress: bool = True,
) -> Tensor:
    """The loop. advance(i) takes evaluation i: `trajectory.advance(denoiser)`, or the replay of a CUDA graph that holds it."""
    bar = tqdm(
        range(len(trajectory)), desc=description, unit="step", disable=not progress, mininterval=refresh_interval()
    )
    for i in bar:
        trajectory.draw_noise(i)
        advance(i)
        if callback is not None:
            callback(i, trajectory.timestep(i), trajectory.x, trajectory.x0)
    return trajectory.result()


class Trajectory:
    """The tensors of one batch on its way along a plan. Its numbers live on the device, and so does its position.

    plan        what is walked
    x           (B, ...) fp32, or fp64 if x_T is: the sample now
    x0          like x: the clean sample as estimated at the last evaluation
    timesteps   (E,) on the device; rows (E, K), the plan's coefficients in x's dtype
    index       (1,) int64 on the device: the next evaluation, to gather whatever else was computed for all timesteps
    noise       like x, or None when the plan is not stochastic: what the next evaluation adds
    static      every tensor keeps its address, as a captured CUDA graph needs; otherwise a step makes new ones, and those
                that a denoiser or a callback has kept stay as they were
    """

    def __init__(self, plan: SamplingPlan, x_T: Tensor, seeds: Sequence[int] | None = None, *, static: bool = False):
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
        self.start(x_T, seeds)

    def start(self, x_T: Tensor, seeds: Sequence[int] | None = None) -> None:
        """Begin anew with another x_T of the same shape, in the same buffers when they are static."""
        if self.plan.stochastic and (seeds is None or len(seeds) != len(x_T)):
            have = "none are given" if seeds is None else f"{len(seeds)} are given for {len(x_T)} samples"
            fix = "add seeds=[...], one a sample, or take a deterministic solver: dpmpp_2m, unipc, ddim"
            raise ConfigError(f"a stochastic solver needs a seed for each sample; {have}", field="seeds", fix=fix)
        self._sources = step_generators(seeds if self.plan.stochastic else (), x_T.device)
        self.index.zero_()
        self._keep(x_T.to(self.x.dtype), torch.zeros_like(self.x), tuple(map(torch.zeros_like, self.state)))

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def t(self) -> Tensor:
        """(B,): the timestep of the next evaluation, gathered on the device."""
        return self.timesteps.index_select(0, self.index).expand(len(self.x))

    def timestep(self, i: int) -> float:
        return self.plan.timesteps[i].item()

    def draw_noise(self, i: int) -> None:
        """Fill `noise` for evaluation i, outside any graph. Nothing is drawn where the plan adds none."""
        if self.noise is None or not self.plan.noise_scale[i]:
            return
        drawn = randn_per_sample(self.x.shape[1:], self._sources, device=self.x.device).to(self.x.dtype)
        self.noise = self.noise.copy_(drawn) if self.static else drawn

    def advance(self, denoiser: DenoiserFn) -> None:
        """One evaluation and the solver's step. Device work only: with `static` it can be captured once and replayed."""
        output = evaluate_denoiser(denoiser, self.x.to(self.dtype), self.t)
        row = self.rows.index_select(0, self.index)[0]
        self._keep(*self.plan.step(self.x, output.to(self.x.dtype), row, self.noise, self.state))
        self.index += 1

    def result(self) -> Tensor:
        """The sample in x_T's dtype, in memory of its own."""
        return self.x.to(self.dtype, copy=self.static)

    def _keep(self, x: Tensor, x0: Tensor, state: tuple[Tensor, ...]) -> None:
        if not self.static:
            self.x, self.x0, self.state = x, x0, state
            return
        # The last memory first: each is copied from what is now before that is overwritten.
        for memory, value in [*reversed(list(zip(self.state, state, strict=True))), (self.x0, x0), (self.x, x)]:
            if memory is not value:
                memory.copy_(value)


def evaluate_denoiser(denoiser: DenoiserFn, x: Tensor, t: Tensor) -> Tensor:
    """The denoiser's answer; ConfigError when it is not shaped like x."""
    output = denoiser(x, t)
    if not isinstance(output, Tensor) or output.shape != x.shape:
        returned = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        why, fix = (
            f"the denoiser returned {returned} for x of {tuple(x.shape)}",
            "return the prediction alone, shaped like x",
        )
        raise ConfigError(why, field="denoiser", fix=fix)
    return output


def step_generators(seeds: Sequence[int] | None, device: torch.device) -> list[torch.Generator]:
    """The source of each sample's step noise."""
    return [generator(index(seed), "step", device=device) for seed in (() if seeds is None else seeds)]
