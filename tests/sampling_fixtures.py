"""A tiny checkpoint with an autoencoder, and an encoder of reports that needs no weights. Weights are drawn, not trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ccella_fast.checkpoint import write_manifest
from ccella_fast.config import make_config
from ccella_fast.models import build_model
from ccella_fast.models.vae import Autoencoder, save_autoencoder
from ccella_fast.storage import write_json

TOKENS, WIDTH = 6, 16
TINY: dict[str, Any] = {
    "model.num_channels": [8, 16], "model.attention_levels": [False, True], "model.num_head_channels": [0, 8],
    "model.num_res_blocks": 1, "model.norm_num_groups": 8, "model.cross_attention_dim": 16, "model.input_dim": WIDTH,
    "model.num_latents": 4, "model.adapter_blocks": 2, "model.adapter_heads": 2, "model.adapter_time_dim": 16,
    "model.class_head_dim": 8, "text.max_length": TOKENS,
    "autoencoder.num_channels": [8, 8], "autoencoder.num_res_blocks": [1, 1],
    "autoencoder.norm_num_groups": 4, "data.dim": [16, 12, 8], "data.spacing": [1.5, 1.5, 3.0],
    "sampling.solver": "ddim", "sampling.num_inference_steps": 5, "sampling.batch_size": 2,
}  # fmt: skip
THREE = {"data.sequences": ["t2w", "hbv", "adc"], "model.latent_channels": [4, 4, 4]}


class FakeEncoder:
    """Features that depend on the report. The null report is all zeros."""

    identity = {"encoder": "fake"}

    def encode(self, reports):
        rows = [
            np.random.default_rng(len(text)).standard_normal((TOKENS, WIDTH)) * min(1, len(text)) for text in reports
        ]
        return SimpleNamespace(features=np.stack(rows).astype(np.float32), truncated=[False] * len(rows))


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """Fresh networks predict zero; these do not."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.normal_(1, 0.1)
    return module


def write_checkpoint(folder: Path, variant: str = "CCELLA", *, with_vae: bool = True, **overrides: Any) -> Path:
    config = make_config(TINY | {"model.variant": variant} | overrides)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.dump())
    save_file(scrambled(build_model(config)).state_dict(), folder / "model.safetensors")
    count = len(config.data.sequences)
    state = {"step": 12, "scale_factor": [1.0 + 0.5 * k for k in range(count)], "intensity_scale": {"t2w": 700.0}}
    write_json(folder / "training_state.json", state)
    if with_vae:
        save_autoencoder(scrambled(Autoencoder(config.autoencoder)), folder / "vae")
    write_manifest(folder, step=12)
    return folder
