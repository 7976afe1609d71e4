"""Networks. `build_model` is the way in; `autoencoder` holds the autoencoder."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ccella_fast.config import Config, ModelConfig
from ccella_fast.deprecation import deprecated_names
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.models.ldm import DiffusionModel, ModelOutput, TextFreeModel, TextModel
from ccella_fast.models.unet3d import Conditioning
from ccella_fast.variants import get_variant

__all__ = ["Conditioning", "DiffusionModel", "ModelOutput", "build_model", "model_config"]
__getattr__ = deprecated_names(__name__, {"Denoiser": "DiffusionModel"})


def build_model(source: str | ModelConfig | Config, **overrides: Any) -> DiffusionModel:
    """Build a freshly initialised model: `build_model("CCELLA", input_dim=384)`.

    Random numbers come from torch's global generator; `with torch.device(...)` says where the parameters go ("meta" for names
    and shapes alone).

    Args:
        source: a variant's name (its sizes are the reference's), a `ModelConfig`, or a whole `Config`.
        overrides: fields of `ModelConfig`, which win.

    Raises:
        ConfigError: naming the field.
    """
    config = model_config(source, **overrides)
    return TextModel(config) if config.traits.text else TextFreeModel(config)


def model_config(source: str | ModelConfig | Config, **overrides: Any) -> ModelConfig:
    """source: a variant's name (its sizes are the reference's), a `ModelConfig`, or a whole `Config`. overrides: fields of
    `ModelConfig`, which win. Raises ConfigError that names the field."""
    if isinstance(source, str):
        base = {"variant": get_variant(source).name}
    elif isinstance(source, Config | ModelConfig):
        base = (source.model if isinstance(source, Config) else source).model_dump()
    else:
        why = f"a model is not built from a {type(source).__name__}"
        raise ConfigError(why, fix="give a variant's name, or what load_config returns")
    for name in overrides:
        if name not in ModelConfig.model_fields:
            fix = did_you_mean(name, ModelConfig.model_fields)
            raise ConfigError(f"there is no model setting '{name}'", field=f"model.{name}", fix=fix)
    try:
        return ModelConfig.model_validate({**base, **overrides})
    except ValidationError as bad:
        first = bad.errors()[0]
        field = ".".join(["model", *map(str, first["loc"])])
        raise ConfigError(first["msg"].removeprefix("Value error, "), field=field, fix="change this value") from None
