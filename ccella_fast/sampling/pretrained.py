"""Loads samplers from checkpoints, reference files and Hugging Face repositories, and saves them to folders.

All folders have the format of a checkpoint: config.json, model.safetensors, training_state.json, vae/, manifest.json.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ccella_fast.checkpoint import Checkpoint, load_checkpoint, step_folders, write_manifest
from ccella_fast.config import REMOVED_SETTINGS, Config, load_config, make_config
from ccella_fast.config_scheduler import KEYS_OF_ONE_SCHEDULE
from ccella_fast.errors import CcellaError, CheckpointError, ConfigError
from ccella_fast.models import DiffusionModel
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder, save_autoencoder, weights_file
from ccella_fast.optional import require
from ccella_fast.sampling.output import volume_digest
from ccella_fast.storage import atomic_folder, read_json, sha256, write_json

# Settings that the first version did not have; it sampled as with what are now their defaults.
_LATER_SETTINGS = {
    "scheduler": ("prediction", *KEYS_OF_ONE_SCHEDULE["rectified_flow"]),
    "training": (
        "min_snr_gamma",
        "report_dropout",
        "class_dropout",
        "init_skip",
        "init_modality",
        "freeze",
        "lr_scale",
        "low_rank",
        "power_ema_snapshot_steps",
        "power_ema_widths",
        "power_ema_every",
    ),
    "model": ("resblock_updown", "include_fc"),
}
WEIGHT_FILES = {"ema": "ema.safetensors", "raw": "model.safetensors"}


def config_digest(config: Config) -> str:
    """The SHA-256 of a configuration, which is part of the identity of its samples.

    Samples of the first version stay valid: settings that it did not have are left out while they have their defaults, and
    settings of it that are gone are hashed with the defaults that they had.
    """
    values, later = config.dump(), config.vae_training.later_settings_at_default()
    values["vae_training"] = {name: value for name, value in values["vae_training"].items() if name not in later}
    # Added later too; the weights' hash is in the identity.
    del values["training"]["collective_timeout"], values["monitoring"]
    defaults = Config().dump()
    for section, names in _LATER_SETTINGS.items():
        for name in names:
            if values[section][name] == defaults[section][name]:
                del values[section][name]
    values["sampling"]["prediction"] = "epsilon"  # its default then; now `scheduler.prediction` decides
    for dotted in REMOVED_SETTINGS:
        section, key = dotted.split(".")
        values[section][key] = 0 if key == "random_seed" else None
    return volume_digest(values)


class Provenance(NamedTuple):
    """The origin of a sampler's weights.

    Attributes:
        metadata: the sidecar entries about the weights.
        path: of the checkpoint, for errors; None for a model in memory.
        weights: "ema", "raw" or "given", for errors.
        trained_on: what the training has seen (see `trained_on`); None if it is not known.
        averaged: whether the weights are averages; None if it is not known.
        start_weights: those that the training started from, as in `Checkpoint`.
    """

    metadata: dict[str, Any]
    path: Path | None
    weights: str
    trained_on: dict[str, Any] | None = None
    averaged: bool | None = None
    start_weights: dict[str, Any] | None = None

    @classmethod
    def of_objects(cls, config: Config) -> Provenance:
        """The provenance of a model in memory, which has no file to hash."""
        metadata = {"synthetic": True, "variant": config.model.variant, "config_sha256": config_digest(config)}
        return cls(metadata, None, "given")

    @classmethod
    def of_checkpoint(cls, loaded: Checkpoint, vae: Path | None) -> Provenance:
        """The provenance of a checkpoint with the autoencoder of `vae`, a folder or weight file."""
        name = WEIGHT_FILES[loaded.weights]
        if loaded.path.is_file():
            weights_hash = sha256(loaded.path)
        else:  # load_checkpoint has verified the file against its manifest
            weights_hash = read_json(loaded.path / "manifest.json", error=CheckpointError)["files"][name]["sha256"]
        metadata = {
            "synthetic": True,
            "variant": loaded.variant,
            "step": loaded.step,
            "weights": loaded.weights,
            "weights_sha256": weights_hash,
            "vae_sha256": None if vae is None else sha256(weights_file(vae)),
            "config_sha256": config_digest(loaded.config),
        }
        known = (loaded.trained_on, loaded.averaged, loaded.start_weights)
        return cls(metadata, loaded.path, loaded.weights, *known)


class SamplerParts(NamedTuple):
    """What `save_pretrained` writes of a sampler. state: the content of training_state.json."""

    config: Config
    model: DiffusionModel
    autoencoder: Autoencoder | None
    state: dict[str, Any]
    origin: Provenance


class LoadedSampler(NamedTuple):
    """The parts of a sampler, on the CPU; `autoencoder` is None if there is none."""

    checkpoint: Checkpoint
    autoencoder: Autoencoder | None
    origin: Provenance


def peek_config(path: str | Path) -> Config | None:
    """The configuration of a checkpoint folder, without reading its weights and verifying its hashes.

    None if it cannot be read: `load_checkpoint` then says why. A reference .pt has no configuration apart from its weights.
    """
    folder = Path(path)
    try:
        steps = [] if (folder / "manifest.json").is_file() else step_folders(folder)
        return load_config((steps[0] if steps else folder) / "config.json")
    except (CcellaError, OSError):
        return None


def peek_weights(path: str | Path) -> dict[str, Any]:
    """The sidecar entries about the weights that a checkpoint folder lists, without reading them; empty if it does not say."""
    folder = Path(path)
    try:
        steps = [] if (folder / "manifest.json").is_file() else step_folders(folder)
        listed = read_json((steps[0] if steps else folder) / "manifest.json")["files"]
        weights = "ema" if WEIGHT_FILES["ema"] in listed else "raw"
        return {"weights": weights, "weights_sha256": listed[WEIGHT_FILES[weights]]["sha256"]}
    except (CcellaError, OSError, KeyError, TypeError):  # `load_checkpoint` says why
        return {}


def load_pretrained(path: str | Path | Checkpoint, *, vae: str | Path | None, weights: str | None) -> LoadedSampler:
    """Load a checkpoint with the autoencoder `vae`, or with its own if `vae` is None.

    A reference .pt says nothing about its autoencoder: the sizes are those of `vae`.

    Raises:
        CheckpointError: a file is missing, damaged or not a checkpoint.
    """
    checkpoint = path if isinstance(path, Checkpoint) else load_checkpoint(path, weights=weights)
    vae_path = checkpoint.autoencoder if vae is None else Path(vae)
    is_reference = checkpoint.path.is_file()
    expected = None if is_reference else checkpoint.config.autoencoder
    autoencoder = None if vae_path is None else load_autoencoder(vae_path, expected)
    if autoencoder is not None and is_reference:
        config = {**checkpoint.config.dump(), "autoencoder": autoencoder.config.model_dump(mode="json")}
        checkpoint = dataclasses.replace(checkpoint, config=make_config(config))
    return LoadedSampler(checkpoint, autoencoder, Provenance.of_checkpoint(checkpoint, vae_path))


def save_pretrained_files(
    folder: Path, parts: SamplerParts, documents: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write the folder that `load_pretrained` reads, atomically.

    Args:
        folder: the folder, which must not exist.
        parts: what is written.
        documents: name -> text of files for people. The manifest does not list them: they may be edited.

    Raises:
        ConfigError: the folder exists.
    """
    from safetensors.torch import save_file

    if folder.exists():
        raise ConfigError("this folder already exists", path=folder, field="folder", fix="choose another name")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in parts.model.state_dict().items()}
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", parts.config.dump())
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        write_json(partial / "training_state.json", parts.state)
        if parts.autoencoder is not None:
            save_autoencoder(parts.autoencoder, partial / "vae")
        write_manifest(partial, step=parts.state["step"])
        for name, text in documents.items():
            (partial / name).write_text(text, encoding="utf-8")


