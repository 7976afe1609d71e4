"""The prostate network inside the package `lavlab-taps` 1.1.2 (MIT) as 3D feature extractor and gland segmenter for T2 images.

The package is installed without its requirements and never imported: its weight file is found by name, checked against its
SHA-256, read as bytes, and put into MONAI's `SegResNetDS`. The package says only that it is "a trained prostate MRI
segmentation model"; its training data, cohort and accuracy are not stated. For research.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.evaluation.features.onnx_tensors import read_onnx_tensors
from ccella_fast.evaluation.features.preprocessing import Window, along_axes, filter_matrix, gaussian
from ccella_fast.models.feature_networks import float32_inference
from ccella_fast.optional import require

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

PACKAGE = "lavlab-taps"
INSTALL = "pip install --no-deps lavlab-taps==1.1.2"
SHA256 = "1e39be9d19f6f71810cb0931a7fe895441cfd318d6002730c918ee99b9d79b91"
SPACING = (0.8, 0.8, 3.0)  # mm, in which the network was trained

_FEATURE_WINDOW = Window(
    SPACING, (96, 96, 16)
)  # 77 x 77 x 48 mm around the centre: the prostate and what is next to it
_SEGMENTER_WINDOW = Window(SPACING, (128, 128, 32))  # the network's own input
_LEVELS = {"taps-l3": 2, "taps-l4": 3}  # the encoder's last two levels of four, 128 and 256 channels
_BLUR, _THRESHOLD = 2.5, 0.55  # voxels and probability, of the package


def is_installed() -> bool:
    """Whether the package with the network is there."""
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Taps:
    """Two spaces: `taps-l3` (256 features, the headline) and `taps-l4` (512, the bottleneck).

    Mean and standard deviation of each channel over the central 77 x 77 x 48 mm. T2 images only. Level 3 reacts to fine
    degradation; the bottleneck was trained to ignore mild blur and noise.

    Args:
        device: of the network.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: its file is missing or is not that of version 1.1.2.
    """

    def __init__(self, *, device: str = "cpu"):
        self._encoder, self._device = load_network(device).get_submodule("encoder"), device
        self.spaces = {"taps-l3": 256, "taps-l4": 512}
        self.sequences: frozenset[str] | None = frozenset({"t2w"})
        self.identity: dict[str, object] = {
            "extractor": "taps",
            "version": 1,
            "network": f"{PACKAGE} 1.1.2, encoder levels 3 and 4",
            "weights_sha256": SHA256,
            "preprocessing": _FEATURE_WINDOW.identity,
            "pooling": "mean and standard deviation of each channel",
        }

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The features of one volume."""
        window = _FEATURE_WINDOW(volume)
        with float32_inference():
            levels = self._encoder(torch.from_numpy(window).to(self._device)[None, None])
        return {space: _pooled(levels[level]) for space, level in _LEVELS.items()}


class GlandSegmenter:
    """The whole prostate in a T2 image, as the package segments it, in one central window of 102 x 102 x 96 mm.

    Args:
        device: of the network.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: its file is missing or is not that of version 1.1.2.
    """

    sequences = frozenset({"t2w"})
    identity: dict[str, object] = {
        "segmenter": "taps",
        "version": 1,
        "weights_sha256": SHA256,
        "preprocessing": _SEGMENTER_WINDOW.identity,
        "mask": f"sigmoid of the logits blurred by {_BLUR} voxels > {_THRESHOLD}",
    }

    def __init__(self, *, device: str = "cpu"):
        self._network, self._device = load_network(device), device

    def logits(self, volume: Volume) -> np.ndarray:
        """What the network returns for the window, (128, 128, 32) float32."""
        window = _SEGMENTER_WINDOW(volume)
        with float32_inference():
            return self._network(torch.from_numpy(window).to(self._device)[None, None])[0, 0].cpu().numpy()

    def segment(self, volume: Volume) -> tuple[np.ndarray, tuple[float, float, float]]:
        """The gland's mask in the window, (128, 128, 32) bool, and the spacing of its voxels in mm.

        The window has the centre and the axes of the volume. Voxels beyond the field of view are never in the mask.
        """
        logits = self.logits(volume)
        blurred = along_axes(logits, [filter_matrix(size, gaussian(_BLUR)) for size in logits.shape])
        return 1 / (1 + np.exp(-blurred)) > _THRESHOLD, SPACING


@functools.cache
def load_network(device: str = "cpu") -> nn.Module:
    """The network for inference, (n, 1, X, Y, Z) -> logits of the same shape; each size has to be divisible by 8."""
    require("monai", "the network of the features 'taps' and the gland segmenter")
    from monai.networks.nets import SegResNetDS  # takes seconds to import

    path = _find_file()
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        why = f"this is not the network of {PACKAGE} 1.1.2: its SHA-256 is {found}, {SHA256} is expected"
        raise CheckpointError(why, path=path, field="features", fix=f"{INSTALL} --force-reinstall")
    norm = ("GROUP", {"num_groups": 8})
    # One head: the file has only the last of the four that were trained.
    with torch.device("meta"):
        network = SegResNetDS(3, 32, 1, 1, act=("MISH", {"inplace": True}), norm=norm, dsdepth=1)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in read_onnx_tensors(data).items()}
    network.load_state_dict(_with_monai_names(tensors, list(network.state_dict())), strict=True, assign=True)
    return network.eval().requires_grad_(False).to(device)


def _find_file() -> Path:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        why = f"the features 'taps' and the gland segmenter need the package {PACKAGE}, which is not installed"
        raise ConfigError(why, field="features", fix=INSTALL) from None
    path = Path(str(package.locate_file("taps/resources/model_v1.onnx")))
    if not path.is_file():
        why = f"the installed {PACKAGE} {package.version} does not have this file"
        raise CheckpointError(why, path=path, field="features", fix=f"{INSTALL} --force-reinstall")
    return path


def _with_monai_names(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Convolutions keep their names. Group norms are exported as `onnx::Mul_<n>` and `onnx::Add_<n+1>`, in execution order."""
    exported = sorted(
        (name for name in tensors if name.startswith("onnx::")), key=lambda n: int(re.findall(r"\d+", n)[0])
    )
    result = {name: tensor for name, tensor in tensors.items() if name not in exported}
    for name, source in zip([name for name in names if ".norm" in name], exported, strict=True):
        assert ("Mul" in source) == name.endswith("weight"), (name, source)
        result[name] = tensors[source].flatten()
    return result


def _pooled(level: Tensor) -> np.ndarray:
    """(1, C, X, Y, Z) -> (2 C,): the means, then the standard deviations."""
    voxels = level[0].flatten(1).double()
    return torch.cat([voxels.mean(1), voxels.std(1)]).float().cpu().numpy()
