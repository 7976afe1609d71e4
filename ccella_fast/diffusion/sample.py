"""`sample`: noise to samples with any network, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.scheduler_adapter import SchedulerTrajectory
from ccella_fast.diffusion.solvers import Solver, get_solver
from ccella_fast.diffusion.trajectory import Callback, DenoiserFn, Trajectory, TrajectoryProtocol, run_trajectory
from ccella_fast.errors import ConfigError, NonFiniteError


def sample(
    denoiser: DenoiserFn,
    x_T: Tensor,
    *,
    solver: str | Solver | Any = "dpmpp_2m",
    num_steps: int = 20,
    prediction: str = "epsilon",
    seeds: Sequence[int] | None = None,
    schedule: Any = None,
    callback: Callback | None = None,
    timestep_spacing: str | None = None,
    progress: bool = False,
) -> Tensor:
    """Turn noise into samples with any network. Nothing in the loop waits for the device.

    Args:
        denoiser: `denoiser(x, t)` with x like `x_T` and t (B,), int64 for a noise schedule, floating for a flow, returns what
            `prediction` names, (B, ...). Condition it with a closure or functools.partial; it is called under no_grad.
        x_T: standard normal noise, (B, ...). The solver computes in fp32 (fp64 if x_T is), whatever the network's dtype.
        solver: "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_flow", "heun_flow"; a Solver, such as
            Ddim(eta=0.5); or any scheduler object of diffusers, which is left unchanged and brings its own schedule and
            prediction.
        num_steps: denoising steps.
        prediction: "epsilon", "v", "x0" for a noise schedule, "velocity" (eps - x0) for a flow. The names of diffusers and
            MONAI ("v_prediction", "sample") are understood.
        seeds: one per sample, needed by ddpm and dpmpp_2m_sde. They alone decide a sample's noise, in any batch.
        schedule: None is the reference's scaled-linear one; or betas, or alphas_cumprod, or an object that holds the latter.
        callback: `callback(i, t, x, x0)` after each evaluation, t a number, x the new sample, x0 the estimated clean sample.
        timestep_spacing: "leading", "trailing", "linspace", "karras"; None is the solver's own.
        progress: show a bar on stderr.

    Returns:
        x_0, like `x_T` in shape, device and dtype.

    Raises:
        ConfigError: arguments that do not fit together.
        NonFiniteError: the result holds NaN or infinity.
    """
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        what = f"a tensor of {x_T.dtype}" if isinstance(x_T, Tensor) else f"a {type(x_T).__name__}"
        raise ConfigError(f"x_T is {what}", field="x_T", fix="give a floating tensor of standard normal noise")
    if isinstance(solver, (str, Solver)):
        plan = get_solver(solver).plan(
            Schedule.of(schedule), num_steps, prediction=prediction, timestep_spacing=timestep_spacing
        )
        trajectory: TrajectoryProtocol = Trajectory(plan, x_T, seeds)
    else:
        trajectory = SchedulerTrajectory(solver, x_T, seeds, num_steps=num_steps, prediction=prediction)
    result = run_trajectory(trajectory, lambda _: trajectory.advance(denoiser), callback=callback, progress=progress)
    if not bool(result.isfinite().all()):
        fix = (
            "check the denoiser's output (fp16 overflows easily) and that `prediction` and `schedule` are the network's"
        )
        raise NonFiniteError("the sample holds NaN or infinity", field="denoiser", fix=fix)
    return result
