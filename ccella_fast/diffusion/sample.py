"""`sample`: noise to samples with any network, in one call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from ccella_fast.deprecation import deprecated_arguments
from ccella_fast.diffusion.edm import Edm
from ccella_fast.diffusion.flow import MonaiFlow, RectifiedFlow, is_monai_flow
from ccella_fast.diffusion.plausibility import FirstOutput
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.scheduler_adapter import SchedulerTrajectory
from ccella_fast.diffusion.scheduler_defects import LATE_START
from ccella_fast.diffusion.solvers import Solver, get_solver
from ccella_fast.diffusion.solvers.base import NoiseProcess
from ccella_fast.diffusion.solvers.rectified_flow import EulerFlow, MonaiEulerFlow
from ccella_fast.diffusion.trajectory import Callback, DenoiserFn, Trajectory, TrajectoryProtocol, run_trajectory
from ccella_fast.errors import ConfigError, NonFiniteError, did_you_mean

_ARGUMENTS_OF_OTHERS = {
    "generator": "use seeds=[...], one integer per sample",
    "callback_on_step_end": "use callback=function, which is called as function(i, t, x, x0)",
    "guidance_scale": "use guided(network, condition, null, scale) as the denoiser",
    "image": "use start=image",
    "mask": "use a callback with a parameter named level, which restores the known region",
    "model_kwargs": "use a closure, such as lambda x, t: network(x, t, **model_kwargs), as the denoiser",
    "eta": "use solver=Ddim(eta=...)",
    "scheduler": "use solver=scheduler for its steps, or schedule=scheduler for its noise schedule alone",
    "num_train_timesteps": "use schedule=, the betas or alphas_cumprod of the training",
    "clip_sample": "use clip_x0=1.0 for [-1, 1]",
    "clip_denoised": "use clip_x0=1.0 for [-1, 1]",
    "thresholding": "use clip_x0=DynamicThreshold(ratio, maximum)",
    "shift": "use schedule=RectifiedFlow(shift=...)",
    "mu": "use schedule=RectifiedFlow(shift=math.exp(mu))",
}


@deprecated_arguments(num_steps="num_inference_steps")
def sample(
    denoiser: DenoiserFn,
    x_T: Tensor,
    *,
    solver: str | Solver | Any = "dpmpp_2m",
    num_inference_steps: int | None = None,
    prediction: str | None = None,
    seeds: Sequence[int] | None = None,
    schedule: Any = None,
    callback: Callback | None = None,
    timestep_spacing: str | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    start: Tensor | None = None,
    strength: float | None = None,
    clip_x0: Any = None,
    progress: bool = False,
    **unknown: Any,
) -> Tensor:
    """Generate samples from noise with any network. The loop does not wait for the device.

    Args:
        denoiser: a function `denoiser(x, t)`, where x is like `x_T` and t is (B,), int64 for a noise schedule and floating
            point for the other processes. It returns the quantity that `prediction` names, (B, ...). Pass conditioning through
            a closure, functools.partial or {py:func}`ccella_fast.guided`. It is called under no_grad, and may write to x.
        x_T: standard normal noise (B, ...). The solver computes in fp32 (in fp64 if `x_T` is fp64), whatever the network's
            dtype.
        solver: the name of one of the solvers (see :doc:`/explanation/sampling`); a Solver, such as Ddim(eta=0.5); any
            scheduler object of diffusers, which is not modified and whose own schedule and prediction type are used; or MONAI's
            RFlowScheduler, for its own steps.
        num_inference_steps: denoising steps; None: 20, or those of `timesteps` or `sigmas`.
        prediction: what the network predicts: "epsilon", "v" or "x0" for a noise schedule; "velocity" (noise - x0, as in
            diffusers), "x0_minus_noise" (as in MONAI, torchcfm and MOTFM) or "x0" for a rectified flow; "x0" or "epsilon" in
            sigma space. The names used by diffusers and MONAI ("v_prediction", "sample") are accepted. None: "epsilon", "x0" in
            sigma space, or that of a scheduler object; a rectified flow needs it.
        seeds: one per sample, required by stochastic solvers. The noise of a sample depends on its seed alone, in any batch.
        schedule: the noise process on which the network was trained. None for the default scaled-linear schedule; betas,
            alphas_cumprod, or an object with an attribute alphas_cumprod; a `RectifiedFlow`, or MONAI's RFlowScheduler; or an
            `Edm`.
        callback: called as `callback(i, t, x, x0)` after evaluation i, with the timestep t as a number, the new sample x,
            which it may change in place, and the estimated clean sample x0. If it has a parameter named `level`, it also
            receives the noise level of x, with the attributes signal and sigma: a known region of x is
            `level.signal * known + level.sigma * noise`. A tensor that it returns is an error.
        timestep_spacing: "leading", "trailing", "linspace", "karras", "exponential" or "beta"; None for the default.
        timesteps: the network's times, one per step, from noise to data, in place of a number of steps.
        sigmas: the noise levels, one per step, in place of a number of steps: sigma of a rectified flow and in sigma space,
            sigma / signal of a noise schedule. A last 0 is left out. With `timesteps`, the network receives those.
        start: a clean sample, like `x_T`, to which noise is added (image to image).
        strength: with `start`, the share of the steps that is done, as in diffusers; None: all.
        clip_x0: the limits of the estimated clean sample: a number r for [-r, r], a pair, or a `DynamicThreshold`.
        progress: show a progress bar on stderr.
        unknown: raises ConfigError with the right name.

    Returns:
        x_0, with the shape, device and dtype of `x_T`.

    Raises:
        ConfigError: an argument is invalid, or the arguments contradict each other.
        NonFiniteError: the result contains NaN or infinity.

    Warns:
        UserWarning: the network's first output does not look like what it is said to predict, the first timestep is not one of
            pure noise, or a scheduler object has a known defect.
    """
    for name in unknown:
        known = [*inspect.signature(sample).parameters][:-1]
        fix = _ARGUMENTS_OF_OTHERS.get(name) or did_you_mean(name, known)
        raise ConfigError(f"sample has no argument '{name}'", field=name, fix=fix)
    _check_tensors(x_T, start, strength)
    seeds = _checked_seeds(seeds)
    steps: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "prediction": prediction,
        "timesteps": timesteps,
        "sigmas": sigmas,
        "strength": 1.0 if strength is None else strength,
    }
    trajectory: TrajectoryProtocol
    if is_monai_flow(solver) and schedule is None:
        solver, schedule = "euler_flow", solver
    if isinstance(solver, (str, Solver)):
        process, solver = _noise_process(schedule, x_T), get_solver(solver)
        if isinstance(process, MonaiFlow) and type(solver) is EulerFlow and timesteps is None and sigmas is None:
            solver = MonaiEulerFlow(process.scheduler.num_train_timesteps)
        plan = solver.plan(process, timestep_spacing=timestep_spacing, clip_x0=clip_x0, **steps)
        starts_at_noise = all(each is None for each in (start, timesteps, sigmas))
        if starts_at_noise and isinstance(process, Schedule) and not solver.flow:
            _warn_of_late_start(int(plan.timesteps[0]), len(process))
        trajectory = Trajectory(plan, x_T, seeds, start=start)
        checked = FirstOutput(denoiser, plan.prediction, float(plan.signal[0]), float(plan.sigma[0]))
    else:
        for field, value in (("schedule", schedule), ("timestep_spacing", timestep_spacing), ("clip_x0", clip_x0)):
            if value is not None:
                why = f"{field} cannot be combined with the scheduler object {type(solver).__name__}, which has its own"
                raise ConfigError(why, field=field, fix="set it in the scheduler, or use a solver by name")
        trajectory = SchedulerTrajectory(solver, x_T, seeds, start=start, **steps)
        checked = FirstOutput(denoiser, trajectory.prediction if start is None else None, 0.0, 1.0)
    result = run_trajectory(trajectory, lambda _: trajectory.advance(checked), callback=callback, progress=progress)
    finite = result.isfinite().all()
    if checked.statistics is not None:
        finite, *statistics = torch.cat([finite.view(1), checked.statistics]).tolist()  # one wait for the device
        checked.warn(statistics)
    if not bool(finite):
        fix = "check the denoiser's output (fp16 overflows easily), and that prediction and schedule match the network"
        raise NonFiniteError("the sample contains NaN or infinity", field="denoiser", fix=fix)
    return result


def _warn_of_late_start(first: int, total: int) -> None:
    if first < LATE_START * (total - 1):
        warnings.warn(
            f"sampling begins with pure noise at timestep {first} of {total}, where the network expects a part of the image. "
            "Fix: use timestep_spacing='trailing'.",
            stacklevel=4,  # of the line that calls `sample`
        )


def _noise_process(schedule: Any, x_T: Tensor) -> NoiseProcess:
    """The noise process that `schedule` describes. Raises ConfigError."""
    if isinstance(schedule, (RectifiedFlow, Edm)):
        return schedule
    if is_monai_flow(schedule):
        return MonaiFlow(float(schedule.num_train_timesteps), scheduler=schedule, size=tuple(x_T.shape[2:]))
    if isinstance(schedule, type) and issubclass(schedule, (RectifiedFlow, Edm)):
        why = f"{schedule.__name__} is a class, not an object"
        raise ConfigError(why, field="schedule", fix=f"use schedule={schedule.__name__}()")
    return Schedule.of(schedule)


def _check_tensors(x_T: Any, start: Any, strength: Any) -> None:
    """Raises ConfigError unless x_T and start are samples."""
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        got = f"a tensor of {x_T.dtype}" if isinstance(x_T, Tensor) else f"an object of type {type(x_T).__name__}"
        why = f"x_T must be a floating-point tensor, got {got}"
        raise ConfigError(why, field="x_T", fix="give a floating-point tensor of standard normal noise")
    if x_T.ndim == 0:
        raise ConfigError("x_T must have a batch dimension", field="x_T", fix="give x_T[None] for a single number")
    if start is None and strength is not None:
        raise ConfigError("strength has no effect without start", field="strength", fix="add start=, a clean sample")
    if start is not None and (not isinstance(start, Tensor) or start.shape != x_T.shape):
        got = str(tuple(start.shape)) if isinstance(start, Tensor) else f"an object of type {type(start).__name__}"
        why = f"start must be a tensor shaped like x_T, {tuple(x_T.shape)}, got {got}"
        raise ConfigError(why, field="start", fix="give one clean sample for each sample of noise")


def _checked_seeds(seeds: Any) -> list[int] | None:
    """The seeds as a list of integers. Raises ConfigError."""
    try:
        return None if seeds is None else [index(seed) for seed in seeds]
    except TypeError:
        why = f"seeds must be a list of integers, one per sample, got {type(seeds).__name__}"
        if not isinstance(seeds, int):
            why = "seeds must be integers, not random generators or other objects"
        raise ConfigError(why, field="seeds", fix="write seeds=[1, 2] for two samples") from None
