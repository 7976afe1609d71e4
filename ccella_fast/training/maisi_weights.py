"""The U-Nets of MAISI and NV-Generate-CTMR as weights of our U-Net, which lacks two of their inputs.

MAISI's first version reads the body regions at the top and at the bottom of the volume, and the rectified flow of
NV-Generate-CTMR reads the modality. For the prostate in one sequence both are constant, and what a constant adds to a linear
layer is part of its bias. So nothing is lost: the converted network computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.errors import CheckpointError

# The pelvis, the last of the regions head and neck, chest, abdomen and pelvis. As every input of this kind it is times 100.
_REGION = [0.0, 0.0, 0.0, 100.0]
_REGION_LAYERS = (
    "top_region_index_layer",
    "bottom_region_index_layer",
)  # in the order of the embedding, after the timestep
_CLASS_EMBEDDING = "unet.class_embedding.weight"
# Rows of the class embedding: configs/modality_mapping.json of NV-Generate-CTMR.
MODALITIES = {"t2w": 10, "hbv": 13, "adc": 14}


class Folded(NamedTuple):
    """Weights without the inputs that are constant, and what was done, in words."""

    tensors: dict[str, Tensor]
    notes: list[str]


def fold_constant_inputs(tensors: Mapping[str, Tensor], *, modality: int, path: object) -> Folded:
    """Move the constant inputs of MAISI's U-Nets to the biases. Other weights are returned as they are.

    Args:
        tensors: of the U-Net, whose names begin with `unet.`.
        modality: row of the class embedding.
        path: the file, for error messages.

    Raises:
        CheckpointError: the class embedding does not have this row, or a tensor has a shape that MAISI's do not have.
    """
    tensors, notes = dict(tensors), []
    if _CLASS_EMBEDDING in tensors:
        rows = tensors.pop(_CLASS_EMBEDDING)
        if modality >= len(rows):
            why = f"the class embedding has {len(rows)} modalities, and number {modality} is asked for"
            fix = f"choose one from 0 to {len(rows) - 1}"
            raise CheckpointError(why, path=path, field="training.init_modality", fix=fix)
        _add(tensors, "unet.time_embed.2.bias", rows[modality], path)
        notes.append(f"its class embedding is that of modality {modality}")
    regions = [layer for layer in _REGION_LAYERS if f"unet.{layer}.0.weight" in tensors]
    if regions:
        constants = torch.cat([_region_embedding(tensors, layer, path) for layer in regions])
        for name in [name for name in tensors if name.endswith(".time_emb_proj.weight")]:
            weight, width = tensors[name], len(constants) // len(regions)
            if weight.ndim != 2 or weight.shape[1] <= width + len(constants):
                raise _not_maisi(name, path)
            before, constant, after = weight.tensor_split([width, width + len(constants)], dim=1)
            tensors[name] = torch.cat([before, after], dim=1)
            bias = constant.double() @ F.silu(constants)
            _add(tensors, f"{name.removesuffix('weight')}bias", bias, path)
        notes.append("its body region is the pelvis")
    return Folded(tensors, notes)


def _region_embedding(tensors: dict[str, Tensor], layer: str, path: object) -> Tensor:
    """The embedding of the region, (E,) in float64. The layer is removed from `tensors`."""
    values: Tensor = torch.tensor(_REGION, dtype=torch.float64)
    try:
        for index in (0, 2):
            weight, bias = (tensors.pop(f"unet.{layer}.{index}.{kind}").double() for kind in ("weight", "bias"))
            values = F.linear(F.silu(values) if index else values, weight, bias)
    except (KeyError, RuntimeError):
        raise _not_maisi(f"unet.{layer}", path) from None
    return values


def _add(tensors: dict[str, Tensor], name: str, value: Tensor, path: object) -> None:
    if name not in tensors or tensors[name].shape != value.shape:
        raise _not_maisi(name, path)
    tensors[name] = (tensors[name].double() + value.double()).to(tensors[name].dtype)


def _not_maisi(name: str, path: object) -> CheckpointError:
    why = f"'{name}' is missing or does not have a shape of MAISI's U-Net"
    return CheckpointError(why, path=path, field=name, fix="give another file")
