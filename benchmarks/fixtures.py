"""The workbench of the cases: device, configuration, the shapes that follow from it, and models that are built once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import reference
from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.models.ldm import DiffusionModel
from ccella_fast.sampling import FastSampler
from ccella_fast.sampling.optimizations import resolve_dtype
from ccella_fast.variants import SPACING_SCALE

SEED = 0


class Workbench:
    """Device, configuration and models for the cases of a run.

    On a CPU each latent axis is halved, so that a step of the reference takes a second or two; on a slow CPU with a time limit
    it is divided by four (`budget.py`).

    Args:
        device: The device to measure.
        config: Of the full-size model, or of a small one in tests.
        on_progress: Called with a description of the work under way.
    """

    def __init__(self, device: torch.device, config: Config, on_progress: Callable[[str], None] = lambda text: None):
        self.device, self.config, self.on_progress = device, config, on_progress
        self.machine: dict[str, Any] = {}
        self.shrink = 2 if device.type == "cpu" else 1
        self.latent_channels = sum(config.model.latent_channels)

    @property
    def latent_grid(self) -> list[int]:
        """Axes of the latent that the cases use."""
        return [size // self.shrink for size in self.config.check_grid()]

    @property
    def fast_dtype(self) -> torch.dtype:
        """The default of `FastSampler`: bf16 if the hardware multiplies it."""
        return resolve_dtype("auto", self.device)

    @property
    def fast_name(self) -> str:
        """The name of `fast_dtype`: "bf16" or "fp32"."""
        return "bf16" if self.fast_dtype is torch.bfloat16 else "fp32"

    @property
    def reference_precision(self) -> str:
        """The precision of the reference's policy on this device."""
        return "fp16" if self.device.type == "cuda" else "fp32"

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_model(self.config).parameters())

    @cached_property
    def model(self) -> DiffusionModel:
        """The model in fp32 with random weights; no parameter is zero."""
        self.on_progress(f"building the model ({self.parameters / 1e6:.0f} M parameters)")
        return self._ready(build_model, self.config)

    @cached_property
    def sampler(self) -> FastSampler:
        """The sampler with its defaults."""
        return FastSampler(self.model, self.autoencoder, config=self.config)

    @cached_property
    def sampler_fp32(self) -> FastSampler:
        """The sampler with fp32 weights."""
        return FastSampler(self.model, self.autoencoder, config=self.config, dtype="float32")

    @property
    def samplers(self) -> dict[str, tuple[str, FastSampler]]:
        """Name -> (precision, sampler): the default, preceded by one in fp32 if only the reference computes in fp32."""
        ours = {"ours": (self.fast_name, self.sampler)}
        equal = self.fast_name == "fp32" or self.reference_precision != "fp32"
        return ours if equal else {"ours fp32": ("fp32", self.sampler_fp32), **ours}

    @cached_property
    def reference(self) -> reference.ReferenceModel:
        """The reference on the weights of `model`."""
        return reference.shared_with(self.model)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Our autoencoder in fp32 with random weights."""
        return self._ready(Autoencoder, self.config.autoencoder)

    @cached_property
    def reference_autoencoder(self) -> nn.Module:
        """MONAI's autoencoder on the weights of `autoencoder`."""
        return reference.autoencoder_shared_with(self.autoencoder)

    def release(self) -> None:
        """Free all models: a training case needs the memory."""
        for name in list(vars(self)):
            if isinstance(vars(self)[name], (nn.Module, FastSampler)):
                delattr(self, name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def random(self, *shape: int, seed: int = SEED) -> Tensor:
        """Normal random numbers, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def latent(self, batch: int, grid: list[int] | None = None) -> Tensor:
        """A random latent (B, C, X, Y, Z), by default on `latent_grid`."""
        return self.random(batch, self.latent_channels, *(grid or self.latent_grid))

    def conditions(self, batch: int, seed: int = 1) -> dict[str, Tensor]:
        """Random `spacing` (B, 3), in mm x 100, and `text` (B, L, E) as the model takes them."""
        text, data = self.config.text, self.config.data
        features = self.random(batch, text.max_length, self.config.model.input_dim, seed=seed)
        spacing = torch.tensor([data.spacing], device=self.device).expand(batch, -1) * SPACING_SCALE
        return {"spacing": spacing, "text": features}

    def _ready(self, build: Callable[[Any], Any], config: Any) -> Any:
        torch.manual_seed(SEED)
        with self.device:
            module = build(config)
        self.fill_zeros(module)
        return module.eval().requires_grad_(False)

    @staticmethod
    def fill_zeros(module: nn.Module) -> None:
        """Replace parameters that are all zero by random ones: a fresh model predicts exactly zero, whatever it computes."""
        for parameter in module.parameters():
            if not parameter.any():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
                nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
