"""Read checkpoints of version 1, in which the state of the optimizer is DeepSpeed's.

At stage 0 it contains whole moments, which any engine can take. With ZeRO each process has written a shard, which only the same
number of processes can read, with the same stage and precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ccella_fast.errors import CheckpointError

_FOLDER, _TAG = "deepspeed", "shards"
# The only classes that DeepSpeed's shards contain besides tensors and plain values.
_SAFE_CLASSES = [fragment_address, ZeroStageEnum, LossScaler]
_FIX = "use another checkpoint"


class Moments(NamedTuple):
    """Whole moments of Adam by parameter name, and the number of steps that it has applied."""

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    steps: int


class SafeShards(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, which reads shards without executing code."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one shard. Raises CheckpointError if it is damaged or contains anything but the allowed classes."""
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except Exception as error:
                why = f"this shard cannot be read safely: {str(error).splitlines()[0]:.160}"
                raise CheckpointError(why, path=path, fix="do not trust this file; use another checkpoint") from None


def has_shards(folder: Path) -> bool:
    """Whether the step folder contains shards of ZeRO instead of whole moments."""
    return any((folder / _FOLDER / _TAG).glob("*optim_states.pt"))


def load_shards(folder: Path, engine: Any) -> None:
    """Restore the engine from the shards of the step folder: weights, optimizer, learning rate and counters.

    Raises:
        CheckpointError: a shard is missing, damaged or unsafe.
    """
    engine.checkpoint_engine = SafeShards()  # DeepSpeed's configuration cannot select another class
    loaded, _ = engine.load_checkpoint(str(folder / _FOLDER), tag=_TAG)
    if loaded is None:
        raise CheckpointError("DeepSpeed did not find its shards in this checkpoint", path=folder, fix=_FIX)


def read_moments(folder: Path, shapes: Mapping[str, torch.Size]) -> Moments:
    """Read the optimizer's state of a checkpoint that was written at stage 0.

    Args:
        folder: the step folder.
        shapes: of the model's parameters by name, in the order of the model.

    Raises:
        CheckpointError: the file is unsafe, or does not fit the model.
    """
    path = folder / _FOLDER / _TAG / "mp_rank_00_model_states.pt"
    optimizer = SafeShards().load(str(path), "cpu")["optimizer"]
    states = optimizer.get("optimizer_state_dict", optimizer)["state"]  # in bf16, within DeepSpeed's own

    def whole(kind: str) -> dict[str, Tensor]:
        # Adam creates the state of a parameter with its first gradient.
        found = {
            name: states[index][kind] if index in states else torch.zeros(shape)
            for index, (name, shape) in enumerate(shapes.items())
        }
        if len(states) > len(shapes) or any(tensor.shape != shapes[name] for name, tensor in found.items()):
            raise CheckpointError("this optimizer's state does not fit the model", path=path, fix=_FIX)
        return found

    steps = max((int(state["step"]) for state in states.values()), default=0)
    return Moments(whole("exp_avg"), whole("exp_avg_sq"), steps)
