"""What follows from a request and a configuration alone: checked before weights and text encoder are loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from ccella_fast.config import Config
from ccella_fast.sampling.denoising import LoopSettings
from ccella_fast.sampling.request import Request, VolumeInputs, check_inputs


class RequestPlan(NamedTuple):
    """A valid request with the defaults of the configuration."""

    loop_settings: LoopSettings
    latent_shape: list[int]
    batch_size: int
    volumes: VolumeInputs

    def request_metadata(self, request: Request) -> dict[str, Any]:
        """The sidecar entries that follow from the request and the configuration and that all volumes share."""
        settings = self.loop_settings
        solver, guidance = settings.solver, settings.guidance
        return {
            "solver": solver if isinstance(solver, str) else repr(getattr(solver, "config", solver)),
            "num_inference_steps": settings.num_inference_steps,
            "prediction": settings.prediction,
            "timestep_spacing": settings.timestep_spacing,
            "guidance_scale": guidance.scale,
            "guidance_interval": list(guidance.interval),
            "reuse": request.reuse and [request.reuse.interval, request.reuse.depth],
            "latent_shape": self.latent_shape,
            "batch_invariant": request.batch_invariant,
        }


def plan_request(request: Request, config: Config) -> RequestPlan:
    """Check a request and compute its plan.

    Raises:
        ConfigError: a value is invalid, or the model does not support the request.
    """
    has_text = not (request.reports is None and request.text is None)
    check_inputs(config.model.traits, has_text=has_text, pirads=request.pirads, class_override=request.class_override)
    return RequestPlan(
        LoopSettings.resolve(request, config),
        request.resolve_latent_shape(config),
        request.resolve_batch_size(config),
        request.resolve_volumes(config),
    )
