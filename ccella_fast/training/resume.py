"""Where a run starts: the checkpoint that it continues from, and what must not have changed since."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from ccella_fast.checkpoint import newest_checkpoint, verify_checkpoint
from ccella_fast.config import Config, load_config
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.folder_kinds import check_folder, check_output, wrong_folder
from ccella_fast.storage import read_json

logger = logging.getLogger("ccella_fast")
LATEST = "latest"
_RESTORE = "restore the value, or start a new run in another --output_dir"
# The layout of a run: it decides how the work is shared, and may change as long as the global batch stays the same.
_LAYOUT = (
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "world_size",
    "training.zero_stage",
    "training.precision",
)
# Settings that may differ between a run and its continuation; all others influence the result.
_MAY_CHANGE = {
    *_LAYOUT,
    "name", "vae_training", "sampling", "paths", "data.engine", "training.activation_checkpointing",
    "training.checkpointing_steps", "training.checkpoints_total_limit", "training.logging_steps",
}  # fmt: skip


def find_start(run: Path, resume: str | None) -> Path | None:
    """The step folder to resume from, or None to start a new run. Raises ConfigError, CheckpointError."""
    check_output(run, "a run", field="--output_dir")
    if resume is None:
        if (run / "checkpoints").exists() or (run / "config.json").exists():
            fix = "add --resume, or choose another --output_dir"
            raise ConfigError("this folder already contains a run", path=run, fix=fix)
        return None
    if resume == LATEST:
        found = newest_checkpoint(run)
        if found:
            logger.info("resuming from %s", found)
        else:
            logger.info("nothing to resume in %s, starting a new run", run)
        return found
    folder = Path(resume)
    check_folder(folder, "checkpoint", error=CheckpointError, field="--resume")
    if not folder.exists():
        raise wrong_folder(folder, "checkpoint", error=CheckpointError, field="--resume")
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(
            "this folder contains no checkpoint", path=folder, fix="give a step folder, or --resume alone"
        )
    verify_checkpoint(folder)
    if folder.resolve().parent.parent != run.resolve():
        why = f"a run is resumed in its own folder, but --output_dir is {run}"
        raise ConfigError(why, path=folder, field="--resume", fix=f"use --output_dir {folder.parent.parent}")
    return folder


def check_unchanged(config: Config, facts: dict[str, Any], start: Path, state: dict[str, Any]) -> None:
    """Raise ConfigError, naming the first key, if a setting or fact that influences the result has changed.

    The layout may change: a checkpoint contains whole tensors, and the data is drawn for the global batch. What changes then is
    the rounding.

    Args:
        config: of the run that continues.
        facts: its entries in training_state.json, see `RunPlan.facts`.
        start: the step folder to resume from.
        state: its training_state.json.
    """
    before, now = (flatten(values.dump()) for values in (load_config(start / "config.json"), config))
    before |= {key: state.get(key) for key in facts}
    now |= facts
    for key, value in now.items():
        if before.get(key) != value and not any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE):
            raise ConfigError(
                f"{key} is {value!r:.80}; this run was started with {before.get(key)!r:.80}",
                path=start,
                field=key,
                fix=_RESTORE,
            )
    batches = [_global_batch(values) for values in (before, now)]
    if batches[0] != batches[1]:
        sizes = [" x ".join(str(values[key]) for key in _LAYOUT[:3]) for values in (before, now)]
        raise ConfigError(
            f"training.batch_size x gradient_accumulation_steps x processes is {sizes[1]} = {batches[1]}; this run was "
            f"started with {sizes[0]} = {batches[0]}",
            path=start,
            field="training.batch_size",
            fix=f"choose the first two so that the product is {batches[0]} again",
        )
    changed = [key for key in _LAYOUT if before[key] != now[key]]
    sharded = before["training.zero_stage"] > 0 and read_json(start / "manifest.json")["version"] == 1
    if changed and sharded:
        raise ConfigError(
            f"{changed[0]} is {now[changed[0]]!r}, but this checkpoint of an earlier version can only be resumed with "
            f"{before[changed[0]]!r}",
            path=start,
            field=changed[0],
            fix=_RESTORE,
        )
    if changed:
        changes = ", ".join(f"{key} was {before[key]} and is {now[key]}" for key in changed)
        logger.info("%s; the global batch is still %d", changes, batches[0])


def _global_batch(values: dict[str, Any]) -> int:
    return math.prod(values[key] for key in _LAYOUT[:3])


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
