"""`sample`: noise to samples with any network, in one call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from operator import index
from typing import Any

from torch import Tensor

from ccella_fast.deprecation import deprecated_arguments
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.scheduler_adapter import SchedulerTrajectory
from ccella_fast.diffusion.solvers import Solver, get_solver
from ccella_fast.diffusion.trajectory import Callback, DenoiserFn, Trajectory, TrajectoryProtocol, run_trajectory
from ccella_fast.errors import ConfigError, NonFiniteError, did_you_mean

_ARGUMENTS_OF_DIFFUSERS = {
    "generator": "use seeds=[...], one integer per sample",
    "callback_on_step_end": "use callback=function, which is called as function(i, t, x, x0)",
}


@deprecated_arguments(num_steps="num_inference_steps")
def sample(
    denoiser: DenoiserFn,
    x_T: Tensor,
    *,
    solver: str | Solver | Any = "dpmpp_2m",
    num_inference_steps: int = 20,
    prediction: str | None = None,
    seeds: Sequence[int] | None = None,
    schedule: Any = None,
    callback: Callback | None = None,
    timestep_spacing: str | None = None,
    progress: bool = False,
    **unknown: Any,
) -> Tensor:
    """Generate samples from noise with any network. The loop does not wait for the device.

    Args:
        denoiser: a function `denoiser(x, t)`, where x is like `x_T` and t is (B,), int64 for a noise schedule and floating
            point for a rectified flow. It returns the quantity that `prediction` names, (B, ...). Pass conditioning through a
            closure or functools.partial. It is called under no_grad, and may write to x.
        x_T: standard normal noise (B, ...). The solver computes in fp32 (in fp64 if `x_T` is fp64), whatever the network's
            dtype.
        solver: the name of one of the solvers (see :doc:`/explanation/sampling`); a Solver, such as Ddim(eta=0.5); or any
            scheduler object of diffusers, which is not modified and whose own schedule and prediction type are used.
        num_inference_steps: denoising steps.
        prediction: what the network predicts: "epsilon", "v" or "x0" for a noise schedule; "velocity" (eps - x0) or "x0" for a
            rectified flow. The names used by diffusers and MONAI ("v_prediction", "sample") are accepted. None: "epsilon", or
            the prediction type of a scheduler object.
        seeds: one per sample, required by stochastic solvers. The noise of a sample depends on its seed alone, in any batch.
        schedule: None for the default scaled-linear schedule; or betas, alphas_cumprod, or an object with an attribute
            alphas_cumprod.
        callback: called as `callback(i, t, x, x0)` after evaluation i, with the timestep t as a number, the new sample x,
            which it may change in place, and the estimated clean sample x0. A tensor that it returns is an error.
        timestep_spacing: "leading", "trailing", "linspace" or "karras"; None for the solver's default.
        progress: show a progress bar on stderr.
        unknown: raises ConfigError with the right name.

    Returns:
        x_0, with the shape, device and dtype of `x_T`.

    Raises:
        ConfigError: an argument is invalid, or the arguments contradict each other.
        NonFiniteError: the result contains NaN or infinity.
    """
    for name in unknown:
        known = [*inspect.signature(sample).parameters][:-1]
        fix = _ARGUMENTS_OF_DIFFUSERS.get(name) or did_you_mean(name, known)
        raise ConfigError(f"sample has no argument '{name}'", field=name, fix=fix)
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        got = f"a tensor of {x_T.dtype}" if isinstance(x_T, Tensor) else f"an object of type {type(x_T).__name__}"
        why = f"x_T must be a floating-point tensor, got {got}"
        raise ConfigError(why, field="x_T", fix="give a floating-point tensor of standard normal noise")
    if x_T.ndim == 0:
        raise ConfigError("x_T must have a batch dimension", field="x_T", fix="give x_T[None] for a single number")
    seeds = _checked_seeds(seeds)
    if isinstance(solver, (str, Solver)):
        plan = get_solver(solver).plan(
            Schedule.of(schedule),
            num_inference_steps,
            prediction=prediction or "epsilon",
            timestep_spacing=timestep_spacing,
        )
        trajectory: TrajectoryProtocol = Trajectory(plan, x_T, seeds)
    else:
        for field, value in (("schedule", schedule), ("timestep_spacing", timestep_spacing)):
            if value is not None:
                why = f"{field} cannot be combined with the scheduler object {type(solver).__name__}, which has its own"
                raise ConfigError(why, field=field, fix="set it in the scheduler, or use a solver by name")
        trajectory = SchedulerTrajectory(
            solver, x_T, seeds, num_inference_steps=num_inference_steps, prediction=prediction
        )
    result = run_trajectory(trajectory, lambda _: trajectory.advance(denoiser), callback=callback, progress=progress)
    if not bool(result.isfinite().all()):
        fix = "check the denoiser's output (fp16 overflows easily), and that prediction and schedule match the network"
        raise NonFiniteError("the sample contains NaN or infinity", field="denoiser", fix=fix)
    return result


def _checked_seeds(seeds: Any) -> list[int] | None:
    """The seeds as a list of integers. Raises ConfigError."""
    try:
        return None if seeds is None else [index(seed) for seed in seeds]
    except TypeError:
        why = f"seeds must be a list of integers, one per sample, got {type(seeds).__name__}"
        if not isinstance(seeds, int):
            why = "seeds must be integers, not random generators or other objects"
        raise ConfigError(why, field="seeds", fix="write seeds=[1, 2] for two samples") from None
