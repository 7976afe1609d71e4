"""Ops, bytes and FLOPs of a denoising step, a training step, its optimizer and a decode of the default model, on meta tensors.

    python benchmarks/op_counts.py            prints the table
    python benchmarks/op_counts.py --write    also writes benchmarks/counts.json; a test fails if a count exceeds it

All are at batch 1 and the latent of the default configuration (4 x 64 x 64 x 32), on the 16-bit paths of a GPU: the
reference under fp16 autocast with its weights already cast, ours with bf16 weights and with our kernels as single ops. A
training step is its forward and backward passes; the optimizer is everything after them, with an average of the weights in
ours. The decode is that of a GPU with enough memory for whole volumes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import reference
from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.models.autoencoder.tiling import run_plan
from ccella_fast.models.autoencoder.tiling_plan import GPU_SLAB_BYTES, make_tiling_plan
from ccella_fast.storage import write_json
from ccella_fast.training.flat_adamw import FlatAdamW
from op_counter import FlashAttention, HalfAutocast, backend, count, saved_bytes

FILE = Path(__file__).resolve().parent / "counts.json"


def counted(config: Config | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Count both steps: {step: {implementation: {ops, launches, bytes, flops, peak_bytes}}}, in training also saved_bytes."""
    config = config or Config()
    with torch.device("meta"):
        model = build_model(config)
        plain = reference.shared_with(model)
        ours = build_model(config).bfloat16()
    for module in plain.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = True  # MONAI refuses to enable it without a GPU
    with backend("triton,attention=sdpa"):  # the preferences on a GPU
        preferred = count(denoising_step(config, ours, FlashAttention(), torch.bfloat16)).summary()
    with backend("triton"):
        denoising = {
            "reference": count(denoising_step(config, plain, HalfAutocast(), torch.float32)).summary(),
            "ours": count(denoising_step(config, ours, FlashAttention(), torch.bfloat16)).summary(),
            "ours, PyTorch's attention": preferred,
        }
    with backend("triton,conv3d=reference"):  # cuDNN's convolutions in training, for which those of meta tensors stand
        return {
            "denoising step": denoising,
            "training step": {
                "reference": _training(config, plain, HalfAutocast(), torch.float32),
                "ours": _training(config, ours, FlashAttention(), torch.bfloat16),
            },
            "optimizer": {
                "reference": count(reference_optimizer_step(plain)).summary(),
                "ours": count(optimizer_step(config)).summary(),
            },
            "decode": {"ours": count(decode(config)).summary()},
        }


def _inputs(config: Config, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with torch.device("meta"):
        x = torch.empty(batch, sum(config.model.latent_channels), *config.check_grid(), dtype=dtype)
        text = torch.empty(batch, config.text.max_length, config.model.input_dim, dtype=dtype)
        return x, torch.zeros(batch), {"spacing": torch.zeros(batch, 3), "text": text}


def denoising_step(config: Config, model: Any, mode: Any, dtype: torch.dtype, batch: int = 1) -> Callable[[], Any]:
    """A step of the loop. The reference runs its adapter at every step; ours is precomputed, and in channels_last_3d."""
    x, timesteps, conditions = _inputs(config, dtype, batch)
    if not isinstance(model, reference.ReferenceModel):
        model, x = copy.deepcopy(model), x.contiguous(memory_format=torch.channels_last_3d)
        model.to(memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def step() -> None:
        with mode:
            if isinstance(model, reference.ReferenceModel):
                model(x, timesteps, **conditions)
            else:
                model.denoise(x, conditioning)

    with torch.no_grad(), mode:
        conditioning = None if isinstance(model, reference.ReferenceModel) else model.condition(timesteps, **conditions)
    step()  # work done once for the whole loop: casting, stacking and summing weights
    return step


def training_step(
    config: Config, model: Any, mode: Any, dtype: torch.dtype, batch: int = 1
) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The forward pass alone, and both passes."""
    x, timesteps, conditions = _inputs(config, dtype, batch)

    def forward() -> Tensor:
        with mode:
            return F.l1_loss(model(x, timesteps, **conditions)[0].float(), x.float())

    return forward, lambda: forward().backward()


def _training(config: Config, model: Any, mode: Any, dtype: torch.dtype) -> dict[str, int]:
    """Count the forward and backward passes."""
    forward, step = training_step(config, model, mode, dtype)
    kept = saved_bytes(forward)
    if isinstance(mode, HalfAutocast):
        mode.weights.clear()  # in training they are cast again at every step
    facts = count(step).summary()
    for parameter in model.parameters():
        parameter.grad = None
    return {**facts, "saved_bytes": kept}


def reference_optimizer_step(model: torch.nn.Module) -> Callable[[], Any]:
    """GradScaler, clipping and default AdamW in fp32, after the first step. Of GradScaler the multiplication is counted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step() -> None:
        parameters = list(model.parameters())
        torch._foreach_mul_([parameter.grad for parameter in parameters], 2.0**-16)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    step()
    return step


def optimizer_step(config: Config, batch: int = 1) -> Callable[[], Any]:
    """Our optimizer in bf16, from the gradients of the backward pass to the new weights and their average."""
    with torch.device("meta"):
        model = build_model(config)
    optimizer = FlatAdamW(
        model, dtype=torch.bfloat16, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, max_norm=1.0, rows=batch,
        sum_dtype=torch.bfloat16,
    )  # fmt: skip
    optimizer.average = torch.empty_like(optimizer.masters)
    norm_of = optimizer.norm

    def norm(factors: Any) -> Tensor:
        norm_of(factors)  # is counted; on meta tensors it has no value
        return torch.ones(())

    optimizer.norm = norm  # type: ignore[method-assign]

    def step() -> None:
        with torch.device("meta"):
            for module in model.modules():
                if getattr(module, "factors", None) is not None:
                    sizes = module.weight.shape
                    module.factors = [tuple(torch.empty(batch, size, dtype=torch.bfloat16) for size in sizes)]
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()

    return step


def decode(config: Config) -> Callable[[], Any]:
    """The decode of one volume in bf16 and channels_last_3d, as on a GPU."""
    with torch.device("meta"):
        vae = Autoencoder(config.autoencoder).bfloat16().to(memory_format=torch.channels_last_3d).requires_grad_(False)
        z = torch.empty(1, config.autoencoder.latent_channels, *config.check_grid(), dtype=torch.bfloat16)
    z = z.contiguous(memory_format=torch.channels_last_3d)
    convs = vae.decoder.tiled_convs()
    plan = make_tiling_plan(convs, tuple(z.shape[1:]), z.element_size(), 2**36, slab_bytes=GPU_SLAB_BYTES)
    return lambda: run_plan(convs, plan, vae.post_quant_conv(z))


def table(counts: dict[str, Any]) -> str:
    """The counts as a Markdown table."""
    lines = ["| | | ops | launches | GB moved | GFLOP | GB kept for backward |", "|---|---|---:|---:|---:|---:|---:|"]
    for step, implementations in counts.items():
        for name, row in implementations.items():
            kept = f"{row['saved_bytes'] / 1e9:.2f}" if "saved_bytes" in row else ""
            work = f"{row['ops']:,} | {row['launches']:,} | {row['bytes'] / 1e9:.2f} | {row['flops'] / 1e9:,.0f}"
            lines.append(f"| {step} | {name} | {work} | {kept} |")
    return "\n".join(lines)


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/counts.json")
    arguments = parser.parse_args()
    counts = counted()
    print(table(counts))
    if arguments.write:
        write_json(FILE, {"format": "ccella_fast.counts", "counts": counts})
        print(FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
