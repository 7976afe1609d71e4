"""Features of MedicalNet's 3D ResNet-50, whose weights are in a file of the user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.evaluation.features.preprocessing import check_volume, standardise
from ccella_fast.models.feature_networks import check_hash, float32_inference, load_medicalnet, read_state_dict

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

KNOWN_FILES = {
    "ff48a62219073fb977fd3f4ddfb8dc1367f0ec156c8d6f6c37e205bd683a246e": "MedicalNet's resnet_50_23dataset.pth",
}
_INPUTS = {
    "ccella": "the window's intensities, [0, 1], as they are",
    "medicalnet": "z-score over non-zero voxels",
}


class MedicalNet:
    """One space, `medicalnet-<input>`: the spatial mean of the last map, 2048 features, of the volume on its own grid.

    The reference of CCELLA compares these features, in float16, of images in [0, 1]: the input `ccella`. MedicalNet was trained
    on z-scores over non-zero voxels: the input `medicalnet`. Both take every volume on its own grid, so distances are between
    sets on the same grid only.

    Args:
        path: `resnet_50_23dataset.pth`.
        input_name: `ccella` or `medicalnet`.
        device: of the network.
        allow_unknown_weights: also accept a file with another SHA-256.

    Raises:
        ConfigError: there is no such input.
        CheckpointError: the file is missing or damaged, has another SHA-256, or is of another architecture.
    """

    def __init__(
        self,
        path: str | Path,
        input_name: str = "ccella",
        *,
        device: str = "cpu",
        allow_unknown_weights: bool = False,
    ):
        if input_name not in _INPUTS:
            fix = did_you_mean(input_name, _INPUTS)
            raise ConfigError(f"'medicalnet' has no input called {input_name!r:.80}", field="features", fix=fix)
        fix = "copy the file again; if it is meant to be another one, allow unknown weights (--allow_unknown_weights)"
        digest = check_hash(path, KNOWN_FILES, field="features", fix=fix, allow_unknown=allow_unknown_weights)
        self._network = load_medicalnet(read_state_dict(path), path, field="features").to(device)
        self._device, self._input = device, input_name
        self._space = f"medicalnet-{input_name}"  # distances of different inputs cannot be compared
        self.spaces = {self._space: 2048}
        self.sequences: frozenset[str] | None = None
        self.identity: dict[str, object] = {
            "extractor": "medicalnet",
            "version": 1,
            "network": "3D ResNet-50, strides 1 2 1 1, dilations 1 1 2 4",
            "weights_sha256": digest,
            "input": input_name,
            "preprocessing": {"axes": "RAS", "grid": "own", "intensities": _INPUTS[input_name]},
            "pooling": "mean of the last map",
        }

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The features of one volume."""
        check_volume(volume)
        array = volume.array.astype(np.float32, copy=False)
        if self._input == "medicalnet":
            array = standardise(array, volume.id)
        with float32_inference():
            x = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
            return {self._space: self._network(x[None, None])[0].cpu().numpy()}
