"""Warnings about schedulers of diffusers whose steps are not those of the method, for the timesteps that were asked for."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from ccella_fast.errors import ConfigError

# Their `step` goes to t - T // N, also where that is not the next timestep of the list (huggingface/diffusers#11347, #12633).
_FIXED_STRIDE = {
    "DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "PNDMScheduler",
}  # fmt: skip

# A first timestep below this share of the last one is not pure noise. Twenty "leading" steps begin at 0.951.
LATE_START = 0.95


def check_for_defects(scheduler: Any, *, starts_at_noise: bool, timesteps_alone: bool) -> None:
    """Warn of what a scheduler object is known to do wrong, after its `set_timesteps`.

    Args:
        scheduler: the object.
        starts_at_noise: whether the first sample is pure noise.
        timesteps_alone: whether the caller gave timesteps and no sigmas.

    Raises:
        ConfigError: a timestep does not exist.
    """
    name, config, timesteps = type(scheduler).__name__, scheduler.config, scheduler.timesteps
    total = getattr(config, "num_train_timesteps", None)
    if total is None or not isinstance(timesteps, Tensor) or not len(timesteps):
        return
    times = timesteps.tolist()
    discrete = not timesteps.is_floating_point()
    if discrete and max(times) >= total:
        why = f"this {name} visits timestep {max(times)}, and the last one is {total - 1}"
        raise ConfigError(why, field="solver", fix="set steps_offset=0, or ask for fewer steps")
    if discrete and min(times) < 0:
        _warn(name, f"visits timestep {min(times)}, which reads the end of its table", "choose another number of steps")
    # Floating-point times need not be timesteps: those of EDM are log(sigma) / 4.
    are_timesteps = discrete or config.get("timestep_spacing") == "leading"
    if are_timesteps and starts_at_noise and times[0] < LATE_START * (total - 1):
        why = f"begins with pure noise at timestep {times[0]:g} of {total} (huggingface/diffusers#13887)"
        _warn(name, why, "set timestep_spacing='trailing'")
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        why = "has zero terminal SNR, where the noise does not tell x0 (huggingface/diffusers#3851)"
        _warn(
            name, why, "set prediction_type to what the network was trained to predict, or rescale_betas_zero_snr=False"
        )
    _check_stride(name, config, total, scheduler.num_inference_steps, times)
    shift = config.get("shift", 1)
    if timesteps_alone and shift != 1:
        why = (
            f"gives the network these timesteps, but shifts the noise levels by {shift:g} (huggingface/diffusers#14013)"
        )
        _warn(name, why, "give sigmas in place of timesteps")
    sigmas = getattr(scheduler, "sigmas", None)
    if "Multistep" in name and isinstance(sigmas, Tensor) and bool((sigmas[1:] == sigmas[:-1]).any()):
        _warn(name, "visits a noise level twice, which gives NaN", "ask for fewer steps, or for another spacing")


def _check_stride(name: str, config: Any, total: int, steps: int, times: list[int]) -> None:
    if name not in _FIXED_STRIDE or (name == "PNDMScheduler" and not config.skip_prk_steps):
        return
    visited = sorted(set(times), reverse=True)  # PNDM evaluates the network twice at one of them
    stride = total // steps
    for now, following in zip(visited[:-1], visited[1:], strict=True):
        if now - stride != following:
            why = (
                f"steps from {now} to {now - stride}, but evaluates the network at {following} next "
                "(huggingface/diffusers#11347)"
            )
            fix = "set timestep_spacing='leading', or use solver='ddim', which follows the list"
            _warn(name, why, fix, depth=7)
            return


def _warn(name: str, why: str, fix: str, *, depth: int = 6) -> None:
    warnings.warn(f"this {name} {why}. Fix: {fix}.", stacklevel=depth)  # of the line that calls `sample`
