"""What follows from a request and a configuration alone: checked before weights and text encoder are loaded."""

from __future__ import annotations

from typing import NamedTuple

from ccella_fast.config import Config
from ccella_fast.sampling.denoising import LoopSettings
from ccella_fast.sampling.request import Request, VolumeInputs, check_inputs


class RequestPlan(NamedTuple):
    """A valid request with the defaults of the configuration."""

    loop_settings: LoopSettings
    latent_shape: list[int]
    batch_size: int
    volumes: VolumeInputs


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
