"""Features of RadImageNet's 2D ResNet-50 on the slices of a volume in three directions ("2.5D")."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.evaluation.features.preprocessing import check_volume, crop_or_pad, mean_of_slices, resample
from ccella_fast.models.feature_networks import check_hash, float32_inference, load_radimagenet, read_state_dict

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

KNOWN_FILES = {
    "08629f7e7bd3e29b8ee9522ca3f65ce4d010a7ddf74f0ea3c7e3f3d0bbab0734": "RadImageNet's own ResNet50.pt",
}

_INPUTS: dict[str, dict[str, object]] = {
    "ccella": {"grid": "own", "slices": "all", "intensities": "[0, 1] as they are"},
    "maisi": {
        "grid": "1 mm, linear, cropped or zero-padded to 512 x 512 x 512",
        "slices": "the central 40 %",
        "intensities": "min-max over the slices of a direction, minus 0.406, 0.456, 0.485 (blue, green, red)",
    },
    "official": {"grid": "own", "slices": "all, bilinear to 224 x 224", "intensities": "2 x - 1"},
}
_PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis across the slices of a volume in RAS
_MAISI_SIZE, _MAISI_SHARE = 512, 0.4
_MEAN = (0.406, 0.456, 0.485)
_PIXELS = 2**20  # in one pass of the network, so that memory does not grow with the number of slices


class RadImageNet:
    """Three spaces, `radimagenet-<input>-axial`, `-coronal`, `-sagittal`: the last map's mean over all slices, 2048 features.

    A volume is one row of a space. The reference of CCELLA (input `ccella`) and MAISI (input `maisi`) also compare each
    direction by itself, but make every slice a row: `slices` returns these rows, which `fd_slices` compares. The directions
    are their x, y, z and YZ, ZX, XY. The input `official` is that of the network's authors.

    Args:
        path: `RadImageNet-ResNet50_notop.pth` (converted from Keras) or `ResNet50.pt` (of the authors).
        input_name: `ccella`, `maisi` or `official`; default: `official` for the authors' file, `ccella` for the converted one.
        device: of the network.
        allow_unknown_weights: also accept a file with another SHA-256. No SHA-256 of the converted file is published.

    Raises:
        ConfigError: there is no such input.
        CheckpointError: the file is missing or damaged, has another SHA-256, or is of another architecture.
    """

    def __init__(
        self,
        path: str | Path,
        input_name: str | None = None,
        *,
        device: str = "cpu",
        allow_unknown_weights: bool = False,
    ):
        if input_name is not None and input_name not in _INPUTS:
            fix = did_you_mean(input_name, _INPUTS)
            raise ConfigError(f"'radimagenet' has no input called {input_name!r:.80}", field="features", fix=fix)
        fix = "copy the file again; if it is meant to be another one, allow unknown weights (--allow_unknown_weights)"
        digest = check_hash(path, KNOWN_FILES, field="features", fix=fix, allow_unknown=allow_unknown_weights)
        network, kind = load_radimagenet(read_state_dict(path), path, field="features")
        is_official = kind == "radimagenet-official"
        self._network = network.to(device)
        self._input = input_name or ("official" if is_official else "ccella")
        self._device = device
        self.spaces = {f"radimagenet-{self._input}-{plane}": 2048 for plane in ("axial", "coronal", "sagittal")}
        self.sequences: frozenset[str] | None = None
        self.identity: dict[str, object] = {
            "extractor": "radimagenet",
            "version": 1,
            "network": "ResNet-50 of the authors" if is_official else "ResNet-50 converted from Keras",
            "weights_sha256": digest,
            "input": self._input,
            "preprocessing": {"axes": "RAS", **_INPUTS[self._input]},
            "pooling": "mean of the last map, mean over the slices",
        }

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The features of one volume."""
        return mean_of_slices(self.slices(volume))

    def slices(self, volume: Volume) -> dict[str, np.ndarray]:
        """The (slices, 2048) float32 features of the single slices in each direction."""
        check_volume(volume)
        array = self._on_grid(volume)
        return {name: self._rows(array, name) for name in self.spaces}

    def _on_grid(self, volume: Volume) -> np.ndarray:
        array = volume.array.astype(np.float32, copy=False)
        if self._input != "maisi":
            return array
        # Padded slice by slice: 512 cubed takes half a gigabyte.
        return resample(array, volume.spacing, (1.0, 1.0, 1.0))

    def _rows(self, array: np.ndarray, space: str) -> np.ndarray:
        stack = np.moveaxis(array, _PLANES[space.rpartition("-")[2]], 0)
        with float32_inference():
            if self._input == "maisi":
                return self._maisi_rows(stack)
            return torch.cat([self._network(x).cpu() for x in self._images(stack)]).numpy()

    def _images(self, stack: np.ndarray) -> Iterator[Tensor]:
        """(n, 3, height, width) as the network takes it, few slices at a time."""
        size = 224 * 224 if self._input == "official" else stack[0].size
        for start in range(0, len(stack), max(1, _PIXELS // size)):
            part = np.ascontiguousarray(stack[start : start + max(1, _PIXELS // size)])
            x = torch.from_numpy(part)[:, None].to(self._device)
            if self._input == "official":
                x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False) * 2 - 1
            yield x.expand(-1, 3, -1, -1)

    def _maisi_rows(self, stack: np.ndarray) -> np.ndarray:
        """The rows of the central slices of the padded volume. All slices beyond the field of view are the same: one pass."""
        first, last = (int((1 + sign * _MAISI_SHARE) / 2 * _MAISI_SIZE) for sign in (-1, 1))
        offset = (_MAISI_SIZE - len(stack)) // 2 if len(stack) < _MAISI_SIZE else -((len(stack) - _MAISI_SIZE) // 2)
        places = np.arange(first, last) - offset
        inside = (places >= 0) & (places < len(stack))
        slices = crop_or_pad(stack[places[inside]], (int(inside.sum()), _MAISI_SIZE, _MAISI_SIZE))
        if not inside.all():
            slices = np.concatenate([slices, np.zeros_like(slices[:1])])
        low, high = slices.min(), slices.max()
        slices = (slices - low) / (high - low + 1e-10)
        mean = torch.tensor(_MEAN, device=self._device).view(1, 3, 1, 1)
        rows = torch.cat([self._network(x - mean).cpu() for x in self._images(slices)]).numpy()
        places_in_rows = np.full(len(places), len(rows) - 1)
        places_in_rows[inside] = np.arange(inside.sum())
        return rows[places_in_rows]
