"""`ccella-fast train-vae`: train the autoencoder from scratch on the prepared images.

A stopped run continues from its last saved state. The finished autoencoder replaces that state.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ccella_fast.config import Config
from ccella_fast.data.augmentation.engine import check_engine
from ccella_fast.environment import write_run_record
from ccella_fast.errors import ConfigError, DataError, NonFiniteError
from ccella_fast.models.autoencoder import save_autoencoder
from ccella_fast.storage import write_json
from ccella_fast.training.autoencoder.checkpointing import identity, is_finished, remove_state
from ccella_fast.training.autoencoder.evaluation import NUM_EXAMPLES, evaluate
from ccella_fast.training.autoencoder.loop import train_loop
from ccella_fast.training.autoencoder.patches import Image, read_images

logger = logging.getLogger("ccella_fast")


def train_vae(data: str | Path, out: str | Path, config: Config) -> None:
    """Train `config.autoencoder` on the train split of the prepared folder `data`; write it to the folder `out`.

    `out` then also holds metrics.jsonl, run_record.json (with L1 and PSNR of the test split) and a few reconstructions. A
    finished run with equal settings and images is kept as it is, an unfinished one is resumed. Raises DataError, ConfigError,
    NonFiniteError (the loss diverged) and CheckpointError (`out` holds another autoencoder)."""
    out = Path(out)
    check_engine(config.data.engine)
    train, test = read_images(data)
    _check(config, train, data)
    wanted = identity(config, train)
    if is_finished(out, wanted):
        logger.info("the autoencoder in %s is complete, nothing to do", out)
        return
    write_json(out / "training.json", {"identity": wanted})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with write_run_record(out, "train-vae", device=str(device), images=len(train)) as facts:
        vae, facts["steps_per_second"] = train_loop(train, out, config, device)
        if not all(bool(parameter.isfinite().all()) for parameter in vae.parameters()):
            fix = f"delete the folder and lower vae_training.lr ({config.vae_training.lr:g})"
            raise NonFiniteError("the last step made weights that are not finite", path=out, fix=fix)
        # Without a test split, training images are reconstructed for the report, but no quality is recorded.
        measured = evaluate(vae, test or train[:NUM_EXAMPLES], out / "reconstructions", device)
        facts["test"] = measured if test else None
        save_autoencoder(vae, out)
        remove_state(out)


def _check(config: Config, train: list[Image], data: str | Path) -> None:
    """Raise unless there are training images and the patch fits both them and the network."""
    if not train:
        raise DataError("the train split is empty", path=data, fix="prepare more studies")
    if (config.autoencoder.in_channels, config.autoencoder.out_channels) != (1, 1):
        fix = "set in_channels and out_channels to 1: each sequence is encoded alone"
        raise ConfigError("train-vae makes one-channel autoencoders", field="autoencoder.in_channels", fix=fix)
    patch, grid, factor = config.vae_training.patch, train[0].values.shape, config.autoencoder.factor
    if any(width % factor or width > size for width, size in zip(patch, grid, strict=True)):
        fix = f"use {[min(width, size) // factor * factor or factor for width, size in zip(patch, grid, strict=True)]}"
        why = f"the patch {patch} must be a multiple of {factor} and not larger than the grid {list(grid)}"
        raise ConfigError(why, field="vae_training.patch", fix=fix)
