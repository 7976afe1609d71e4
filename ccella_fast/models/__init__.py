"""The networks. `build_model` builds a diffusion model; `ccella_fast.models.autoencoder` contains the autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccella_fast.deprecation import deprecated_names
from ccella_fast.lazy_names import lazy_names

if TYPE_CHECKING:
    from ccella_fast.models.build import build_model, model_config
    from ccella_fast.models.ldm import DiffusionModel, ModelOutput
    from ccella_fast.models.unet3d import Conditioning

__all__ = ["Conditioning", "DiffusionModel", "ModelOutput", "build_model", "model_config"]

_HOMES = {
    "build_model": "build",
    "model_config": "build",
    "DiffusionModel": "ldm",
    "ModelOutput": "ldm",
    "Conditioning": "unet3d",
}
__getattr__ = deprecated_names(__name__, {"Denoiser": "DiffusionModel"}, otherwise=lazy_names(__name__, _HOMES))
