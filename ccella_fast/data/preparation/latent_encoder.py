"""Encoding of images to latents: mean and sigma of the posterior, and the variance that gives the scale factor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.config import AutoencoderConfig, Config
from ccella_fast.data.readers.nifti import read_nifti_array
from ccella_fast.errors import CheckpointError, DataError
from ccella_fast.storage import sha256


class LatentEncoder:
    """The encoder of an autoencoder, in float32 on the CPU and with bf16 autocast on the GPU.

    Whole volumes are encoded at full resolution: the activations of 256 x 256 x 128 voxels at MAISI's width take tens of GB.

    Args:
        vae: a VAE folder, or a `.pt` file of the upstream code.
        config: configuration of the autoencoder.
        device: where to encode; None selects the GPU if there is one.

    Attributes:
        sha256: SHA-256 of the weights.
    """

    def __init__(self, vae: str | Path, config: AutoencoderConfig, device: Any = None):
        import torch

        from ccella_fast.models.autoencoder import load_autoencoder, weights_file

        self._torch = torch
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._vae = load_autoencoder(vae, config).to(self._device)
        self._file = weights_file(vae)
        self.sha256 = sha256(self._file)

    def encode(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode one image.

        Args:
            image: (X, Y, Z) float32 in [0, 1].

        Returns:
            Mean and sigma of the posterior, each (C, X', Y', Z') float32.
        """
        mean, sigma = self.posterior(self._torch.from_numpy(np.array(image))[None, None])
        return mean[0].cpu().numpy(), sigma[0].cpu().numpy()

    def posterior(self, volumes: Any) -> tuple[Any, Any]:
        """Encode a batch of images.

        Args:
            volumes: tensor (B, 1, X, Y, Z) float32 in [0, 1].

        Returns:
            Mean and sigma of the posterior, tensors (B, C, X', Y', Z') float32 on the encoder's device.

        Raises:
            CheckpointError: the autoencoder produced non-finite values.
        """
        torch = self._torch
        kind = self._device.type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            mean, sigma = (part.float() for part in self._vae.encode(volumes.to(self._device)))
        if not bool(mean.isfinite().all() & sigma.isfinite().all()):
            why, fix = (
                "the autoencoder produced values that are not finite",
                "use another autoencoder or train it again",
            )
            raise CheckpointError(why, path=self._file, field="--vae", fix=fix)
        return mean, sigma

    def save(self, folder: Path) -> None:
        """Save the weights next to the latents that they produced, so that training can include them in its checkpoints."""
        from ccella_fast.models.autoencoder import save_autoencoder

        save_autoencoder(self._vae, folder)


def import_latent(path: Path, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Read a latent that the upstream code wrote, an `_emb.nii.gz` file with axes (X, Y, Z, C).

    Returns:
        The latent as (C, X, Y, Z) float32, and the affine of the image, which the file contains.

    Raises:
        DataError: the shape does not match the configuration, or a value is not finite.
    """
    array, affine = read_nifti_array(path, dimensions=4)
    latent = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    expected = (config.autoencoder.latent_channels, *config.check_grid())
    if latent.shape != expected:
        why = f"the latent is {latent.shape}, but data.dim and the autoencoder require {expected}"
        raise DataError(why, path=path, field="dim", fix="set data.dim to the grid of the images")
    if not np.isfinite(latent).all():
        raise DataError(
            "the latent contains values that are not finite", path=path, field="voxels", fix="encode the image again"
        )
    return latent, affine


def moments(mean: np.ndarray, sigma: np.ndarray | None) -> dict[str, float]:
    """The float64 statistics of one study for `combine_moments`: count, mean, sum of squared deviations, sum of sigma squared.

    Args:
        mean: mean of the posterior, any shape.
        sigma: standard deviation of the posterior; None counts as 0.
    """
    values = mean.astype(np.float64)
    center = float(values.mean())
    noise = 0.0 if sigma is None else float(np.square(sigma.astype(np.float64)).sum())
    return {"count": values.size, "mean": center, "m2": float(np.square(values - center).sum()), "sigma2": noise}


def combine_moments(parts: Iterable[dict[str, Any]]) -> float:
    """The variance over all elements of latents that are sampled as mean + sigma * noise.

    It is the unbiased variance of the means over all elements plus the mean of sigma squared, which is exactly the expectation
    of the unbiased variance of a sample. The statistics of the studies are combined as in Chan et al. 1979.

    Raises:
        DataError: the variance is not positive and finite.
    """
    count, center, m2, noise = 0, 0.0, 0.0, 0.0
    for part in parts:
        total = count + part["count"]
        delta = part["mean"] - center
        m2 += part["m2"] + delta**2 * count * part["count"] / total
        center += delta * part["count"] / total
        noise += part["sigma2"]
        count = total
    variance = m2 / (count - 1) + noise / count
    if not (math.isfinite(variance) and variance > 0):
        raise DataError(
            f"the variance of the latents must be positive and finite, got {variance}",
            field="scale_factor",
            fix="train the autoencoder again",
        )
    return variance
