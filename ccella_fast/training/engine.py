"""The DeepSpeed engine: model, AdamW, learning rate, activation checkpointing; and the fp32 weights behind it.

DeepSpeed keeps fp32 master weights in a different place for each ZeRO stage and precision. `master_weights` and
`full_weights` hide that: the first gives this process's own shards, the second every parameter whole.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.training.deepspeed_config import checked

logger = logging.getLogger("ccella_fast")


class NonFiniteSkippingAdamW(torch.optim.AdamW):
    """AdamW that clips the global gradient norm and leaves everything as it is when that norm is not finite.

    DeepSpeed's ZeRO and bf16 wrappers do both themselves and report it in `overflow` and `_global_grad_norm`. Stage 0 in fp32
    has no wrapper, so this class does it there, under the same names."""

    def __init__(self, *args: Any, max_norm: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_norm, self.overflow, self._global_grad_norm = max_norm, False, 0.0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(norm.isfinite())
        if not self.overflow:
            super().step()


def build_engine(
    config: Config, deepspeed_values: dict[str, Any], *, total_steps: int, device: torch.device, path: Any
) -> Any:
    """A `DeepSpeedEngine` around the configured model, initialised from `training.seed`.

    path: the user's DeepSpeed file, for messages. Raises ConfigError when DeepSpeed refuses its values."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    checked(deepspeed_values, DeepSpeedConfig, path)
    training = config.training
    torch.manual_seed(training.seed)
    with device:
        model = build_model(config)
    if training.activation_checkpointing:
        model.set_activation_checkpointing(_checkpointing(deepspeed_values.get("activation_checkpointing")))
    settings: dict[str, Any] = {
        "lr": training.lr,
        "betas": training.adam_betas,
        "weight_decay": training.weight_decay,
        "fused": True,  # one pass, on the CPU too
    }
    if training.precision == "fp32" and training.zero_stage == 0:
        optimizer: torch.optim.AdamW = NonFiniteSkippingAdamW(
            model.parameters(), max_norm=training.max_grad_norm, **settings
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=functools.partial(polynomial_decay, total_steps=total_steps),
        config=deepspeed_values,
    )
    if training.precision == "bf16" and training.zero_stage == 0:
        # This wrapper has taken an optimizer step on zero gradients to allocate its state: Adam's bias correction would be one
        # step off and the weights have decayed once.
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def polynomial_decay(optimizer: torch.optim.Optimizer, *, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """lr_k = lr_0 (1 - k/T)^2 after k optimizer steps (docs/explanation/method.md, section 3)."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 - min(k, total_steps) / total_steps) ** 2)


def master_weights(engine: Any) -> list[Tensor]:
    """The fp32 tensors that this process's optimizer updates: whole parameters in stage 0, flat shards with ZeRO."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 in bf16
            return [shard.data for shard in getattr(optimizer, name)]
    groups = getattr(optimizer, "fp32_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [parameter.data for group in groups for parameter in group]  # stage 0, bf16 and fp32


def full_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value of every parameter, on all processes, one at a time. All processes must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _stage_0_masters(engine)
    for name, parameter in engine.module.named_parameters():
        yield name, masters[parameter].data if masters else safe_get_full_fp32_param(parameter)


def set_master_weights(engine: Any, values: dict[str, Tensor]) -> None:
    """Write whole fp32 parameters into the master weights; the weights that the model computes with stay as they are."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    masters = _stage_0_masters(engine)
    for name, parameter in engine.module.named_parameters():
        value = values[name].to(engine.device)
        if masters:
            masters[parameter].data.copy_(value)
        elif engine.zero_optimization_stage() == 3:  # equal parts, the last one padded
            part = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, part * engine.world_size - value.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, part * engine.global_rank, part))
        else:
            safe_set_full_fp32_param(parameter, value)


def _stage_0_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> its fp32 master where no ZeRO stage shards them; empty otherwise."""
    if engine.zero_optimization_stage() > 0:
        return {}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
    return {parameter: parameter for parameter in engine.module.parameters()}


def _checkpointing(section: dict[str, Any] | None) -> Any:
    """The function that reruns a block in the backward pass: DeepSpeed's when its section asks for it, else torch's."""
    if section is None:
        return functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    import deepspeed

    deepspeed.checkpointing.configure(
        None,
        partition_activations=section.get("partition_activations", False),
        contiguous_checkpointing=section.get("contiguous_memory_optimization", False),
        num_checkpoints=section.get("number_checkpoints"),
        checkpoint_in_cpu=section.get("cpu_checkpointing", False),
        synchronize=section.get("synchronize_checkpoint_boundary", False),
        profile=section.get("profile", False),
    )
    return deepspeed.checkpointing.checkpoint
