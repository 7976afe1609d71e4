"""Images to latents: the posterior's mean and sigma, and the scale factor over the whole training set."""

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
    """`encode(image)` with the weights at `vae` (a VAE folder or a reference `.pt`); sha256: of these weights.
    device: None, the GPU if there is one.

    Float32 on the CPU, bf16 autocast on the GPU. Activations of a whole volume at its full resolution are held: 256 x 256 x 128
    voxels at MAISI's width take tens of GB."""

    def __init__(self, vae: str | Path, config: AutoencoderConfig, device: Any = None):
        import torch

        from ccella_fast.models.autoencoder import load_autoencoder, weights_file

        self._torch = torch
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._vae = load_autoencoder(vae, config).to(self._device)
        self._file = weights_file(vae)
        self.sha256 = sha256(self._file)

    def encode(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(X, Y, Z) float32 in [0, 1] -> mean, sigma (C, X', Y', Z') float32."""
        mean, sigma = self.posterior(self._torch.from_numpy(np.array(image))[None, None])
        return mean[0].cpu().numpy(), sigma[0].cpu().numpy()

    def posterior(self, volumes: Any) -> tuple[Any, Any]:
        """Tensors: (B, 1, X, Y, Z) float32 in [0, 1] -> mean, sigma (B, C, X', Y', Z') float32, on the encoder's device."""
        torch = self._torch
        kind = self._device.type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            mean, sigma = (part.float() for part in self._vae.encode(volumes.to(self._device)))
        if not bool(mean.isfinite().all() & sigma.isfinite().all()):
            why, fix = "the autoencoder gives values that are not finite", "use another, or train it again"
            raise CheckpointError(why, path=self._file, field="--vae", fix=fix)
        return mean, sigma

    def save(self, folder: Path) -> None:
        """Keep these weights beside the latents that they made, so that training can put them into its checkpoints."""
        from ccella_fast.models.autoencoder import save_autoencoder

        save_autoencoder(self._vae, folder)


def import_latent(path: Path, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The reference's `_emb.nii.gz`, axes (X, Y, Z, C), as (C, X, Y, Z) float32, and the image's affine that it carries."""
    array, affine = read_nifti_array(path, dimensions=4)
    latent = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    expected = (config.autoencoder.latent_channels, *config.check_grid())
    if latent.shape != expected:
        why = f"the latent is {latent.shape}, data.dim and the autoencoder give {expected}"
        raise DataError(why, path=path, field="dim", fix="set data.dim to the images' grid")
    if not np.isfinite(latent).all():
        raise DataError("the latent is not finite", path=path, field="voxels", fix="encode the image again")
    return latent, affine


def moments(mean: np.ndarray, sigma: np.ndarray | None) -> dict[str, float]:
    """What `combine_moments` needs of one study, in float64: count, mean, sum of squared deviations, sum of sigma squared."""
    values = mean.astype(np.float64)
    centre = float(values.mean())
    noise = 0.0 if sigma is None else float(np.square(sigma.astype(np.float64)).sum())
    return {"count": values.size, "mean": centre, "m2": float(np.square(values - centre).sum()), "sigma2": noise}


def combine_moments(parts: Iterable[dict[str, Any]]) -> float:
    """The variance of all latents as they are drawn, mean + sigma * noise: the unbiased variance of the means over all elements
    plus the mean of sigma squared (exactly the expectation of the drawn sample's unbiased variance). Chan et al. 1979."""
    count, centre, m2, noise = 0, 0.0, 0.0, 0.0
    for part in parts:
        total = count + part["count"]
        delta = part["mean"] - centre
        m2 += part["m2"] + delta**2 * count * part["count"] / total
        centre += delta * part["count"] / total
        noise += part["sigma2"]
        count = total
    variance = m2 / (count - 1) + noise / count
    if not (math.isfinite(variance) and variance > 0):
        raise DataError(
            f"the latents have variance {variance}", field="scale_factor", fix="train the autoencoder again"
        )
    return variance
