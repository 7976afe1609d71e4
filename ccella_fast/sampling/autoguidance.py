"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): guidance by a weaker version of the model in place of the null report.

The prediction is weak + scale (model - weak), both with the same report and class. The weak model is an earlier checkpoint,
another average of the weights, or a smaller network, of a training with the same data and objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ccella_fast.checkpoint import Checkpoint
from ccella_fast.config import Config
from ccella_fast.errors import ConfigError
from ccella_fast.sampling.guidance import Guidance
from ccella_fast.sampling.pretrained import Provenance

OPTION = "--autoguidance"
_PROVENANCE = ("step", "weights", "weights_sha256")


def check_weak_config(config: Config, weak: Config, path: str | Path) -> None:
    """Check that a model of `weak` predicts the same of the same inputs as one of `config`.

    Args:
        config: of the model that is guided.
        weak: of the weak model.
        path: the weak model.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for (key, ours), (_, theirs) in zip(_needed(config), _needed(weak), strict=True):
        if ours != theirs:
            why = f"the weak model has {key} {theirs!r:.60}, but the model that it guides has {ours!r:.60}"
            fix = "give an earlier or a smaller model of the same training"
            raise ConfigError(why, path=path, field=OPTION, fix=fix)


def check_weak_model(config: Config, scale_factor: Sequence[float], weak: Checkpoint) -> None:
    """As `check_weak_config`, for a loaded model; its latents must have the same scale too."""
    check_weak_config(config, weak.config, weak.path)
    if any(not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(scale_factor, weak.scale_factor, strict=True)):
        why = f"the weak model has latents scaled by {weak.scale_factor}, but the model that it guides by {list(scale_factor)}"
        raise ConfigError(why, path=weak.path, field=OPTION, fix="give a model of the same prepared folder")


def check_weak_weights(weights: Mapping[str, Any], weak: Mapping[str, Any], path: str | Path) -> None:
    """Raise ConfigError if both models have the same weights, so that guidance would have no effect.

    Args:
        weights: sidecar entries about the weights of the model that is guided; empty if they are not known.
        weak: of the weak model.
        path: the weak model.
    """
    if weak.get("weights_sha256") is not None and weak["weights_sha256"] == weights.get("weights_sha256"):
        why = "the weak model has the same weights as the model that it guides, so that it has no effect"
        fix = "give an earlier or a smaller model of the same training, or remove the option"
        raise ConfigError(why, path=path, field=OPTION, fix=fix)


def check_scale(guidance: Guidance) -> None:
    """Raise ConfigError if the weak model would have no effect."""
    if not guidance.on:
        why = "a weak model is given for autoguidance, but with guidance_scale 1 it has no effect"
        raise ConfigError(why, field="guidance_scale", fix="give a scale above 1, such as 2")


def weak_metadata(weak: Checkpoint) -> dict[str, Any]:
    """The sidecar entry about the weak model."""
    origin = Provenance.of_checkpoint(weak, None)
    return {"autoguidance": {name: origin.metadata[name] for name in _PROVENANCE}}


def _needed(config: Config) -> Iterator[tuple[str, Any]]:
    """The settings that must be equal. Depth and width of the networks may differ, but not how often they halve the grid."""
    model, text = config.model, config.text
    yield "model.variant", model.variant
    yield "data.sequences", config.data.sequences
    yield "model.latent_channels", model.latent_channels
    yield "levels of the U-Net", len(model.num_channels)
    if model.traits.text:
        yield "model.input_dim", model.input_dim
        yield "text.encoder", text.encoder
        yield "text.max_length", text.max_length
    for key, value in config.scheduler.model_dump(mode="json").items():
        yield f"scheduler.{key}", value
