"""A folder of feature vectors, found again by what they were computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ccella_fast.errors import DataError
from ccella_fast.evaluation.features.extractor import Extractor, SliceExtractor
from ccella_fast.evaluation.features.preprocessing import mean_of_slices
from ccella_fast.storage import atomic_path

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume


class FeatureCache:
    """Features by the content of the volume and the identity of the extractor: a change of either gives another key.

    Several processes may write at the same time. A damaged file is computed again.

    Args:
        folder: is created with the first entry.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def features(self, extractor: Extractor, volume: Volume, digest: bytes | None = None) -> dict[str, np.ndarray]:
        """What `extractor(volume)` returns, from the folder if it is there. Of a `SliceExtractor`, the slices are kept.

        Args:
            extractor: of the features.
            volume: what they are computed from.
            digest: of the volume, from `voxel_digest`, which is called if it is not given.

        Raises:
            DataError: the volume is constant or has voxels that are not finite.
            DiskError: the folder cannot be written, or the disk is full.
        """
        path = self._path(cache_key(extractor.identity, digest or voxel_digest(volume), volume.spacing))
        result = _read(path, extractor.spaces)
        if result is None:
            result = extractor.slices(volume) if isinstance(extractor, SliceExtractor) else extractor(volume)
            arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in result.items()}
            with atomic_path(path) as temporary:
                save_file(arrays, temporary, metadata={"sha256": _checksum(path.stem, arrays)})
        return mean_of_slices(result) if isinstance(extractor, SliceExtractor) else result

    def slices(self, extractor: SliceExtractor, space: str, digest: bytes, spacing: Sequence[float]) -> np.ndarray:
        """The (slices, d) features in one space that `features` has kept of a volume, which need not be read again.

        Args:
            extractor: of the slices.
            space: one of its spaces.
            digest: of the volume, from `voxel_digest`.
            spacing: of the volume.

        Raises:
            DataError: they are not in the folder, or are damaged.
        """
        path = self._path(cache_key(extractor.identity, digest, spacing))
        found = _read(path, extractor.spaces)
        if found is None:
            raise _unreadable(path, space)
        return found[space]

    def count_slices(self, extractor: SliceExtractor, space: str, digest: bytes, spacing: Sequence[float]) -> int:
        """The number of rows that `slices` will return, from the head of the file."""
        path = self._path(cache_key(extractor.identity, digest, spacing))
        try:
            with safe_open(path, "numpy") as file:
                return file.get_slice(space).get_shape()[0]
        except (OSError, SafetensorError):
            raise _unreadable(path, space) from None

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def voxel_digest(volume: Volume) -> bytes:
    """The SHA-256 of the voxels and their shape: equal for volumes that are equal to the bit."""
    array = np.ascontiguousarray(volume.array, "<f4")
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.data)
    return digest.digest()


def cache_key(identity: dict[str, object], digest: bytes, spacing: Sequence[float]) -> str:
    """SHA-256 of the identity of an extractor and of the digest and spacing of a volume."""
    content = {"identity": identity, "voxels": digest.hex(), "spacing": [float(size) for size in spacing]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unreadable(path: Path, space: str) -> DataError:
    why = f"the kept features '{space}' of a volume are missing or damaged"
    return DataError(why, path=path, fix="run the command again; all its processes need the same folder")


def _read(path: Path, spaces: dict[str, int]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it does not exist or is not exactly as it was written."""
    try:
        with safe_open(path, "numpy") as file:
            if set(file.keys()) != set(spaces):
                return None
            arrays = {name: file.get_tensor(name) for name in spaces}
            checksum = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return arrays if checksum == _checksum(path.stem, arrays) else None


def _checksum(key: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0" + arrays[name].tobytes())
    return digest.hexdigest()
