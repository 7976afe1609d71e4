"""A diffusers scheduler as a trajectory.

A scheduler keeps its own state and reads it on the host in each step, so it is slower than the solvers of this package and
cannot be captured in a CUDA graph. This module does not import diffusers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccella_fast.diffusion.prediction import ALIASES
from ccella_fast.diffusion.scheduler_defects import check_for_defects
from ccella_fast.diffusion.solvers import SOLVERS
from ccella_fast.diffusion.solvers.base import DEFAULT_STEPS, skipped_steps
from ccella_fast.diffusion.timesteps import check_steps, numbers
from ccella_fast.diffusion.trajectory import DenoiserFn, NoiseLevel, evaluate_denoiser, step_generators
from ccella_fast.errors import ConfigError


class SchedulerTrajectory:
    """Samples with a copy of a diffusers scheduler, over the timesteps that it chooses, in fp32, or in fp64 if x_T is fp64.

    Args:
        scheduler: any scheduler object of diffusers; it is not modified.
        x_T: standard normal noise (B, ...); it is multiplied by the scheduler's init_noise_sigma, and the network's input is
            scaled by scale_model_input.
        seeds: one per sample, for schedulers whose `step` takes a generator. Without seeds, a stochastic scheduler draws from
            torch's global generator.
        num_inference_steps: denoising steps; None: 20, or those of the list.
        prediction: what the network predicts, which must be the scheduler's own prediction type; None: whatever that is.
        timesteps: for `set_timesteps`.
        sigmas: for `set_timesteps`.
        start: a clean sample, noised by the scheduler to the first of the remaining timesteps.
        strength: the share of the steps that remain.

    Attributes:
        prediction: the canonical name of the prediction type; None: none of ours.

    Raises:
        ConfigError: `scheduler` is not a scheduler, does not take these arguments, or its prediction type contradicts
            `prediction`; the number of steps is not a positive integer, or the number of seeds is not the number of samples.
    """

    def __init__(
        self,
        scheduler: Any,
        x_T: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        num_inference_steps: int | None,
        prediction: str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        start: Tensor | None = None,
        strength: float = 1.0,
    ):
        self.prediction = _checked_prediction(scheduler, prediction)
        self.scheduler = copy.deepcopy(scheduler)
        _set_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas, x_T.device)
        check_for_defects(
            self.scheduler,
            starts_at_noise=start is None and timesteps is None and sigmas is None,
            timesteps_alone=timesteps is not None and sigmas is None,
        )
        order = getattr(self.scheduler, "order", 1)
        count = self.scheduler.num_inference_steps or len(self.scheduler.timesteps)
        first = order * skipped_steps(strength, count, flow=hasattr(self.scheduler, "scale_noise"))
        if hasattr(self.scheduler, "set_begin_index"):
            # Otherwise the scheduler looks its position up by timestep, and several Karras levels may share a timestep.
            self.scheduler.set_begin_index(first)
        self.dtype = x_T.dtype
        self._precision = torch.float64 if x_T.dtype == torch.float64 else torch.float32
        x_T = x_T.to(self._precision)
        self.timesteps: Tensor = self.scheduler.timesteps[first:]
        if start is None:
            self.x = x_T * getattr(self.scheduler, "init_noise_sigma", 1.0)
        else:
            self.x = self._noised(start.to(x_T), x_T, self.timesteps[:1].expand(len(x_T)))
        self.x0: Tensor | None = None
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

    def level(self, i: int) -> NoiseLevel:
        """The noise level of x after evaluation i, as the scheduler noises a sample to it. Waits for the device."""
        if i + 1 == len(self):
            return NoiseLevel(1.0, 0.0)
        t, zero = self.timesteps[i + 1 : i + 2], torch.zeros(1, 1, device=self.x.device)
        return NoiseLevel(self._noised(zero + 1, zero, t).item(), self._noised(zero, zero + 1, t).item())

    def draw_noise(self, i: int) -> None:
        """Nothing to do: the scheduler draws its own noise."""

    def advance(self, denoiser: DenoiserFn) -> None:
        """One evaluation of the network and the scheduler's step."""
        t = self.timesteps[self._position]
        scaled = self.scheduler.scale_model_input(self.x, t) if hasattr(self.scheduler, "scale_model_input") else self.x
        given = scaled.to(self.dtype, copy=True)  # a denoiser may write to its input
        output = evaluate_denoiser(denoiser, given, t.expand(len(self.x))).to(self._precision)
        step = self.scheduler.step(output, t, self.x, **self._step_arguments)
        self.x, self.x0 = step.prev_sample, getattr(step, "pred_original_sample", None)
        self._position += 1
        self.index += 1

    def result(self) -> Tensor:
        """The sample in the dtype of x_T."""
        return self.x.to(self.dtype)

    def _noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A clean sample with the noise of timestep t, (B,)."""
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(clean, t, noise)
        if not hasattr(self.scheduler, "add_noise"):
            name = type(self.scheduler).__name__
            why = f"{name} cannot add noise, which start and the level of a callback need"
            raise ConfigError(why, field="solver", fix="use a solver by name")
        return self.scheduler.add_noise(clean, noise, t)


def _checked_prediction(scheduler: Any, prediction: str | None) -> str | None:
    """The canonical prediction type of a scheduler; None if it has none of ours. Raises ConfigError."""
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
        elif prediction == "x0_minus_noise":
            fix = "use solver='euler_flow' or 'heun_flow', which take either sign"
        raise ConfigError(why, field="prediction", fix=fix)
    if "sigma_data" in scheduler.config:  # of EDM: it calls the output of a preconditioned network epsilon
        return None
    return None if configured is None else _canonical(configured)


def _set_timesteps(scheduler: Any, count: Any, timesteps: Any, sigmas: Any, device: torch.device) -> None:
    """Call the scheduler's `set_timesteps` with what it takes. Raises ConfigError."""
    name, lists = type(scheduler).__name__, {"timesteps": timesteps, "sigmas": sigmas}
    lists = {field: given for field, given in lists.items() if given is not None}
    for field, given in lists.items():
        if field not in inspect.signature(scheduler.set_timesteps).parameters:
            why = f"the scheduler object {name} does not take {field}"
            raise ConfigError(why, field=field, fix="use a solver by name, or num_inference_steps")
        entries = len(numbers(given, field))
        if count not in (None, entries):
            why = f"num_inference_steps is {count}, but {field} has {entries} entries"
            raise ConfigError(why, field="num_inference_steps", fix="remove num_inference_steps")
    if not lists:
        count = DEFAULT_STEPS if count is None else count
        check_steps(count, None)
    try:
        if lists:
            scheduler.set_timesteps(**lists, device=device)
        else:
            scheduler.set_timesteps(count, device=device)
    except (ValueError, TypeError) as error:
        fix = "use a solver by name, with schedule=RectifiedFlow(shift=...) for a dynamic shift"
        raise ConfigError(f"{name} refuses these steps: {error}", field="solver", fix=fix) from error


def _canonical(prediction: Any) -> str:
    return str(ALIASES.get(prediction, prediction))
