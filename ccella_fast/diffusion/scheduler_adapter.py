"""A diffusers scheduler as a trajectory.

A scheduler keeps its own state and reads it on the host in each step, so it is slower than the solvers of this package and
cannot be captured in a CUDA graph. This module does not import diffusers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ccella_fast.diffusion.prediction import ALIASES
from ccella_fast.diffusion.solvers import SOLVERS
from ccella_fast.diffusion.trajectory import DenoiserFn, evaluate_denoiser, step_generators
from ccella_fast.errors import ConfigError


class SchedulerTrajectory:
    """Samples with a copy of a diffusers scheduler, over the timesteps that it chooses.

    Args:
        scheduler: any scheduler object of diffusers; it is not modified.
        x_T: standard normal noise (B, ...); it is multiplied by the scheduler's init_noise_sigma, and the network's input is
            scaled by scale_model_input.
        seeds: one per sample, for schedulers whose `step` takes a generator. Without seeds, a stochastic scheduler draws from
            torch's global generator.
        num_inference_steps: denoising steps.
        prediction: what the network predicts, which must be the scheduler's own prediction type; None: whatever that is.

    Raises:
        ConfigError: `scheduler` is not a scheduler, its prediction type contradicts `prediction`, the number of steps is not a
            positive integer, or the number of seeds is not the number of samples.
    """

    def __init__(
        self,
        scheduler: Any,
        x_T: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        num_inference_steps: int,
        prediction: str | None = None,
    ):
        _check_scheduler(scheduler, prediction)
        _check_steps(num_inference_steps)
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=x_T.device)
        if hasattr(self.scheduler, "set_begin_index"):
            # Otherwise the scheduler looks its position up by timestep, and several Karras levels may share a timestep.
            self.scheduler.set_begin_index(0)
        self.dtype = x_T.dtype
        self.x = x_T.float() * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.x0: Tensor | None = None
        self.timesteps: Tensor = self.scheduler.timesteps
        self.index = torch.zeros(1, dtype=torch.int64, device=x_T.device)
        self._step_arguments: dict[str, Any] = {}
        if seeds is not None:
            if len(seeds) != len(x_T):
                why = f"the number of seeds must be the number of samples, got {len(seeds)} for {len(x_T)}"
                raise ConfigError(why, field="seeds", fix="give one seed per sample")
            if "generator" in inspect.signature(self.scheduler.step).parameters:
                self._step_arguments["generator"] = step_generators(seeds, x_T.device)
        self._position = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def timestep(self, i: int) -> float:
        """The timestep of evaluation i. Waits for the device."""
        return self.timesteps[i].item()

    def draw_noise(self, i: int) -> None:
        """Nothing to do: the scheduler draws its own noise."""

    def advance(self, denoiser: DenoiserFn) -> None:
        """One evaluation of the network and the scheduler's step."""
        t = self.timesteps[self._position]
        scaled = self.scheduler.scale_model_input(self.x, t) if hasattr(self.scheduler, "scale_model_input") else self.x
        output = evaluate_denoiser(denoiser, scaled.to(self.dtype), t.expand(len(self.x))).float()
        step = self.scheduler.step(output, t, self.x, **self._step_arguments)
        self.x, self.x0 = step.prev_sample, getattr(step, "pred_original_sample", None)
        self._position += 1
        self.index += 1

    def result(self) -> Tensor:
        """The sample in the dtype of x_T."""
        return self.x.to(self.dtype)


def _check_scheduler(scheduler: Any, prediction: str | None) -> None:
    is_class = isinstance(scheduler, type)
    name = scheduler.__name__ if is_class else type(scheduler).__name__
    if is_class and hasattr(scheduler, "set_timesteps"):
        raise ConfigError(f"{name} is a class, not an object", field="solver", fix=f"use solver={name}(...)")
    if not all(hasattr(scheduler, attribute) for attribute in ("set_timesteps", "step", "config")):
        monai = "; for the noise schedule of a MONAI scheduler, use solver='ddim', schedule=scheduler"
        hint = monai if hasattr(scheduler, "alphas_cumprod") else ""
        fix = f"use one of {', '.join(SOLVERS)}, or a diffusers scheduler{hint}"
        raise ConfigError(f"an object of type {name} is not a solver", field="solver", fix=fix)
    # The schedulers of rectified flows have no such setting: they take a velocity.
    flow = "velocity" if "FlowMatch" in name else None
    configured = getattr(scheduler.config, "prediction_type", flow)
    if None not in (configured, prediction) and _canonical(configured) != _canonical(prediction):
        why = f"the prediction type of this {name} is {configured}, not {prediction}"
        fix = "use a scheduler for what the network predicts"
        if flow is None:
            fix = "set prediction_type in the scheduler's configuration to what the network predicts"
        raise ConfigError(why, field="prediction", fix=fix)


def _check_steps(given: Any) -> None:
    if not isinstance(given, Integral) or int(given) < 1:
        why = f"the number of steps must be a positive integer, got {given!r:.40}"
        raise ConfigError(why, field="num_inference_steps", fix="use 20, for example")


def _canonical(prediction: Any) -> str:
    return str(ALIASES.get(prediction, prediction))
