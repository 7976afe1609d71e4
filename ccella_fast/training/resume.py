"""Where a run starts: the checkpoint that it continues from, and what must not have changed since."""

from __future__ import annotations

import logging
import math
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import ccella_fast
from ccella_fast.checkpoint import newest_checkpoint, step_folders, verify_checkpoint
from ccella_fast.config import Config, load_config
from ccella_fast.environment import code_digest
from ccella_fast.errors import CcellaError, CheckpointError, ConfigError
from ccella_fast.folder_kinds import check_folder, check_output
from ccella_fast.folder_lock import LOCK
from ccella_fast.processes import HostCollectives
from ccella_fast.storage import read_json, sha256
from ccella_fast.training.run_status import read_status

logger = logging.getLogger("ccella_fast")
LATEST = "latest"
_RESTORE = "restore the value, or start a new run in another --output_dir"
# Seconds after which a file that one machine has written is seen by the others; NFS may keep old names.
_VISIBLE_WITHIN = 30.0
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
    "training.collective_timeout", "training.init_skip", "training.init_modality", "monitoring.validation_steps",
    "monitoring.sample_steps", "monitoring.samples", "monitoring.sample_inference_steps", "monitoring.best_metric",
}  # fmt: skip


def find_start(run: Path, resume: str | None) -> Path | None:
    """The step folder to resume from, or None to start a new run. Raises ConfigError, CheckpointError.

    A run that ended before its first checkpoint may be started again without `resume`, for example with a smaller batch.
    """
    check_output(run, "a run", field="--output_dir")
    if resume is None:
        ended = read_status(run).get("state") in ("failed", "terminated")
        if step_folders(run) or ((run / "config.json").exists() and not ended):
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
    if not (folder / "manifest.json").is_file():
        why = "this is not a step folder with a manifest.json" if folder.exists() else "this path does not exist"
        fix = f"give a step folder of {run / 'checkpoints'}, or --resume alone to continue from the newest"
        raise CheckpointError(why, path=folder, field="--resume", fix=fix)
    check_folder(folder, "checkpoint", error=CheckpointError, field="--resume")
    verify_checkpoint(folder)
    if folder.resolve().parent.parent != run.resolve():
        why = f"a run is resumed in its own folder, but --output_dir is {run}"
        raise ConfigError(why, path=folder, field="--resume", fix=f"use --output_dir {folder.parent.parent}")
    name = folder.resolve().name  # `folder` may be a link
    newer = [other.name for other in step_folders(run) if other.name > name]
    if newer:
        why = (
            "%s is older than %s, from which --resume without a folder continues; remove newer ones that are not wanted"
        )
        logger.warning(why, name, newer[0])
    return folder


def agree_on_start(run: Path, resume: str | None, collectives: HostCollectives) -> Path | None:
    """The step folder to resume from, which rank 0 chooses and verifies, or None. Other processes must see the same files.

    Rank 0 must hold the lock of the folder `run`.

    Raises:
        CcellaError: on all processes.
    """
    main = collectives.rank == 0
    start = collectives.from_rank_zero(collectives.together(lambda: find_start(run, resume) if main else None))
    files = [run / LOCK] + ([] if start is None else [start / "manifest.json"])  # the lock names process and host
    expected = collectives.from_rank_zero([_digest(file) for file in files] if main else [])

    def compare() -> None:
        for file, digest in zip(files, expected, strict=True):
            deadline = time.monotonic() + _VISIBLE_WITHIN
            while (found := _digest(file)) != digest and time.monotonic() < deadline:
                time.sleep(0.2)
            if found != digest:
                raise _other_files(file, collectives.rank, found, digest)

    collectives.together(compare)
    return start


def _digest(file: Path) -> str | None:
    try:
        return sha256(file)
    except OSError:
        return None


