"""Reading weight files safely, and strict loading: a state dict fits a module exactly, or an error says where it does not."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.errors import CheckpointError


class _TensorWithMetadata(Tensor):
    """Stands for MONAI's tensor class."""


class _Discarded:
    """Stands for metadata in which we have no interest."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _member(enumeration: Any, name: Any) -> str:
    """In place of getattr, by which Python before 3.11.4 pickles a member of an enumeration: MONAI's, where it is imported, or
    a stand-in's. Nothing is looked up."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, (str, Enum)) and type(name) is str):
        raise pickle.UnpicklingError("Unsupported operand: GLOBAL getattr of something that is no enumeration")
    return name


# The reference stores its scale factor as a MONAI tensor that carries image metadata. These stand-ins take the places of
# MONAI's and numpy's classes, so that nothing outside torch is imported or called; any other class in a file is refused.
_STAND_INS: list[Any] = [
    (_TensorWithMetadata, "monai.data.meta_tensor.MetaTensor"),
    (str, "monai.utils.enums.MetaKeys"),
    (str, "monai.utils.enums.SpaceKeys"),
    (str, "monai.utils.enums.TraceKeys"),
    (_member, "builtins.getattr"),
    (_Discarded, "numpy.ndarray"),
    (_Discarded, "numpy.dtype"),
    (_Discarded, "numpy._core.multiarray._reconstruct"),
    (_Discarded, "numpy._core.multiarray.scalar"),
    (_Discarded, "numpy.core.multiarray._reconstruct"),
    (_Discarded, "numpy.core.multiarray.scalar"),
]


def read_pt(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU, with tensors and plain values only. Raises CheckpointError.

    A file that asks for any other class or function is refused before anything in it runs."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("this file does not exist", path=path, fix="check the path") from None
    except pickle.UnpicklingError as bad:
        name = re.search(r"GLOBAL (\S+)", str(bad))
        why = f"refused: this file asks for {name.group(1)!r:.80}" if name else "damaged, or refused as unsafe"
        raise CheckpointError(why, path=path, fix="use a file of plain tensors from a source you trust") from None
    except Exception as bad:  # whatever a damaged file sets off in the reader
        first = "".join(str(bad).strip().splitlines()[:1])
        raise CheckpointError(
            f"not a readable weight file: {first:.150}", path=path, fix="copy the file again"
        ) from None


def plain_tensors(values: Any, *, path: str | Path, field: str | None = None) -> dict[str, Tensor]:
    """`values`, a dictionary of names and tensors, without tensor subclasses. Raises CheckpointError if it is no such thing."""
    if not isinstance(values, dict) or not values:
        raise CheckpointError("a dictionary of tensors is expected", path=path, field=field, fix="give another file")
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            why = f"the entry {name!r:.80} is no tensor"
            raise CheckpointError(why, path=path, field=field, fix="give a file that holds a state dict")
    return {name: plain(tensor) for name, tensor in values.items()}


def plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


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
    return f"'{names[0]}' is" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more are"
