"""The parts of a model that can be kept from being trained, or trained with a learning rate of their own.

`unet` is the U-Net, `class_heads` are the class heads with the classifier of their outputs, and `adapter` is the rest of the
adapter. A model of a variant without a report is a U-Net alone. Two parts within the U-Net have names of their own where
weights are started from or adapted: `unet.attention`, and `unet.class_input`, which is the embedding of the class and its
columns in the projections of the residual blocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from ccella_fast.config import Config
from ccella_fast.errors import ConfigError
from ccella_fast.models.low_rank import add_factors

_CLASS_HEADS = re.compile(r"classifier\.|ella\.connector\.(classifier|cascade_blocks)\.")


def part_of(name: str) -> str:
    """The part that the parameter called `name` belongs to."""
    if _CLASS_HEADS.match(name):
        return "class_heads"
    return "adapter" if name.startswith("ella.") else "unet"


def subpart_of(name: str) -> str:
    """As `part_of`, with the two parts within the U-Net. `[class]` at the end of a name means columns, see `start_weights`."""
    part, own = part_of(name), name.removeprefix("unet.")
    if part == "unet" and (".attentions." in own or ".attention." in own):
        return "unet.attention"
    return "unet.class_input" if own.startswith("pirads_layer.") or own.endswith("[class]") else part


def is_within(part: str, named: Collection[str]) -> bool:
    """Whether the part, or the one that it is within, is named."""
    return part in named or part.partition(".")[0] in named


def check_parts(config: Config) -> None:
    """Raise ConfigError if `training.freeze`, `lr_scale` or `low_rank` does not fit the model or one of the others."""
    parts, freeze, scales = config.model.traits.parts, config.training.freeze, config.training.lr_scale
    _check_low_rank(config)
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
    if config.training.low_rank.rank:
        trained = {part.partition(".")[0] for part in (*_layers(config), *config.training.low_rank.whole)}
        if still := [part for part in scales if part not in trained]:
            why = f"'{still[0]}' has a learning rate of its own, but nothing of it is trained with these low-rank adapters"
            fix = f"remove it, or add '{still[0]}' to training.low_rank.whole"
            raise ConfigError(why, field="training.lr_scale", fix=fix)


def _check_low_rank(config: Config) -> None:
    low_rank, traits = config.training.low_rank, config.model.traits
    if low_rank.rank == 0:
        if low_rank.layers is not None or low_rank.whole:
            key = "whole" if low_rank.whole else "layers"
            why = f"training.low_rank.{key} is set, but training.low_rank.rank is 0: there are no low-rank adapters"
            raise ConfigError(why, field="training.low_rank.rank", fix="set it to a rank, such as 8")
        return
    if config.training.freeze:
        why = "training.low_rank trains factors and the parts in low_rank.whole; everything else is frozen already"
        raise ConfigError(why, field="training.freeze", fix="remove it, or set training.low_rank.rank to 0")
    there = [*traits.parts, "unet.attention", *(["unet.class_input"] if traits.class_input != "none" else [])]
    for key in ("layers", "whole"):
        for part in getattr(low_rank, key) or ():
            if part not in there:
                why = f"the variant {config.model.variant} has no part '{part}'; its parts are {', '.join(there)}"
                raise ConfigError(why, field=f"training.low_rank.{key}", fix=f"remove '{part}'")
    if all(is_within(part, low_rank.whole) for part in _layers(config)):
        why = "no layer is left for low-rank adapters: each is trained as a whole, or left out"
        raise ConfigError(why, field="training.low_rank.layers", fix="name a part that is not in low_rank.whole")
    for part in config.training.init_skip:
        if part in there and not is_within(part, low_rank.whole):
            why = f"'{part}' starts anew, and would keep its random weights"
            fix = f"add '{part}' to training.low_rank.whole, which trains it as a whole"
            raise ConfigError(why, field="training.low_rank.whole", fix=fix)


def select_trained(model: nn.Module, config: Config) -> None:
    """Freeze what is not trained, and add the factors of `training.low_rank`. The model must have its start weights by then."""
    low_rank = config.training.low_rank
    for name, parameter in model.named_parameters():
        is_frozen = part_of(name) in config.training.freeze if low_rank.rank == 0 else not _is_whole(name, config)
        if is_frozen:
            parameter.requires_grad_(False)
    if low_rank.rank > 0:
        layers = _layers(config)
        add_factors(
            model,
            low_rank.rank,
            low_rank.alpha,
            lambda name: is_within(subpart_of(name), layers) and not _is_whole(name, config),
        )


def _layers(config: Config) -> list[str]:
    """The parts with factors."""
    given = config.training.low_rank.layers
    return [part for part in config.model.traits.parts if part != "class_heads"] if given is None else list(given)


def _is_whole(name: str, config: Config) -> bool:
    """Whether the parameter is trained as a whole; projections of the embedding are if the columns of the class are."""
    whole = config.training.low_rank.whole
    has_class = ".time_emb_proj." in name and config.model.traits.class_input != "none"
    return is_within(subpart_of(name), whole) or (has_class and "unet.class_input" in whole)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The parameters that are trained, as groups for an optimizer of torch: one per learning rate, in the model's order."""
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.training.lr_scale.get(part_of(name), 1.0)  # type: ignore[call-overload]
            group = groups.setdefault(scale, {"params": [], "lr": config.training.lr * scale})
            group["params"].append(parameter)
    return list(groups.values())