def _other_files(file: Path, rank: int, found: str | None, digest: str | None) -> CcellaError:
    """The error of a process that does not see what rank 0 sees. found, digest: its SHA-256 and that on rank 0."""
    what = "no such file" if found is None else f"a file with the SHA-256 {found}"
    why = f"process {rank} on {socket.gethostname()} sees {what}, where process 0 sees one with {digest}"
    if file.name == LOCK:
        fix = "use an --output_dir on a disk that all machines share"
        return ConfigError(why, path=file, field="--output_dir", fix=fix)
    fix = "check the disk of that machine, then run the same command again"
    return CheckpointError(why, path=file, field="--resume", fix=fix)


def run_length(
    configured: int, extend_to: int | None, run: Path, state: dict[str, Any]
) -> tuple[int, list[dict[str, int]]]:
    """The length of a run in optimizer steps, and its extensions so far, for training_state.json.

    An extended run has the learning rate of a run of its new length from the step on at which it is extended:
    lr_k = lr_0 (1 - k/N)^2. What is configured stays as it was when the run was started.

    Args:
        configured: the length that follows from the configuration.
        extend_to: the new length, or None; that of the run as it is changes nothing.
        run: the run's folder, for error messages.
        state: training_state.json of the checkpoint to resume from; empty for a new run.

    Raises:
        ConfigError: there is nothing to extend, or the new length is below the present one.
    """
    extensions = list(state.get("extensions", []))
    length = configured
    if extensions and configured == extensions[0]["from"]:
        length = extensions[-1]["to"]
    if extend_to is None or extend_to == length:
        return length, extensions
    if not state:
        why = "--extend_to continues a run, but there is no checkpoint to continue from"
        raise ConfigError(why, path=run, field="--extend_to", fix="use --max_train_steps for the length of a new run")
    if extend_to < length:
        why = f"--extend_to {extend_to} is less than the length of this run, {length} steps ({state['step']} are done)"
        raise ConfigError(why, path=run, field="--extend_to", fix=f"give a number above {length}")
    return extend_to, [*extensions, {"step": state["step"], "from": length, "to": extend_to}]


def check_agreement(
    config: Config, engine_values: dict[str, Any], facts: dict[str, Any], collectives: HostCollectives
) -> None:
    """Raise ConfigError on all processes, naming the first difference, unless all have the settings and the code of rank 0.

    Args:
        config: the configuration; names and paths may differ.
        engine_values: for DeepSpeed.
        facts: what else must be equal, such as the hash of the data and the step.
        collectives: of all processes.
    """
    values = flatten(config.dump()) | {f"DeepSpeed's {key}": value for key, value in flatten(engine_values).items()}
    versions = {f"version of {name}": metadata.version(name) for name in ("torch", "deepspeed")}
    values |= facts | versions | {"ccella_fast": ccella_fast.__version__, "code of ccella_fast": code_digest()}
    mine = {key: value for key, value in values.items() if key.partition(".")[0] not in ("name", "paths")}
    theirs = collectives.from_rank_zero(mine)

    def compare() -> None:
        for key in mine | theirs:
            if mine.get(key) != theirs.get(key):
                who = f"on process {collectives.rank} ({socket.gethostname()})"
                why = f"{key} is {mine.get(key)!r:.80} {who}, but {theirs.get(key)!r:.80} on process 0"
                fix = "give all processes the same command, files and packages"
                if key == "training.precision":
                    fix = "the CPUs differ: set training.precision to fp32 or bf16"
                raise ConfigError(why, field=key, fix=fix)

    collectives.together(compare)


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
    before["extensions"] = facts["extensions"]
    if facts["extensions"] != state.get("extensions", []):  # the run is extended now
        before["total_steps"] = facts["total_steps"]
    for key, value in now.items():
        if before.get(key) != value and not any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE):
            longer = key == "training.max_train_steps" and (value or 0) > state.get("total_steps", value)
            raise ConfigError(
                f"{key} is {value!r:.80}; this run was started with {before.get(key)!r:.80}",
                path=start,
                field=key,
                fix=f"restore the value; --extend_to {value} makes the run longer" if longer else _RESTORE,
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
