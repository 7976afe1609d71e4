"""A diffusion model from a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ccella_fast.config import Config, ModelConfig
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.models.ldm import DiffusionModel, TextFreeModel, TextModel
from ccella_fast.variants import get_variant


def build_model(source: str | ModelConfig | Config, **overrides: Any) -> DiffusionModel:
    """Build a newly initialized model, for example `build_model("CCELLA", input_dim=384)`.

    Parameters are drawn from the global random generator of torch and created on the current default device: use
    `with torch.device("meta")` to get names and shapes without memory.

    Args:
        source: the name of a variant (with the sizes of the reference implementation), a `ModelConfig` or a `Config`.
        overrides: fields of `ModelConfig` that replace those of `source`.

    Returns:
        The model, in training mode.

    Raises:
        ConfigError: an unknown variant, an unknown field or an invalid value; the field is named.
    """
    config = model_config(source, **overrides)
    return TextModel(config) if config.traits.text else TextFreeModel(config)


def model_config(source: str | ModelConfig | Config, **overrides: Any) -> ModelConfig:
    """Return the `ModelConfig` from which `build_model` builds a model.

    Args:
        source: the name of a variant (with the sizes of the reference implementation), a `ModelConfig` or a `Config`.
        overrides: fields of `ModelConfig` that replace those of `source`.

    Raises:
        ConfigError: an unknown variant, an unknown field or an invalid value; the field is named.
    """
    if isinstance(source, str):
        base = {"variant": get_variant(source).name}
    elif isinstance(source, Config | ModelConfig):
        base = (source.model if isinstance(source, Config) else source).model_dump()
    else:
        why = f"a model cannot be built from a {type(source).__name__}"
        raise ConfigError(why, fix="pass the name of a variant, a ModelConfig, or the result of load_config")
    for name in overrides:
        if name not in ModelConfig.model_fields:
            fix = did_you_mean(name, ModelConfig.model_fields)
            raise ConfigError(f"there is no model setting '{name}'", field=f"model.{name}", fix=fix)
    try:
        return ModelConfig.model_validate({**base, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["model", *map(str, first["loc"])])
        raise ConfigError(first["msg"].removeprefix("Value error, "), field=field, fix="change this value") from None
