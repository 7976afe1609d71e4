"""`train.py --dry-run`: settings, memory and disk space of a run that is not started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.training.run import make_run_plan

_FP32 = 4


def describe_run(
    config: Config, *, data: Path, run: Path, deepspeed_file: Path | None, allow: Sequence[str] = ()
) -> str:
    """Describe a run as text: configuration, DeepSpeed values, parameters, memory without activations, and disk space.

    Args:
        config: the configuration.
        data: the prepared folder.
        run: the run's folder; nothing is written to it.
        deepspeed_file: the user's DeepSpeed configuration.
        allow: names of findings about the data with which the run would start nevertheless.
    """
    plan = make_run_plan(config, data=data, run=run, deepspeed_file=deepspeed_file, allow=allow)
    with torch.device("meta"):
        model = build_model(plan.config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = parameters * bytes_per_parameter(plan.config, plan.facts["world_size"])
    training = plan.config.training
    # Each checkpoint contains a copy of the autoencoder.
    vae = sum(file.stat().st_size for file in (data / "vae").rglob("*") if file.is_file())
    checkpoint = parameters * checkpoint_bytes_per_parameter(plan.config) + vae
    lines = [
        json.dumps({"config": plan.config.dump(), "deepspeed": plan.engine_values}, indent=2),
        f"variant {plan.config.model.variant}, {parameters:,} parameters, {plan.total_steps} steps",
        f"memory per process: {memory / 2**30:.2f} GiB for weights, gradients, optimizer and averages, plus activations",
        f"disk: {checkpoint / 2**30:.2f} GiB per checkpoint, at most {training.checkpoints_total_limit + 1} checkpoints",
    ]
    return "\n".join(lines)


def bytes_per_parameter(config: Config, world_size: int) -> float:
    """Memory of one process: ZeRO 1 shards optimizer state and averages, ZeRO 2 also gradients, ZeRO 3 also weights."""
    training = config.training
    weights, optimizer = _weights_and_optimizer(config)
    states = optimizer + (_FP32 if training.ema_decay else 0)
    shards = [world_size if training.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    gradients = weights
    return states / shards[0] + gradients / shards[1] + weights / shards[2]


def checkpoint_bytes_per_parameter(config: Config) -> int:
    """Disk space of the files of all processes: DeepSpeed's shards, the fp32 weights, and their averages if there are any."""
    weights, optimizer = _weights_and_optimizer(config)
    shards = optimizer + (0 if config.training.zero_stage == 3 else weights)  # ZeRO 3 writes only the fp32 weights
    return shards + _FP32 + (_FP32 if config.training.ema_decay else 0)


def _weights_and_optimizer(config: Config) -> tuple[int, int]:
    """Bytes per parameter of the weights that the model computes with, and of master weights and Adam's two moments."""
    training = config.training
    masters = 0 if training.precision == "fp32" and training.zero_stage == 0 else _FP32
    return (_FP32 if training.precision == "fp32" else 2), masters + 2 * _FP32
