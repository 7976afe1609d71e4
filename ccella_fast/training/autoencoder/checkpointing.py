"""What a training of the autoencoder keeps in its folder: which autoencoder it makes, and the state to resume from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ccella_fast.config import Config, VaeTrainingConfig
from ccella_fast.errors import CheckpointError
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder
from ccella_fast.models.weights import read_pt
from ccella_fast.storage import atomic_path, read_json
from ccella_fast.training.autoencoder.patches import Image

_STATE = "state.pt"
# Settings that the first version did not have. They are part of the identity only where they differ from their defaults, with
# which that version trained: its folders stay valid.
_LATER_SETTINGS = [
    "weight_decay", "adam_betas", "max_grad_norm", "warmup_fraction", "max_warmup_steps", "final_lr_fraction",
]  # fmt: skip


def identity(config: Config, images: list[Image]) -> str:
    """The SHA-256 of everything that the weights depend on: network, settings and training images."""
    settings, fields = config.vae_training, VaeTrainingConfig.model_fields
    excluded = {name for name in _LATER_SETTINGS if getattr(settings, name) == fields[name].default}
    excluded |= {"checkpointing_seconds"} | (set() if settings.augmentation.active else {"augmentation"})
    parts = [config.autoencoder.model_dump(), settings.model_dump(exclude=excluded), [image.sha256 for image in images]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_finished(out: Path, expected: str) -> bool:
    """Whether `out` holds the finished autoencoder of identity `expected`.

    Raises CheckpointError when it holds another one, finished or not, or a damaged one."""
    begun, complete = (out / "training.json").is_file(), (out / "manifest.json").is_file()
    same = begun and read_json(out / "training.json", error=CheckpointError).get("identity") == expected
    if not same and (complete or (out / _STATE).is_file()):
        why = "this folder holds an autoencoder of other settings or other images"
        raise CheckpointError(why, path=out, fix="choose another --out, or delete the folder to train anew")
    if same and complete:
        load_autoencoder(out)  # a damaged one is an error here, not in the next command
    return same and complete


def save_state(out: Path, vae: Autoencoder, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights and optimizer after `step` steps, in place of the state before."""
    with atomic_path(out / _STATE) as temporary:
        torch.save({"step": step, "model": vae.state_dict(), "optimizer": optimizer.state_dict()}, temporary)


def load_state(out: Path, vae: Autoencoder, optimizer: torch.optim.Optimizer) -> int:
    """Load the saved state, if there is one. Returns the number of finished steps. Raises CheckpointError if it is damaged."""
    if not (out / _STATE).is_file():
        return 0
    state = read_pt(out / _STATE)
    vae.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def remove_state(out: Path) -> None:
    """Delete the saved state, which a finished autoencoder does not need."""
    (out / _STATE).unlink(missing_ok=True)
