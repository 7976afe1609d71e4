"""Write a checkpoint from all processes, and restore one.

A failure on any process (usually a full disk) is raised on all of them, and no process is left waiting. The partial folder is
removed; earlier checkpoints stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file, save_file
from torch import Tensor

import ccella_fast
from ccella_fast.checkpoint import publish_checkpoint, step_folder, write_manifest
from ccella_fast.config import Config
from ccella_fast.errors import CheckpointError, DiskError
from ccella_fast.processes import HostCollectives
from ccella_fast.storage import write_json
from ccella_fast.training.ema import Ema
from ccella_fast.training.engine import full_weights

_TAG = "shards"
# The only classes that DeepSpeed's shards contain besides tensors and plain values.
_SAFE_CLASSES = [fragment_address, ZeroStageEnum, LossScaler]


class SafeShards(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, which reads shards without executing code.

    Attributes:
        failure: the error of a failed write. It is not raised, because the other processes would wait in the barrier with which
            DeepSpeed's `save_checkpoint` ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one shard."""
        try:
            torch.save(_without_enums(state_dict), path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one shard. Raises CheckpointError if it is damaged or contains anything but the allowed classes."""
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except Exception as error:
                why = f"this shard cannot be read safely: {str(error).splitlines()[0]:.160}"
                raise CheckpointError(why, path=path, fix="do not trust this file; use another checkpoint") from None


def _without_enums(value: Any) -> Any:
    """Replace enumerations (the ZeRO stage) by their values, to which they are equal. Only containers are copied.

    Some versions of Python, such as 3.11.2, pickle an enumeration as a call of getattr, which loading must not allow.
    """
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_enums(item) for item in value)
    return value


def save_checkpoint(
    run: Path,
    step: int,
    engine: Any,
    ema: Ema | None,
    config: Config,
    state: dict[str, Any],
    vae: Path | None,
    collectives: HostCollectives,
) -> Path:
    """Write the step folder RUN/checkpoints/step-XXXXXXXX. All processes call it.

    Args:
        run: the run's folder.
        step: finished optimizer steps.
        engine: the DeepSpeed engine.
        ema: the moving average, if there is one.
        config: the configuration.
        state: the content of training_state.json.
        vae: folder of the autoencoder to copy into the checkpoint.
        collectives: used to share failures.

    Returns:
        The step folder.

    Raises:
        DiskError: on all processes, if one of them could not write.
    """
    final = step_folder(run, step)
    partial = final.with_name(f".partial-{final.name}")
    main = dist.get_rank() == 0
    failure: Exception | None = None
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    _raise_if_any_rank_failed(failure, partial, collectives)
    engine.checkpoint_engine = shards = SafeShards()  # DeepSpeed's configuration cannot select another class
    engine.save_checkpoint(str(partial / "deepspeed"), tag=_TAG, save_latest=False)
    failure = shards.failure
    failure = _write_weights(full_weights(engine), partial / "model.safetensors", failure)
    if ema is not None:
        failure = _write_weights(ema.full_weights(), partial / "ema.safetensors", failure)
    _raise_if_any_rank_failed(failure, partial, collectives)
    try:
        if main:
            write_json(partial / "config.json", config.dump())
            write_json(partial / "training_state.json", state)
            if vae is not None:
                shutil.copytree(vae, partial / "vae")
            versions = {name: metadata.version(name) for name in ("torch", "deepspeed")} | {
                "ccella-fast": ccella_fast.__version__
            }
            write_manifest(partial, step=step, world_size=dist.get_world_size(), versions=versions)
            publish_checkpoint(partial, final, keep=config.training.checkpoints_total_limit)
    except (OSError, DiskError) as error:
        failure = error
    _raise_if_any_rank_failed(failure, partial, collectives)
    return final


def restore_checkpoint(folder: Path, engine: Any, ema: Ema | None, state: dict[str, Any]) -> None:
    """Restore weights, optimizer, learning rate and averages from a verified step folder. All processes call it.

    state: its training_state.json. Raises CheckpointError.
    """
    engine.checkpoint_engine = SafeShards()
    loaded, _ = engine.load_checkpoint(str(folder / "deepspeed"), tag=_TAG)
    if loaded is None:
        why = "DeepSpeed did not find its shards in this checkpoint"
        raise CheckpointError(why, path=folder, fix="use another checkpoint")
    if ema is not None:
        ema.restore(load_file(folder / "ema.safetensors"), state["ema_updates"])


def _write_weights(weights: Iterator[tuple[str, Tensor]], path: Path, failure: Exception | None) -> Exception | None:
    """Gather weights on all processes and write them on rank 0, unless writing has failed before. Returns the failure.

    The weights must be gathered to the end in any case, because the other processes take part.
    """
    main = dist.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    for name, value in weights:
        if main and failure is None:
            gathered[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if main and failure is None:
        try:
            save_file(gathered, path, metadata={"format": "pt"})
        except Exception as error:  # SafetensorError when writing fails, OSError when opening fails
            return error
    return failure


def _raise_if_any_rank_failed(failure: Exception | None, partial: Path, collectives: HostCollectives) -> None:
    """Raise DiskError on all processes if one has failed, and remove the partial folder."""
    reasons = [reason for reason in collectives.all_gather(str(failure) if failure else None) if reason]
    if not reasons:
        return
    bytes_written = 0
    if dist.get_rank() == 0:
        bytes_written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(next(folder for folder in partial.parents if folder.exists())).free
    raise DiskError(
        f"this checkpoint could not be written: {reasons[0].splitlines()[0]:.120} ({bytes_written} bytes "
        f"written, {free} bytes free); earlier checkpoints are intact",
        path=partial.parent,
        fix="free space, then run the same command with --resume",
    )
