"""The only sampling loop. It knows no network: `denoise` is any function that predicts the noise in x_t."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.diffusion.noise import generator, randn_per_sample
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import Solver


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    *,
    solver: Solver,
    schedule: Schedule,
    seeds: Sequence[int],  # one a sample; they alone decide its noise
    num_steps: int,
    device: torch.device | str = "cpu",
    description: str = "sampling",
    progress: bool = True,
) -> Tensor:
    """Draw x_0, fp32 (B, *shape) on `device`, with B = len(seeds).

    denoise(x, t): x fp32 (B, *shape), t int64 (B,) -> noise (B, *shape) in any floating dtype. The starting noise is drawn
    on the CPU, so a deterministic solver starts alike on every device; the noise inside the loop is drawn on `device`.
    Nothing in the loop waits for the device."""
    plan = solver.plan(schedule, num_steps)
    timesteps = torch.tensor(plan.timesteps, dtype=torch.int64, device=device)[:, None].expand(-1, len(seeds))
    rows = torch.tensor(plan.coefficients, dtype=torch.float32, device=device)
    sources = [generator(seed, "step", device=device) for seed in seeds]
    x = randn_per_sample(shape, [generator(seed, "start") for seed in seeds], device=device)
    state: Any = None
    last = len(rows) - 1
    bar = tqdm(range(len(rows)), desc=description, unit="step", disable=not progress, mininterval=_interval())
    for i in bar:
        eps = denoise(x, timesteps[i]).float()
        # No noise is added on arrival at x_0; a plan without noise never draws any.
        noise = randn_per_sample(shape, sources, device=device) if plan.stochastic and i < last else None
        x, _, state = solver.step(x, eps, rows[i], noise, state)
    return x


def _interval() -> float:
    """Seconds between updates of the bar: a log file takes fewer lines than a terminal."""
    return 0.1 if sys.stderr.isatty() else 1.0
