"""A folder of feature vectors, found again by what they were computed from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ccella_fast.evaluation.features.extractor import Extractor
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

    def features(self, extractor: Extractor, volume: Volume) -> dict[str, np.ndarray]:
        """What `extractor(volume)` returns, from the folder if it is there.

        Raises:
            DataError: the volume is constant or has voxels that are not finite.
            DiskError: the folder cannot be written, or the disk is full.
        """
        path = self.folder / f"{cache_key(extractor, volume)}.safetensors"
        found = _read(path, extractor.spaces)
        if found is not None:
            return found
        result = extractor(volume)
        arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in result.items()}
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata={"sha256": _checksum(path.stem, arrays)})
        return result


def cache_key(extractor: Extractor, volume: Volume) -> str:
    """SHA-256 of the voxels, shape and spacing of `volume` and of the identity of `extractor`."""
    header = {
        "shape": list(volume.array.shape),
        "spacing": [float(size) for size in volume.spacing],
        "identity": extractor.identity,
    }
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(volume.array, "<f4").data)
    return digest.hexdigest()


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
