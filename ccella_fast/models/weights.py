"""Safe reading of weight files, and strict loading of state dicts with an error that names the first difference."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.errors import CheckpointError

_CHUNK = 2**24  # bytes read at a time


class _TensorWithMetadata(Tensor):
    """Stand-in for the tensor class of MONAI."""


class _Discarded:
    """Stand-in for metadata that is not used."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _enum_member(enumeration: Any, name: Any) -> str:
    """Stand-in for `getattr`, with which Python before 3.11.4 pickles members of an enumeration. No attribute is looked up.

    `enumeration` is a class of MONAI if that has been imported, otherwise one of the stand-ins.
    """
    if not (isinstance(enumeration, type) and issubclass(enumeration, (str, Enum)) and type(name) is str):
        raise pickle.UnpicklingError("Unsupported operand: GLOBAL getattr of something that is not an enumeration")
    return name


# The reference implementation stores its scale factor as a MONAI tensor with image metadata. These stand-ins replace the
# classes of MONAI and numpy, so that nothing outside torch is imported or called. A file that refers to any other class is
# refused.
_STAND_INS: list[Any] = [
    (_TensorWithMetadata, "monai.data.meta_tensor.MetaTensor"),
    (str, "monai.utils.enums.MetaKeys"),
    (str, "monai.utils.enums.SpaceKeys"),
    (str, "monai.utils.enums.TraceKeys"),
    (_enum_member, "builtins.getattr"),
    (_Discarded, "numpy.ndarray"),
    (_Discarded, "numpy.dtype"),
    (_Discarded, "numpy._core.multiarray._reconstruct"),
    (_Discarded, "numpy._core.multiarray.scalar"),
    (_Discarded, "numpy.core.multiarray._reconstruct"),
    (_Discarded, "numpy.core.multiarray.scalar"),
]


def read_pt(path: str | Path) -> Any:
    """Read a file written by `torch.save` that holds only tensors and plain values; tensors are placed on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or it refers to another class or function; in the latter case it is
            refused before any of it is run.
    """
    _check_is_weights(path)
    try:
        _check_checksums(path)
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("this file does not exist", path=path, fix="check the path") from None
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {name.group(1)!r:.80}" if name else "it is damaged or unsafe"
        fix = "use a file of plain tensors from a source you trust"
        raise CheckpointError(f"this file is refused: {reason}", path=path, fix=fix) from None
    except Exception as error:  # a damaged file can raise anything in the reader
        first = "".join(str(error).strip().splitlines()[:1])
        why = f"this is not a readable weight file: {first:.150}"
        raise CheckpointError(why, path=path, fix="copy the file again") from None


def _check_checksums(path: str | Path) -> None:
    """Raise zipfile.BadZipFile for damaged tensors in an archive of `torch.save`; torch.load itself ignores the checksums."""
    if not zipfile.is_zipfile(path):  # a pickle of earlier versions of torch, which has none
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.CRC:  # 0 after torch.serialization.set_crc32_options(False)
                with archive.open(member) as stream:
                    while stream.read(_CHUNK):
                        pass


def _check_is_weights(path: str | Path) -> None:
    """Raise CheckpointError for a file that `torch.save` cannot have written; a missing one passes."""
    if not Path(path).is_file():
        return
    with open(path, "rb") as file:
        head = file.read(100)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        why = "this file is a pointer of Git LFS: its data was not downloaded"
        raise CheckpointError(why, path=path, fix="run `git lfs pull` in its folder")
    if not head.startswith((b"PK", b"\x80")):  # a ZIP archive, or a pickle of earlier versions of torch
        why = "this file is empty" if not head else "this is not a file that torch.save has written"
        raise CheckpointError(why, path=path, fix="download or copy the file again, or give another one")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):  # torch would call it an internal error
        why = "the end of this weight file is missing"
        raise CheckpointError(why, path=path, fix="download or copy the file again")


def plain_tensors(values: Any, *, path: str | Path, field: str | None = None) -> dict[str, Tensor]:
    """Return the state dict `values` with every tensor as a plain `Tensor`, not an instance of a subclass.

    Args:
        values: the object to check.
        path: the file that it was read from, for error messages.
        field: its key in that file, for error messages.

    Raises:
        CheckpointError: `values` is not a non-empty dictionary of names and tensors.
    """
    if not isinstance(values, dict) or not values:
        why = "a non-empty dictionary of tensors is expected"
        raise CheckpointError(why, path=path, field=field, fix="use a file that contains a state dict")
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            why = f"the entry {name!r:.80} is not a tensor"
            raise CheckpointError(why, path=path, field=field, fix="use a file that contains a state dict")
    return {name: plain(tensor) for name, tensor in values.items()}


def plain(tensor: Tensor) -> Tensor:
    """Return `tensor` detached and as a plain `Tensor`."""
    return tensor.detach().as_subclass(Tensor)


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, path: str | Path, what: str) -> None:
    """Copy `state_dict` into `module`; names and shapes must agree exactly.

    Args:
        module: changed in place.
        state_dict: the weights.
        path: the file that they were read from, for error messages.
        what: a description of `module` for error messages, such as "this autoencoder".

    Raises:
        CheckpointError: a name or shape differs; the first difference is named.
    """
    difference = first_difference(module.state_dict(), state_dict)
    if difference is not None:
        fix = "use the configuration that these weights were trained with, or other weights"
        raise CheckpointError(f"these are not the weights of {what}: {difference}", path=path, fix=fix)
    module.load_state_dict(dict(state_dict))


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Describe missing, unknown or differently shaped tensors, in this order; None if names and shapes agree."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        return f"{_enumerate_names(missing)} missing"
    if unknown:
        return f"{_enumerate_names(unknown)} unknown"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            return f"'{name}' has shape {list(found[name].shape)}, {list(tensor.shape)} is expected"
    return None


def _enumerate_names(names: list[str]) -> str:
    return f"'{names[0]}' is" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more are"
