"""ccella_fast: training and sampling of report-conditioned 3D latent diffusion (CCELLA, arXiv 2506.10230)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccella_fast.lazy_names import lazy_names

if TYPE_CHECKING:
    from ccella_fast.checkpoint import load_checkpoint
    from ccella_fast.config import load_config
    from ccella_fast.diffusion.clipping import DynamicThreshold
    from ccella_fast.diffusion.edm import Edm, edm_denoiser
    from ccella_fast.diffusion.flow import RectifiedFlow
    from ccella_fast.diffusion.guidance import guided
    from ccella_fast.diffusion.sample import sample
    from ccella_fast.dropin import speed_up
    from ccella_fast.models import build_model
    from ccella_fast.sampling import FastSampler

__version__ = "0.1.0"
__all__ = [
    "DynamicThreshold", "Edm", "FastSampler", "RectifiedFlow", "build_model", "edm_denoiser", "guided", "load_checkpoint",
    "load_config", "sample", "speed_up",
]  # fmt: skip

# Imported on first use: `ccella-fast --help` must answer before torch is loaded.
_HOMES = {
    "FastSampler": "sampling",
    "build_model": "models",
    "load_checkpoint": "checkpoint",
    "load_config": "config",
    "DynamicThreshold": "diffusion.clipping",
    "Edm": "diffusion.edm",
    "RectifiedFlow": "diffusion.flow",
    "edm_denoiser": "diffusion.edm",
    "guided": "diffusion.guidance",
    "sample": "diffusion.sample",
    "speed_up": "dropin",
}
__getattr__ = lazy_names(__name__, _HOMES)
