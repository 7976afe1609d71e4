"""Reconstruction error of the autoencoder on whole volumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.progress import refresh_interval
from ccella_fast.storage import atomic_path
from ccella_fast.training.autoencoder.patches import Image

NUM_EXAMPLES = 4  # reconstructions that are written, for the report


@torch.no_grad()
def evaluate(vae: Autoencoder, images: list[Image], out: Path, device: torch.device) -> dict[str, Any]:
    """Decode each volume from its posterior mean, in fp32, and measure the error.

    The first `NUM_EXAMPLES` reconstructions are written to `out/<case>/<sequence>.npy`, float32 in [0, 1].

    Returns:
        The number of volumes, and the means over them of L1 and PSNR (in dB, for a peak of 1).
    """
    vae.eval()
    l1, psnr = [], []
    bar = tqdm(images, desc="reconstructing", unit="volume", mininterval=refresh_interval())
    for number, image in enumerate(bar):
        x = torch.from_numpy(np.array(image.values))[None, None].to(device)
        decoded = vae.decode(vae.encode(x)[0]).clamp(0, 1)
        l1.append(float((decoded - x).abs().mean(dtype=torch.float64)))
        psnr.append(-10 * math.log10(max(1e-12, float((decoded - x).square().mean(dtype=torch.float64)))))
        if number < NUM_EXAMPLES:
            with atomic_path(out / image.case / f"{image.sequence}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, decoded[0, 0].cpu().numpy(), allow_pickle=False)
    return {"volumes": len(images), "l1": round(float(np.mean(l1)), 5), "psnr": round(float(np.mean(psnr)), 2)}