def shared_config(config: Config, text_encoder: str | None) -> Config:
    """The configuration for others: without the paths of this machine, the name of the run and the tag of the studies.

    text_encoder: replaces the encoder of the configuration.
    """
    values = config.dump()
    del values["paths"], values["name"], values["data"]["dataset"]
    if text_encoder is not None:
        values["text"]["encoder"] = text_encoder
    return make_config(values)


def is_shared_encoder(encoder: str) -> bool:
    """Whether others have a text encoder too: one of the hub or of a package, not a folder of this machine."""
    name = encoder.removeprefix("package:")
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None
        and name[0] != "."
        and not Path(encoder).is_dir()
    )


def local_folder(path: str | Path) -> Path:
    """`path` itself, or the folder with the downloaded files of a repository on the Hugging Face hub.

    Raises:
        CheckpointError: `path` is neither.
    """
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return Path(path)
    require("huggingface_hub", "a download from the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as bad:  # the hub's client raises many types of errors; each means that the download failed
        why = f"there is no such folder, and the download from the hub failed: {' '.join(str(bad).split()):.120}"
        raise CheckpointError(why, path=path, fix="check the name, or download the folder once") from None


def config_of(model: DiffusionModel, autoencoder: Autoencoder | None) -> Config:
    """The default configuration with the sizes of a model that has no configuration of its own."""
    latents = model.config.latent_channels
    overrides: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"),
        "autoencoder.latent_channels": latents[0],
        "data.sequences": ["t2w", "hbv", "adc"][: len(latents)],
    }
    if autoencoder is not None:
        overrides["autoencoder"] = autoencoder.config.model_dump(mode="json")
    return make_config(overrides)


def scale_factors(given: float | Sequence[float], sequences: Sequence[str]) -> list[float]:
    """The scale factor of each sequence; a single number is used for all.

    Raises:
        ConfigError: a factor is not a positive finite number, or their number is not that of the sequences.
    """
    factors = [float(factor) for factor in given] if isinstance(given, Sequence) else [float(given)]
    factors = factors * len(sequences) if len(factors) == 1 else factors
    if len(factors) != len(sequences) or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        why = f"scale_factor must be a positive number, or one per sequence, got {given}"
        fix = f"give a positive number, or one for each of {', '.join(sequences)}"
        raise ConfigError(why, field="scale_factor", fix=fix)
    return factors
