"""The reference's checkpoint files, read and written: one `torch.save` dictionary (docs/explanation/method.md, section 2.7).

The reference's files do not say which variant they hold: names and shapes do. They do not show the head widths, the number of
norm groups and the norm's epsilon: those are the reference's unless a configuration is given. Our own exports carry the
configuration under a key that the reference never reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ccella_fast.config import ModelConfig
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model, model_config
from ccella_fast.models.weights import first_difference, plain, plain_tensors, read_pt
from ccella_fast.storage import atomic_path
from ccella_fast.variants import VARIANTS, Variant, get_variant

_OURS, _STATE_DICT = "ccella_fast_model", "unet_state_dict"


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """The content of a reference checkpoint, in plain tensors and numbers."""

    state_dict: dict[str, Tensor]
    scale_factor: list[float]  # one per sequence; latents are multiplied by it before they enter the network
    epoch: int  # finished epochs
    num_train_timesteps: int
    variant: str
    config: ModelConfig


class WeightFile(NamedTuple):
    """The tensors of a file, of any model, and what else the file says."""

    state_dict: dict[str, Tensor]
    scale_factor: list[float] | None
    config: ModelConfig | None


def read_weight_file(path: str | Path) -> WeightFile:
    """Read the weights of any model to the CPU, without executing anything in the file.

    The reference, MAISI and NV-Generate-CTMR write the dictionary of docs/explanation/method.md, section 2.7. The tensors alone
    are read too, from a file of torch.save or of safetensors.

    Raises:
        CheckpointError: the file is unsafe or damaged, or has no tensors.
    """
    if Path(path).suffix == ".safetensors":
        try:
            return WeightFile(load_file(path), None, None)
        except (OSError, SafetensorError) as error:
            why = f"this file cannot be read: {str(error).splitlines()[0]:.160}"
            raise CheckpointError(why, path=path, fix="copy the file again, or give another one") from None
    values = read_pt(path)
    if not isinstance(values, dict) or _STATE_DICT not in values:
        return WeightFile(plain_tensors(values, path=path), None, None)
    tensors = plain_tensors(values[_STATE_DICT], path=path, field=_STATE_DICT)
    scale_factor = _scale_factor(values["scale_factor"], path) if "scale_factor" in values else None
    return WeightFile(tensors, scale_factor, _stored_config(values[_OURS], path) if _OURS in values else None)


def read_reference(
    path: str | Path, *, variant: str | None = None, config: ModelConfig | None = None
) -> ReferenceCheckpoint:
    """Read a reference `.pt` to the CPU, without executing anything in it.

    Args:
        path: the file.
        variant: distinguishes CCELLA and L1ONLY, which have the same tensors; default: the first row of the table that fits.
        config: the exact architecture, for sizes that do not follow from the shapes.

    Raises:
        CheckpointError: the file is unsafe, damaged or incomplete, or has another variant or other tensors.
    """
    values = read_pt(path)
    if not isinstance(values, dict) or _STATE_DICT not in values:
        fix = "give a checkpoint of the reference's training, such as CCELLA.pt"
        raise CheckpointError("this file has no 'unet_state_dict'", path=path, field=_STATE_DICT, fix=fix)
    tensors = plain_tensors(values[_STATE_DICT], path=path, field=_STATE_DICT)
    scale_factor = _scale_factor(values.get("scale_factor"), path)
    if config is None and variant is None and _OURS in values:
        config = _stored_config(values[_OURS], path)
    wanted = config.variant if config else variant
    row = _find_variant(tensors, wanted, path)
    found = config or _find_config(tensors, row, len(scale_factor), path)
    with torch.device("meta"):
        difference = first_difference(build_model(found).state_dict(), tensors)
    if difference is not None:
        fix = "give the matching configuration, or another file"
        raise CheckpointError(f"not a {row.name} checkpoint: {difference}", path=path, fix=fix)
    epoch, timesteps = (_count(values, key, path) for key in ("epoch", "num_train_timesteps"))
    return ReferenceCheckpoint(tensors, scale_factor, epoch, timesteps, row.name, found)


def write_reference(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    scale_factor: Sequence[float],
    num_train_timesteps: int = 1000,
    config: ModelConfig | None = None,
) -> None:
    """Write a checkpoint that the scripts of the reference load.

    Args:
        path: the file.
        state_dict: of the whole model.
        scale_factor: one per sequence; written as a 0-d tensor, or as a tuple of them for several sequences.
        num_train_timesteps: length of the noise schedule.
        config: also stored, for the sizes that do not follow from the shapes.
    """
    factors = tuple(torch.tensor(factor, dtype=torch.float64) for factor in scale_factor)
    values = {
        "epoch": 0,
        "loss": math.nan,
        "num_train_timesteps": num_train_timesteps,
        "scale_factor": factors[0] if len(factors) == 1 else factors,
        # Cloned: torch.save would write the whole storage behind a view.
        _STATE_DICT: {
            name: plain(tensor).cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in state_dict.items()
        },
        **({} if config is None else {_OURS: config.model_dump(mode="json")}),
    }
    with atomic_path(path) as temporary:
        torch.save(values, temporary)


def _stored_config(value: Any, path: str | Path) -> ModelConfig:
    try:
        return model_config(value["variant"], **value)
    except (ConfigError, KeyError, TypeError) as bad:
        why = f"the stored model configuration is malformed ({str(bad).splitlines()[0]:.100})"
        raise CheckpointError(why, path=path, field=_OURS, fix="export the checkpoint again") from None


def _scale_factor(value: Any, path: str | Path) -> list[float]:
    """A number, a 0-d tensor of any class, or several of them."""
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = [
        isinstance(entry, (int, float)) or (isinstance(entry, Tensor) and entry.numel() == 1) for entry in entries
    ]
    factors = [float(entry) for entry in entries] if entries and all(numbers) else [math.nan]
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        why = "the scale factor is missing or not a positive number"
        raise CheckpointError(why, path=path, field="scale_factor", fix="give the file that training wrote")
    return factors


def _count(values: dict[Any, Any], key: str, path: str | Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"'{key}' is missing or not a whole number", path=path, field=key, fix="give another file"
        )
    return value


def _find_variant(tensors: Mapping[str, Tensor], wanted: str | None, path: str | Path) -> Variant:
    """The row of the table that the names belong to."""
    text = any(name.startswith("unet.") for name in tensors)
    if any(name.startswith("ella.connector.cascade_blocks.") for name in tensors):
        head = "cascade"
    elif "ella.connector.classifier.fc1.weight" in tensors:
        head = "shared" if "classifier.weight" in tensors else "first"
    else:
        head = "last" if "classifier.fc1.weight" in tensors else "none"
    if f"{'unet.' if text else ''}pirads_layer.0.weight" not in tensors:
        class_input = "none"
    else:
        class_input = "given" if head == "none" else "predicted"
    fitting = [row for row in VARIANTS.values() if (row.text, row.head, row.class_input) == (text, head, class_input)]
    if wanted is None and fitting:
        return fitting[0]
    names = " or ".join(row.name for row in fitting) or "none of the variants"
    if wanted is None or get_variant(wanted) not in fitting:
        what = f"not a {wanted} checkpoint" if wanted else "not a checkpoint of the reference"
        raise CheckpointError(
            f"{what}: its tensors are those of {names}", path=path, fix="choose the variant that fits"
        )
    return get_variant(wanted)


def _find_config(tensors: Mapping[str, Tensor], row: Variant, sequences: int, path: str | Path) -> ModelConfig:
    """Every size that shapes show; the others keep the reference's values."""
    unet = "unet." if row.text else ""
    try:
        levels = _count_children(tensors, f"{unet}down_blocks.")
        channels = tensors[f"{unet}conv_in.conv.weight"].shape[1]
        if channels % sequences:
            why = f"{channels} latent channels and {sequences} scale factors do not go together"
            raise CheckpointError(why, path=path, field="scale_factor", fix="give another file")
        attends = [f"{unet}down_blocks.{level}.attentions.0.norm.weight" in tensors for level in range(levels)]
        sizes: dict[str, Any] = {
            "latent_channels": [channels // sequences] * sequences,
            "num_channels": [
                tensors[f"{unet}down_blocks.{level}.resnets.0.conv1.conv.weight"].shape[0] for level in range(levels)
            ],
            "attention_levels": attends,
            "num_head_channels": [32 if attention else 0 for attention in attends[:-1]] + [32],  # the middle attends
            "num_res_blocks": _count_children(tensors, f"{unet}down_blocks.0.resnets."),
            "resblock_updown": f"{unet}down_blocks.0.downsampler.conv1.conv.weight" in tensors,
            "include_fc": any(re.search(r"\.attentions?\..*attn1?\.out_proj\.", name) for name in tensors),
        }
        if row.class_input != "none":
            sizes["num_classes"] = tensors[f"{unet}pirads_layer.0.weight"].shape[1]
        if row.text:
            sizes |= _adapter_sizes(tensors, row)
        return model_config(row.name, **sizes)
    except (KeyError, ConfigError, IndexError, ValueError) as bad:
        if isinstance(bad, ConfigError):
            why = bad.why
        else:
            why = f"'{bad.args[0]}' is missing" if isinstance(bad, KeyError) else "a tensor has too few axes"
        raise CheckpointError(f"not a {row.name} checkpoint: {why}", path=path, fix="give another file") from None


def _adapter_sizes(tensors: Mapping[str, Tensor], row: Variant) -> dict[str, int]:
    num_latents, width = tensors["ella.connector.latents"].shape
    sizes = {
        "num_latents": num_latents,
        "cross_attention_dim": width,
        "input_dim": tensors["ella.connector.proj_in.weight"].shape[1],
        "adapter_blocks": _count_children(tensors, "ella.connector.perceiver_blocks."),
        "adapter_time_dim": tensors["ella.time_embedding.linear_1.weight"].shape[1],
    }
    if row.head != "none":
        home = {"cascade": "ella.connector.cascade_blocks.0", "last": "classifier"}.get(
            row.head, "ella.connector.classifier"
        )
        sizes["class_head_dim"] = tensors[f"{home}.fc1.weight"].shape[0]
    return sizes


def _count_children(tensors: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match.group(1) for match in map(pattern.match, tensors) if match})
