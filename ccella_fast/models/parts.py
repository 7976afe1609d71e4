"""The parts of a model that can be kept from being trained, or trained with a learning rate of their own.

`unet` is the U-Net, `class_heads` are the class heads with the classifier of their outputs, and `adapter` is the rest of the
adapter. A model of a variant without a report is a U-Net alone.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ccella_fast.config import Config
from ccella_fast.errors import ConfigError

_CLASS_HEADS = re.compile(r"classifier\.|ella\.connector\.(classifier|cascade_blocks)\.")


def part_of(name: str) -> str:
    """The part that the parameter called `name` belongs to."""
    if _CLASS_HEADS.match(name):
        return "class_heads"
    return "adapter" if name.startswith("ella.") else "unet"


def check_parts(config: Config) -> None:
    """Raise ConfigError if `training.freeze` or `training.lr_scale` does not fit the model or the other."""
    parts, freeze, scales = config.model.traits.parts, config.training.freeze, config.training.lr_scale
    for key, named in (("freeze", list(freeze)), ("lr_scale", list(scales))):
        field = f"training.{key}"
        for part in named:
            if part not in parts:
                why = f"the variant {config.model.variant} has no part '{part}'; its parts are {', '.join(parts)}"
                raise ConfigError(why, field=field, fix=f"remove '{part}'")
    if set(freeze) == set(parts):
        why = f"nothing is left to be trained: the parts of {config.model.variant} are {', '.join(parts)}"
        raise ConfigError(why, field="training.freeze", fix="remove one of them")
    if both := [part for part in freeze if part in scales]:
        why = f"'{both[0]}' has a learning rate of its own, but training.freeze keeps it from being trained"
        raise ConfigError(why, field="training.lr_scale", fix="remove it there or here")


def freeze_parts(model: nn.Module, config: Config) -> None:
    """Keep the parameters of the parts in `training.freeze` from being trained."""
    for name, parameter in model.named_parameters():
        if part_of(name) in config.training.freeze:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The parameters that are trained, as groups for an optimizer of torch: one per learning rate, in the model's order."""
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.training.lr_scale.get(part_of(name), 1.0)  # type: ignore[call-overload]
            group = groups.setdefault(scale, {"params": [], "lr": config.training.lr * scale})
            group["params"].append(parameter)
    return list(groups.values())
