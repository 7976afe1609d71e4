"""`ccella-fast train-vae`: train the autoencoder from scratch on prepared images.

An interrupted run is resumed from its last saved state, which the finished autoencoder replaces.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ccella_fast.config import Config
from ccella_fast.data.augmentation.engine_choice import check_engine
from ccella_fast.errors import ConfigError, DataError, NonFiniteError
from ccella_fast.folder_kinds import check_output
from ccella_fast.folder_lock import lock_folder
from ccella_fast.models.autoencoder import save_autoencoder
from ccella_fast.run_record import write_run_record
from ccella_fast.storage import write_json
from ccella_fast.training.autoencoder.checkpointing import identity, is_finished, remove_state
from ccella_fast.training.autoencoder.evaluation import NUM_EXAMPLES, evaluate
from ccella_fast.training.autoencoder.loop import train_loop
from ccella_fast.training.autoencoder.patches import Image, read_images

logger = logging.getLogger("ccella_fast")


def train_vae(data: str | Path, out: str | Path, config: Config) -> None:
    """Train `config.autoencoder` on the train split of the prepared folder `data`, and write it to the folder `out`.

    `out` then also contains metrics.jsonl, run_record.json (with L1 and PSNR of the test split) and a few reconstructions. If
    it already contains a run with equal settings and images, a finished one is kept, an unfinished one is resumed.

    Raises:
        ConfigError: the patch or the number of channels does not fit, `out` holds results of another kind, or another command
            writes to it.
        DataError: the train split is empty, or an image is missing or damaged.
        CheckpointError: `out` contains another autoencoder, or a damaged one.
        NonFiniteError: training diverged.
    """
    check_output(out, "an autoencoder", field="--out")
    with lock_folder(out, "ccella-fast train-vae"):
        _train_vae(data, Path(out), config)


def _train_vae(data: str | Path, out: Path, config: Config) -> None:
    check_engine(config.data.engine)
    train, test = read_images(data)
    _check_patch(config, train, data)
    expected = identity(config, train)
    if is_finished(out, expected):
        logger.info("the autoencoder in %s is complete, nothing to do", out)
        return
    write_json(out / "training.json", {"identity": expected})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with write_run_record(out, "train-vae", device=str(device), images=len(train)) as facts:
        vae, facts["steps_per_second"] = train_loop(train, out, config, device)
        if not all(bool(parameter.isfinite().all()) for parameter in vae.parameters()):
            fix = f"delete the folder and lower vae_training.lr ({config.vae_training.lr:g})"
            raise NonFiniteError("after the last step, weights are not finite", path=out, fix=fix)
        # Without a test split, training images are reconstructed for the report, but their error is not recorded.
        measured = evaluate(vae, test or train[:NUM_EXAMPLES], out / "reconstructions", device)
        facts["test"] = measured if test else None
        save_autoencoder(vae, out)
        remove_state(out)


def _check_patch(config: Config, train: list[Image], data: str | Path) -> None:
    """Raise unless there are training images, and the patch fits them and the network."""
    if not train:
        raise DataError("the train split is empty", path=data, fix="prepare more studies")
    if (config.autoencoder.in_channels, config.autoencoder.out_channels) != (1, 1):
        channels = config.autoencoder.in_channels, config.autoencoder.out_channels
        why = f"in_channels and out_channels must be 1, because each sequence is encoded separately, got {channels}"
        raise ConfigError(why, field="autoencoder.in_channels", fix="set both to 1")
    patch, grid, factor = config.vae_training.patch, train[0].values.shape, config.autoencoder.factor
    if any(width % factor or width > size for width, size in zip(patch, grid, strict=True)):
        fix = f"use {[min(width, size) // factor * factor or factor for width, size in zip(patch, grid, strict=True)]}"
        why = f"the patch {patch} must be a multiple of {factor} and not larger than the grid {list(grid)}"
        raise ConfigError(why, field="vae_training.patch", fix=fix)
