"""Where a sampler comes from: our checkpoints, reference files, folders in Hugging Face's manner; and writing such a folder.

There is one folder format, the checkpoint's: config.json, model.safetensors, training_state.json, vae/, manifest.json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ccella_fast.checkpoint import Checkpoint, load_checkpoint, write_manifest
from ccella_fast.config import Config, make_config
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import DiffusionModel
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder, save_autoencoder, weights_file
from ccella_fast.sampling.output import volume_digest
from ccella_fast.storage import atomic_folder, read_json, sha256, write_json

if TYPE_CHECKING:
    from ccella_fast.sampling.sampler import FastSampler


class Provenance(NamedTuple):
    """facts: what a sidecar says of the weights. path, weights: what an error names."""

    facts: dict[str, Any]
    path: Path | None
    weights: str

    @classmethod
    def of_objects(cls, config: Config) -> Provenance:
        """Of a model that was handed over in memory: there is no file to hash."""
        facts = {"synthetic": True, "variant": config.model.variant, "config_sha256": volume_digest(config.dump())}
        return cls(facts, None, "given")

    @classmethod
    def of_checkpoint(cls, loaded: Checkpoint, vae: Path | None) -> Provenance:
        name = {"ema": "ema.safetensors", "raw": "model.safetensors"}[loaded.weights]
        if loaded.path.is_file():
            weights_hash = sha256(loaded.path)
        else:  # loading has compared the file with its manifest
            weights_hash = read_json(loaded.path / "manifest.json")["files"][name]["sha256"]
        facts = {
            "synthetic": True,
            "variant": loaded.variant,
            "step": loaded.step,
            "weights": loaded.weights,
            "weights_sha256": weights_hash,
            "vae_sha256": None if vae is None else sha256(weights_file(vae)),
            "config_sha256": volume_digest(loaded.config.dump()),
        }
        return cls(facts, loaded.path, loaded.weights)


class LoadedSampler(NamedTuple):
    checkpoint: Checkpoint
    autoencoder: Autoencoder | None
    origin: Provenance


def load_pretrained(path: str | Path | Checkpoint, *, vae: str | Path | None, weights: str | None) -> LoadedSampler:
    """A checkpoint, with the autoencoder `vae` or its own, on the CPU. Raises CheckpointError."""
    checkpoint = path if isinstance(path, Checkpoint) else load_checkpoint(path, weights=weights)
    where = checkpoint.autoencoder if vae is None else Path(vae)
    autoencoder = None if where is None else load_autoencoder(where, checkpoint.config.autoencoder)
    return LoadedSampler(checkpoint, autoencoder, Provenance.of_checkpoint(checkpoint, where))


def save_pretrained_files(sampler: FastSampler, folder: Path) -> None:
    """What `load` reads. Atomic."""
    from safetensors.torch import save_file

    if folder.exists():
        raise ConfigError("this folder exists", path=folder, field="folder", fix="choose another name")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sampler.model.state_dict().items()}
    state = {
        "step": sampler.origin.facts.get("step", 0),
        "scale_factor": sampler.scale_factor,
        "intensity_scale": sampler.intensity_scale,
    }
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", sampler.config.dump())
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        write_json(partial / "training_state.json", state)
        if sampler.autoencoder is not None:
            save_autoencoder(sampler.autoencoder, partial / "vae")
        write_manifest(partial, step=state["step"])


def local_folder(path: str | Path) -> Path:
    """`path` itself, or the downloaded files of a repository on the hub. Raises CheckpointError when there is neither."""
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as bad:  # the hub's client raises many kinds; each means that nothing usable came
        why = f"no such folder, and not to be had from the hub: {' '.join(str(bad).split()):.120}"
        raise CheckpointError(why, path=path, fix="check the name, or download the folder once") from None


def config_of(model: DiffusionModel, autoencoder: Autoencoder | None) -> Config:
    """The reference's configuration around a model that came without one."""
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
    """One factor a sequence; a single number serves all."""
    factors = [float(factor) for factor in given] if isinstance(given, Sequence) else [float(given)]
    factors = factors * len(sequences) if len(factors) == 1 else factors
    if len(factors) != len(sequences) or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        fix = f"give a positive number, or one for each of {', '.join(sequences)}"
        raise ConfigError(f"{given} is no scale factor", field="scale_factor", fix=fix)
    return factors
