"""What the cases share: device, configuration, shapes that follow from it, and models that are built once."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import reference
from ccella_fast.config import Config
from ccella_fast.environment import cpu_instructions
from ccella_fast.models import build_model
from ccella_fast.models.ldm import Denoiser
from ccella_fast.models.vae import Autoencoder

SEED = 0


class Workbench:
    """`config` is the full-size model. On a CPU each latent axis is halved: the reference's step then takes a second or two."""

    def __init__(self, device: torch.device, config: Config, tick: Callable[[str], None] = lambda text: None):
        self.device, self.config, self.tick = device, config, tick
        self.machine: dict[str, Any] = {}
        shrink = 2 if device.type == "cpu" else 1
        self.latent_grid = [size // shrink for size in config.check_grid()]
        self.latent_channels = sum(config.model.latent_channels)

    @property
    def fast_dtype(self) -> torch.dtype:
        """bf16 wherever the hardware multiplies it."""
        native = {"avx512_bf16", "amx_bf16"} & set(cpu_instructions())
        return torch.bfloat16 if self.device.type == "cuda" or native else torch.float32

    @property
    def fast_name(self) -> str:
        return "bf16" if self.fast_dtype is torch.bfloat16 else "fp32"

    @property
    def reference_precision(self) -> str:
        return "fp16" if self.device.type == "cuda" else "fp32"

    @cached_property
    def model(self) -> Denoiser:
        """fp32, random weights, none of them zero."""
        self.tick("building the model (575 M parameters at full size)")
        return self._ready(build_model, self.config)

    @cached_property
    def fast_model(self) -> Denoiser:
        return self.model if self.fast_dtype is torch.float32 else copy.deepcopy(self.model).to(self.fast_dtype)

    @cached_property
    def reference(self) -> reference.ReferenceModel:
        return reference.shared_with(self.model)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return self._ready(Autoencoder, self.config.autoencoder)

    @cached_property
    def fast_autoencoder(self) -> Autoencoder:
        return self.autoencoder if self.fast_dtype is torch.float32 else copy.deepcopy(self.autoencoder).bfloat16()

    @cached_property
    def reference_autoencoder(self) -> nn.Module:
        return reference.autoencoder_shared_with(self.autoencoder)

    def release(self) -> None:
        """Forget all models: a training case needs the memory."""
        for name in list(vars(self)):
            if isinstance(vars(self)[name], nn.Module):
                delattr(self, name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def random(self, *shape: int, seed: int = SEED) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def latent(self, batch: int, grid: list[int] | None = None) -> Tensor:
        return self.random(batch, self.latent_channels, *(grid or self.latent_grid))

    def conditions(self, batch: int) -> dict[str, Tensor]:
        """spacing and text, as the model takes them."""
        text, data = self.config.text, self.config.data
        features = self.random(batch, text.max_length, self.config.model.input_dim, seed=1)
        spacing = torch.tensor([data.spacing], device=self.device).expand(batch, -1) * 100
        return {"spacing": spacing, "text": features}

    def _ready(self, build: Callable[[Any], Any], config: Any) -> Any:
        torch.manual_seed(SEED)
        with self.device:
            module = build(config)
        self.fill_zeros(module)
        return module.eval().requires_grad_(False)

    @staticmethod
    def fill_zeros(module: nn.Module) -> None:
        """Random numbers where the initialisation has zeros: a fresh model predicts exactly zero, which proves nothing."""
        for parameter in module.parameters():
            if not parameter.any():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
                nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
