"""A diffusers scheduler as a trajectory. It keeps its own state and reads it on the host at each step, so it is not as fast as
a solver of ours and cannot be captured in a CUDA graph; diffusers itself is imported only by who brings such an object."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccella_fast.diffusion.prediction import ALIASES
from ccella_fast.diffusion.solvers import SOLVERS
from ccella_fast.diffusion.trajectory import DenoiserFn, evaluate_denoiser, step_generators
from ccella_fast.errors import ConfigError


class SchedulerTrajectory:
    """Walks a copy of `scheduler` over the timesteps that it chooses for num_steps.

    x_T is standard normal; it is multiplied by the scheduler's init_noise_sigma, and the network's input goes through
    scale_model_input. seeds: one a sample, given to a `step` that takes a generator; without them a stochastic scheduler
    draws from torch's global stream. prediction: the scheduler's own counts; another one than "epsilon" must agree with it.
    Raises ConfigError for an object that is no scheduler."""

    def __init__(
        self,
        scheduler: Any,
        x_T: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        num_steps: int,
        prediction: str = "epsilon",
    ):
        _check(scheduler, prediction)
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_steps, device=x_T.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(
                0
            )  # else it looks its place up by timestep, and Karras levels share timesteps
        self.dtype = x_T.dtype
        self.x = x_T.float() * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.x0: Tensor | None = None
        self.timesteps: Tensor = self.scheduler.timesteps
        self.index = torch.zeros(1, dtype=torch.int64, device=x_T.device)
        self._extra: dict[str, Any] = {}
        if seeds is not None:
            if len(seeds) != len(x_T):
                why = f"{len(seeds)} seeds are given for {len(x_T)} samples"
                raise ConfigError(why, field="seeds", fix="give one a sample")
            if "generator" in inspect.signature(self.scheduler.step).parameters:
                self._extra["generator"] = step_generators(seeds, x_T.device)
        self._done = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def timestep(self, i: int) -> float:
        return self.timesteps[i].item()

    def draw_noise(self, i: int) -> None:
        """The scheduler draws its own."""

    def advance(self, denoiser: DenoiserFn) -> None:
        t = self.timesteps[self._done]
        seen = self.scheduler.scale_model_input(self.x, t) if hasattr(self.scheduler, "scale_model_input") else self.x
        output = evaluate_denoiser(denoiser, seen.to(self.dtype), t.expand(len(self.x))).float()
        done = self.scheduler.step(output, t, self.x, **self._extra)
        self.x, self.x0 = done.prev_sample, getattr(done, "pred_original_sample", None)
        self._done += 1
        self.index += 1

    def result(self) -> Tensor:
        return self.x.to(self.dtype)


def _check(scheduler: Any, prediction: str) -> None:
    kind = type(scheduler).__name__
    if not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config")):
        monai = "; from a MONAI scheduler take the noise schedule: solver='ddim', schedule=scheduler"
        hint = monai if hasattr(scheduler, "alphas_cumprod") else ""
        fix = f"name one of {', '.join(SOLVERS)}, or bring a diffusers scheduler{hint}"
        raise ConfigError(f"{kind} is no solver", field="solver", fix=fix)
    own = getattr(scheduler.config, "prediction_type", None)
    wanted = ALIASES.get(prediction, prediction)
    if own is not None and wanted != "epsilon" and ALIASES.get(own, own) != wanted:
        why = f"this {kind} is set up for {own}, not {prediction}"
        raise ConfigError(why, field="prediction", fix="set prediction_type in the scheduler")
