"""Ops, bytes and FLOPs of the default model's denoising step and training step, counted on meta tensors: no time, no noise.

    python benchmarks/op_counts.py            the table
    python benchmarks/op_counts.py --write    also benchmarks/counts.json, which a test holds: it may fall, never rise

Both at batch 1 and the latent of the default configuration (4 x 64 x 64 x 32), in the 16-bit form that a GPU runs: the
reference under fp16 autocast with its weights already cast, ours with bf16 weights and our kernels as the ops they are on a
GPU. The optimizer is not counted.
"""

from __future__ import annotations

import argparse
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
from ccella_fast.storage import write_json
from op_counter import Counts, FlashAttention, HalfAutocast, backend, count, saved_bytes

FILE = Path(__file__).resolve().parent / "counts.json"


def counted(config: Config | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """{step: {"reference" | "ours": {ops, bytes, flops, peak_bytes}}}."""
    config = config or Config()
    with torch.device("meta"):
        model = build_model(config)
        theirs = reference.shared_with(model)
        ours = build_model(config).bfloat16()
    for module in theirs.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = True  # which MONAI refuses to switch on where there is no GPU
    with backend("triton"):
        return {
            "denoising step": {
                "reference": _denoising(config, theirs, HalfAutocast(), torch.float32).summary(),
                "ours": _denoising(config, ours, FlashAttention(), torch.bfloat16).summary(),
            },
            "training step": {
                "reference": _training(config, theirs, HalfAutocast(), torch.float32),
                "ours": _training(config, ours, FlashAttention(), torch.bfloat16),
            },
        }


def _inputs(config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with torch.device("meta"):
        x = torch.empty(1, sum(config.model.latent_channels), *config.check_grid(), dtype=dtype)
        text = torch.empty(1, config.text.max_length, config.model.input_dim, dtype=dtype)
        return x, torch.zeros(1), {"spacing": torch.zeros(1, 3), "text": text}


def _denoising(config: Config, model: Any, mode: Any, dtype: torch.dtype) -> Counts:
    """The reference runs its adapter at every step; ours has computed it before the loop."""
    x, timesteps, conditions = _inputs(config, dtype)
    with torch.no_grad(), mode:
        if isinstance(model, reference.ReferenceModel):
            run: Callable[[], Any] = lambda: model(x, timesteps, **conditions)  # noqa: E731
        else:
            conditioning = model.condition(timesteps, **conditions)
            run = lambda: model.denoise(x, conditioning)  # noqa: E731
        run()  # what happens once for the whole loop: casting weights, summing the upsamplers' taps
        return count(run)


def _training(config: Config, model: Any, mode: Any, dtype: torch.dtype) -> dict[str, int]:
    """Forward and backward."""
    x, timesteps, conditions = _inputs(config, dtype)

    def forward() -> Tensor:
        return F.l1_loss(model(x, timesteps, **conditions)[0].float(), x.float())

    def step() -> None:
        with mode:
            loss = forward()
        loss.backward()

    with mode:
        kept = saved_bytes(forward)
    if isinstance(mode, HalfAutocast):
        mode.weights.clear()  # in training they are cast anew at every step
    facts = count(step).summary()
    for parameter in model.parameters():
        parameter.grad = None
    return {**facts, "saved_bytes": kept}


def table(counts: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | | ops | GB moved | GFLOP | GB kept for backward |", "|---|---|---:|---:|---:|---:|"]
    for step, sides in counts.items():
        for side, row in sides.items():
            kept = f"{row['saved_bytes'] / 1e9:.2f}" if "saved_bytes" in row else ""
            lines.append(
                f"| {step} | {side} | {row['ops']:,} | {row['bytes'] / 1e9:.2f} | {row['flops'] / 1e9:,.0f} | {kept} |"
            )
    return "\n".join(lines)


def main() -> int:
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
