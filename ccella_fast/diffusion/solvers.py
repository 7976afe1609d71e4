"""Solvers: how one denoising step is taken. Each is a pure description; the loop lives in `loop.py`.

A solver gives a `Plan` (timesteps and one row of float64 coefficients a step, computed before the loop starts) and a pure
function `step`. What a multi-step method must remember travels through `state`, so a solver object never changes.

Symbols: abar_t is the schedule's alphas_cumprod, s the timestep that follows t in the plan, abar_s = 1 after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.errors import ConfigError, did_you_mean


class Plan(NamedTuple):
    """timesteps: descending integers, (N,). coefficients: float64 (N, K), a row for each step. stochastic: noise is read."""

    timesteps: np.ndarray
    coefficients: np.ndarray
    stochastic: bool


class Step(NamedTuple):
    """x: the sample at the next timestep. x0: the clean sample as estimated now. state: for the next call."""

    x: Tensor
    x0: Tensor
    state: Any


class Solver(Protocol):
    def plan(self, schedule: Schedule, num_steps: int) -> Plan: ...

    def step(self, x: Tensor, eps: Tensor, row: Tensor, noise: Tensor | None, state: Any) -> Step:
        """x, eps, noise: (B, ...) fp32; row: (K,) fp32 on their device; noise is None where the plan is not stochastic.
        `state` is None at the first step. No host synchronisation."""
        ...


class _OneStep:
    """x_s = a x0 + b x_t + c eps + d noise, with x0 = (x_t - sigma_t eps) / signal_t. Row: signal, sigma, a, b, c, d."""

    def step(self, x: Tensor, eps: Tensor, row: Tensor, noise: Tensor | None, state: Any) -> Step:
        signal, sigma, a, b, c, d = row.unbind()
        x0 = (x - sigma * eps) / signal
        following = a * x0 + b * x + c * eps
        return Step(following if noise is None else following + d * noise, x0, state)


@dataclass(frozen=True)
class Ddpm(_OneStep):
    """Ancestral sampling, Ho et al. 2020 (arXiv 2006.11239), eq. 7, with the posterior variance ("fixed small").

    With every training timestep this is the reference's sampler. With fewer, the posterior between *consecutive chosen*
    timesteps is used (Nichol and Dhariwal 2021, arXiv 2102.09672, section 4), not the single-step one."""

    def plan(self, schedule: Schedule, num_steps: int) -> Plan:
        timesteps, abar_t, abar_s = _spaced(schedule, num_steps)
        beta = 1 - abar_t / abar_s
        variance = beta * (1 - abar_s) / (1 - abar_t)
        a = np.sqrt(abar_s) * beta / (1 - abar_t)
        b = np.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t)
        return Plan(timesteps, _rows(abar_t, a, b, np.zeros_like(a), np.sqrt(variance)), stochastic=True)


@dataclass(frozen=True)
class Ddim(_OneStep):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12. eta 0: deterministic; eta 1: the noise of the respaced `Ddpm`."""

    eta: float = 0.0

    def plan(self, schedule: Schedule, num_steps: int) -> Plan:
        timesteps, abar_t, abar_s = _spaced(schedule, num_steps)
        d = self.eta * np.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
        c = np.sqrt(1 - abar_s - d**2)
        return Plan(timesteps, _rows(abar_t, np.sqrt(abar_s), np.zeros_like(c), c, d), stochastic=self.eta > 0)


SOLVERS: dict[str, type[Solver]] = {"ddpm": Ddpm, "ddim": Ddim}


def get_solver(name: str) -> Solver:
    """The solver called `name` with its defaults; ConfigError with the nearest name otherwise."""
    if name not in SOLVERS:
        raise ConfigError(f"there is no solver '{name}'", field="sampling.solver", fix=did_you_mean(name, SOLVERS))
    return SOLVERS[name]()


def _spaced(schedule: Schedule, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Evenly spaced timesteps with both ends ("linspace", Lin et al. 2024, arXiv 2305.08891, table 2), abar_t and abar_s.

    T - 1 is where pure noise is a fair start, 0 where the last and finest detail is decided: at equal cost this loses less
    of the spread of Gaussian data under DDIM than spacings that leave one end out."""
    total = len(schedule)
    if not 1 <= num_steps <= total:
        fix = f"use 1 to {total}, the schedule's num_train_timesteps"
        raise ConfigError(f"{num_steps} steps are not possible", field="sampling.num_inference_steps", fix=fix)
    evenly = np.linspace(0, total - 1, num_steps) if num_steps > 1 else np.array([total - 1])
    timesteps = evenly.round()[::-1].astype(np.int64)
    abar_t = schedule.alphas_cumprod[timesteps]
    return timesteps, abar_t, np.append(abar_t[1:], 1.0)


def _rows(abar_t: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    return np.stack([np.sqrt(abar_t), np.sqrt(1 - abar_t), *columns], axis=1)
