"""Strict loading: a state dict fits a module exactly, or a CheckpointError says where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ccella_fast.errors import CheckpointError


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, path: str | Path, what: str) -> None:
    """Copy `state_dict` into `module`. Raises CheckpointError that names the first tensor that differs, and both shapes.

    path: where the tensors came from; what: what the module is, in the user's words."""
    difference = first_difference(module.state_dict(), state_dict)
    if difference is not None:
        fix = "give the configuration that these weights were trained with, or other weights"
        raise CheckpointError(f"these are not the weights of {what}: {difference}", path=path, fix=fix)
    module.load_state_dict(dict(state_dict))


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Missing, unknown and differently shaped tensors, in this order; None when names and shapes agree."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        return f"{_some(missing)} missing"
    if unknown:
        return f"{_some(unknown)} unknown"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            return f"'{name}' has shape {list(found[name].shape)}, {list(tensor.shape)} is expected"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"
