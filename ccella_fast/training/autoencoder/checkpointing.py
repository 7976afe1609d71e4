"""The folder of an autoencoder's training: which autoencoder it contains, and the state to resume from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ccella_fast.config import Config
from ccella_fast.errors import CheckpointError
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder
from ccella_fast.models.weights import read_pt
from ccella_fast.storage import atomic_path, read_json
from ccella_fast.training.autoencoder.adversary import Adversary
from ccella_fast.training.autoencoder.patches import Image

_STATE = "state.pt"


def identity(config: Config, images: list[Image]) -> str:
    """The SHA-256 of everything that the weights depend on: network, settings and training images."""
    settings = config.vae_training
    excluded = settings.later_settings_at_default()
    excluded |= {"checkpointing_seconds", "perceptual_network"} | (
        set() if settings.augmentation.active else {"augmentation"}
    )
    parts = [config.autoencoder.model_dump(), settings.model_dump(exclude=excluded), [image.sha256 for image in images]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_finished(out: Path, expected: str) -> bool:
    """Whether `out` contains the finished autoencoder of identity `expected`.

    Raises CheckpointError if it contains another autoencoder, finished or not, or a damaged one.
    """
    begun, complete = (out / "training.json").is_file(), (out / "manifest.json").is_file()
    same = begun and read_json(out / "training.json", error=CheckpointError).get("identity") == expected
    if not same and (complete or (out / _STATE).is_file()):
        why = "this folder contains an autoencoder that was trained with other settings or other images"
        raise CheckpointError(why, path=out, fix="choose another --out, or delete the folder to train again")
    if same and complete:
        load_autoencoder(out)  # raises if it is damaged
    return same and complete


def save_state(
    out: Path, vae: Autoencoder, optimizer: torch.optim.Optimizer, step: int, adversary: Adversary | None = None
) -> None:
    """Save weights and optimizer after `step` steps, those of the discriminator too, replacing the previous state."""
    state = {"step": step, "model": vae.state_dict(), "optimizer": optimizer.state_dict()}
    if adversary is not None:
        state["discriminator"] = adversary.state_dict()
    with atomic_path(out / _STATE) as temporary:
        torch.save(state, temporary)


def load_state(
    out: Path, vae: Autoencoder, optimizer: torch.optim.Optimizer, adversary: Adversary | None = None
) -> int:
    """Load the saved state, if any, and return the number of finished steps. Raises CheckpointError if it is damaged."""
    if not (out / _STATE).is_file():
        return 0
    state = read_pt(out / _STATE)
    vae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if adversary is not None:
        adversary.load_state_dict(state["discriminator"])
    return state["step"]


def remove_state(out: Path) -> None:
    """Delete the saved state, which is not needed once training has finished."""
    (out / _STATE).unlink(missing_ok=True)
