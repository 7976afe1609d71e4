"""A prepared folder of random numbers at the sizes of a configuration, for training steps without studies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccella_fast.config import Config
from ccella_fast.storage import sha256, write_json


def write_prepared(folder: Path, config: Config, *, cases: int) -> Path:
    """Write `cases` training cases with latents of one sequence, report features and classes; returns `folder`."""
    random = np.random.default_rng(0)
    latent = (config.autoencoder.latent_channels, *config.check_grid())
    sequence, text = config.data.sequences[0], config.text
    entries = []
    for number in range(cases):
        name = f"case{number:03d}"
        arrays = {
            f"latent_mean/{sequence}": (f"latents/{name}/mean.npy", latent),
            f"latent_sigma/{sequence}": (f"latents/{name}/sigma.npy", latent),
            "text": (f"text/{name}.npy", (text.max_length, config.model.input_dim)),
        }
        files = {}
        for key, (file, shape) in arrays.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            scale = 0.1 if "sigma" in key else 1.0
            np.save(path, scale * np.abs(random.standard_normal(shape, dtype=np.float32)))
            files[key] = {"path": file, "sha256": sha256(path), "bytes": path.stat().st_size}
        entries.append(
            {
                "id": name, "split": "train", "dataset": None, "spacing": config.data.spacing,
                "pirads": [[1, 0], [0, 1]][number % 2], "text_isnull": 0,
                "affine": np.diag([*config.data.spacing, 1.0]).tolist(), "window": {sequence: [0.0, 1.0]},
                "files": files,
            }
        )  # fmt: skip
    write_json(
        folder / "manifest.json",
        {
            "format": "ccella_fast.prepared", "version": 1,
            "data": config.data.model_dump(mode="json", include={"sequences", "spacing", "dim", "dataset"}),
            "text": {
                "encoder": text.encoder, "revision": text.revision, "max_length": text.max_length, "dtype": text.dtype,
                "width": config.model.input_dim, "fingerprint": "imported",
            },
            "vae": {"sha256": "0" * 64}, "scale_factor": [1.0], "intensity_scale": {sequence: 1.0},
            "truncated_reports": [], "cases": entries,
        },
    )  # fmt: skip
    return folder
