"""`train.py --dry-run`: what a run would be, without starting it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.training.run import make_run_plan

_FP32 = 4


def describe_run(config: Config, *, data: Path, run: Path, deepspeed_file: Path | None) -> str:
    """Resolved configuration, DeepSpeed values, parameters, memory a process (activations not counted) and disk, as text."""
    plan = make_run_plan(config, data=data, run=run, deepspeed_file=deepspeed_file)
    with torch.device("meta"):
        model = build_model(plan.config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = parameters * bytes_per_parameter(plan.config, plan.facts["world_size"])
    training = plan.config.training
    vae = sum(
        file.stat().st_size for file in (data / "vae").rglob("*") if file.is_file()
    )  # every checkpoint has a copy
    checkpoint = parameters * checkpoint_bytes_per_parameter(plan.config) + vae
    lines = [
        json.dumps({"config": plan.config.dump(), "deepspeed": plan.engine_values}, indent=2),
        f"variant {plan.config.model.variant}, {parameters:,} parameters, {plan.total_steps} steps",
        f"memory a process: {memory / 2**30:.2f} GiB for weights, gradients, optimizer and averages; activations come on top",
        f"disk: {checkpoint / 2**30:.2f} GiB a checkpoint, {training.checkpoints_total_limit + 1} of them at most",
    ]
    return "\n".join(lines)


def bytes_per_parameter(config: Config, world_size: int) -> float:
    """Of one process: ZeRO 1 divides optimizer state and averages by the processes, 2 gradients too, 3 weights too."""
    training = config.training
    low, optimizer = _weights_and_optimizer(config)
    states = optimizer + (_FP32 if training.ema_decay else 0)
    shares = [world_size if training.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    return states / shares[0] + low / shares[1] + low / shares[2]


def checkpoint_bytes_per_parameter(config: Config) -> int:
    """On disk, all processes together: DeepSpeed's shards, the fp32 weights, and their averages if they are kept."""
    low, optimizer = _weights_and_optimizer(config)
    shards = optimizer + (0 if config.training.zero_stage == 3 else low)  # ZeRO 3 writes the fp32 weights alone
    return shards + _FP32 + (_FP32 if config.training.ema_decay else 0)


def _weights_and_optimizer(config: Config) -> tuple[int, int]:
    """Bytes a parameter of the weights that the model computes with; of fp32 copies of them and Adam's two moments."""
    training = config.training
    copies = 0 if training.precision == "fp32" and training.zero_stage == 0 else _FP32
    return (_FP32 if training.precision == "fp32" else 2), copies + 2 * _FP32
