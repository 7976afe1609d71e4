"""The generator's autoencoder: what a latent diffusion model could reach at best, and copies in its latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ccella_fast.data.manifest import NAME, Manifest, StudyEntry
from ccella_fast.errors import CheckpointError, DataError
from ccella_fast.evaluation.volumes import Volume, VolumeSet
from ccella_fast.models.autoencoder import Autoencoder, load_autoencoder
from ccella_fast.models.autoencoder.folder import weights_file
from ccella_fast.storage import sha256

LATENT = "latent"  # the space of `LatentFeatures`
_PARTS = (8, 8, 4)  # of a volume, in which latents are averaged


def reconstructions(volumes: VolumeSet, vae: str | Path, *, device: str = "cpu") -> VolumeSet:
    """The volumes of a prepared folder, decoded one at a time from the posterior means that it holds, and clipped to [0, 1].

    Args:
        volumes: of a prepared folder.
        vae: as for `load_autoencoder`.
        device: that decodes.

    Raises:
        CheckpointError: the autoencoder is missing or damaged, or is not the one whose latents the folder holds.
        DataError: the folder is not a prepared one, or holds no latents.
    """
    manifest = volumes.manifest
    if manifest is None:
        why = "only a prepared folder holds the latents that the autoencoder decodes, and this is not one"
        raise DataError(
            why, path=volumes.path, field="--vae", fix="give a prepared folder as --real, or leave out --vae"
        )
    if manifest.vae is None:
        fix = f"run `ccella-fast prepare --vae {vae} --out {volumes.path}`, or leave out --vae"
        raise DataError("this prepared folder holds no latents", path=volumes.path / NAME, field="vae", fix=fix)
    network = load_autoencoder(vae)
    if sha256(weights_file(vae)) != manifest.vae.sha256:
        why = "the latents of the prepared folder are of another autoencoder"
        raise CheckpointError(why, path=vae, field="--vae", fix=f"give the one with which {volumes.path} was prepared")
    network.to(device)
    cases = {case.id: case for case in manifest.cases}
    sources = [
        source._replace(read=partial(_decode, network, manifest, cases[source.id], source.sequence, device))
        for source in volumes.sources
    ]
    return VolumeSet(f"{volumes.name}, reconstructed", sources, volumes.path, "decoded, clipped to [0, 1]", manifest)


class LatentFeatures:
    """Latents as features, to look for copies in them; the generator lives in this space, so distances there do not judge it.

    Args:
        vae: as for `load_autoencoder`.
        device: that encodes.

    Attributes:
        spaces: "latent", the posterior mean of each channel, averaged over 8 x 8 x 4 equal parts of the volume.
        sequences: None, which means all.
        identity: the weights' SHA-256 and the pooling.
    """

    sequences: frozenset[str] | None = None

    def __init__(self, vae: str | Path, *, device: str = "cpu"):
        self._network, self._device = load_autoencoder(vae).to(device), device
        channels = self._network.config.latent_channels
        self.spaces = {LATENT: channels * int(np.prod(_PARTS))}
        self.identity: dict[str, object] = {
            "extractor": "latent", "version": 1, "weights_sha256": sha256(weights_file(vae)), "preprocessing": "none",
            "pooling": f"means of {_PARTS} parts",
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The features of one volume."""
        image = torch.from_numpy(np.ascontiguousarray(volume.array, np.float32))[None, None].to(self._device)
        mean = self._network.encode(image)[0]
        return {LATENT: torch.nn.functional.adaptive_avg_pool3d(mean, _PARTS).flatten().cpu().numpy()}


@torch.no_grad()
def _decode(
    network: Autoencoder, manifest: Manifest, case: StudyEntry, sequence: str, device: str
) -> tuple[np.ndarray, Sequence[float]]:
    latent = np.array(manifest.array(case, f"latent_mean/{sequence}", verify=True))
    decoded = network.decode(torch.from_numpy(latent)[None].to(device))
    return decoded[0, 0].clamp(0, 1).cpu().numpy(), case.spacing
