"""The compiled baseline: the reference's model with the optimizations that PyTorch itself offers.

MONAI's U-Net and the plain adapter in bf16, with channels-last-3d, attention through cuDNN or flash, torch.compile in mode
max-autotune (which captures CUDA graphs) with forced layout optimization, timesteps and coefficients on the device before the
loop, and fused AdamW. On a CPU the model is not compiled, which would take minutes and gain next to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
from ccella_fast.config import SchedulerConfig
from ccella_fast.models.ldm import DiffusionModel

_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def best_attention(device: torch.device) -> Any:
    """A context in which attention prefers cuDNN and flash kernels; on a CPU it does nothing."""
    return sdpa_kernel(_ATTENTION, set_priority=True) if device.type == "cuda" else nullcontext()


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model compiled on a GPU, unchanged on a CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return model
    import torch._inductor.config as inductor

    inductor.force_layout_optimization = True  # by default Inductor leaves narrow convolutions in NCDHW
    network = torch.compile(model.to(memory_format=torch.channels_last_3d), mode="max-autotune", dynamic=False)

    def call(*arguments: Any, **conditions: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # of this baseline only
            return network(*arguments, **conditions)

    return call


class CompiledSampler:
    """The DDPM loop around the compiled network, with weights of `dtype`."""

    def __init__(self, model: DiffusionModel, config: SchedulerConfig, dtype: torch.dtype):
        plain = reference.shared_with(model)
        for module in plain.modules():
            if hasattr(module, "use_flash_attention"):
                module.use_flash_attention = True  # PyTorch's attention, which runs on CPUs too
                module.attention_dtype = None  # no cast of q and k to fp32; in the reference autocast undoes it
        self.network = compiled(copy.deepcopy(plain).to(dtype))
        self.device, self.config, self.dtype = next(model.parameters()).device, config, dtype

    @torch.no_grad()
    def __call__(
        self, x: Tensor, *, spacing: Tensor, text: Tensor, num_inference_steps: int, source: torch.Generator
    ) -> Tensor:
        """From noise x (1, C, X, Y, Z) to x_0, with step noise from `source`."""
        scheduler, model_timesteps = reference.scheduler(self.config, num_inference_steps)
        timesteps = torch.tensor(model_timesteps, dtype=torch.float32, device=self.device)[:, None].expand(-1, len(x))
        rows = torch.tensor([_coefficients(scheduler, int(t)) for t in scheduler.timesteps], device=self.device)
        spacing, text = spacing.to(self.dtype), text.to(self.dtype)
        with best_attention(self.device):
            for step in range(num_inference_steps):
                noise, _ = self.network(x.to(self.dtype), timesteps[step], spacing=spacing, text=text)
                a, b, c = rows[step].unbind()
                x = a * x + b * noise.float()
                if step < num_inference_steps - 1:
                    x = x + c * torch.randn(x.shape, generator=source, device=self.device)
        return x


def _coefficients(scheduler: Any, t: int) -> list[float]:
    """The coefficients of MONAI's DDPM step as x' = a x + b eps + c noise."""
    abar, alpha, beta = (float(table[t]) for table in (scheduler.alphas_cumprod, scheduler.alphas, scheduler.betas))
    before = float(scheduler.alphas_cumprod[t - 1]) if t > 0 else 1.0
    clean, noisy = before**0.5 * beta / (1 - abar), alpha**0.5 * (1 - before) / (1 - abar)
    variance = (1 - before) / (1 - abar) * beta
    return [clean / abar**0.5 + noisy, -clean * ((1 - abar) / abar) ** 0.5, max(variance, 1e-20) ** 0.5]


class CompiledTrainingStep(reference.ReferenceTrainingStep):
    """A training step of the compiled network in bf16 autocast over fp32 weights, with fused AdamW and without a GradScaler."""

    def __init__(self, model: reference.ReferenceModel, config: SchedulerConfig, *, weight: float):
        super().__init__(model, config, weight=weight)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.rate = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=100_000, power=2.0)
        self.network = compiled(model)

    def forward(self, *arguments: Any, **conditions: Any) -> Any:
        """The compiled network's forward pass."""
        with best_attention(self.device):
            return self.network(*arguments, **conditions)

    def autocast(self) -> torch.autocast:
        """Autocast to bf16."""
        return torch.autocast(self.device.type, torch.bfloat16)
