"""The DeepSpeed engine (model, AdamW, learning rate, activation checkpointing) and its fp32 master weights.

DeepSpeed keeps the master weights in different attributes for each ZeRO stage and precision. In all cases, `master_weights`
returns the shards of this process, and `full_weights` whole parameters.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.training.deepspeed_config import validate_with_deepspeed

logger = logging.getLogger("ccella_fast")


class NonFiniteSkippingAdamW(torch.optim.AdamW):
    """AdamW that clips the global gradient norm (`max_norm`; 0: not), and skips the step if that norm is not finite.

    DeepSpeed's optimizer wrappers for ZeRO and bf16 do both, and report the outcome in `overflow` and `_global_grad_norm`. At
    stage 0 in fp32 there is no wrapper; this class takes its place, with the same attributes.
    """

    def __init__(self, *args: Any, max_norm: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_norm, self.overflow, self._global_grad_norm = max_norm, False, 0.0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip the gradients and update, unless their norm is not finite."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_norm or math.inf)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(norm.isfinite())
        if not self.overflow:
            super().step()


def build_engine(
    config: Config, deepspeed_values: dict[str, Any], *, total_steps: int, device: torch.device, path: Any
) -> Any:
    """A `DeepSpeedEngine` around the configured model, initialized from `training.seed`.

    Args:
        config: the configuration.
        deepspeed_values: the dictionary for `deepspeed.initialize`.
        total_steps: T, the length of the run, after which the learning rate is 0.
        device: of the model.
        path: the user's DeepSpeed file, for error messages.

    Raises:
        ConfigError: DeepSpeed rejects a value.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    validate_with_deepspeed(deepspeed_values, DeepSpeedConfig, path)
    training = config.training
    torch.manual_seed(training.seed)
    with device:
        model = build_model(config)
    if training.activation_checkpointing:
        model.set_activation_checkpointing(checkpoint_function(deepspeed_values.get("activation_checkpointing")))
    settings: dict[str, Any] = {
        "lr": training.lr,
        "betas": training.adam_betas,
        "weight_decay": training.weight_decay,
        "fused": True,  # one kernel, also on a CPU
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
        # DeepSpeed's BF16_Optimizer allocates Adam's state by a step on zero gradients, which advances the bias correction and
        # decays the weights: clear the state of the optimizer that it wraps, and copy the weights to the masters again.
        engine.basic_optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def polynomial_decay(optimizer: torch.optim.Optimizer, *, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """lr_k = lr_0 (1 - k/T)^2 after k optimizer steps (docs/explanation/method.md, section 3)."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 - min(k, total_steps) / total_steps) ** 2)


def master_weights(engine: Any) -> list[Tensor]:
    """The fp32 tensors that this process's optimizer updates: whole parameters at stage 0, flat shards with ZeRO."""
    # DeepSpeed has no public access to the shards as they are; the attributes below are those of its optimizer wrappers.
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 in bf16
            return [shard.data for shard in getattr(optimizer, name)]
    groups = getattr(optimizer, "fp32_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [parameter.data for group in groups for parameter in group]  # stage 0, bf16 and fp32


def full_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and fp32 value of every parameter, on every process. All processes must iterate to the end."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = _stage_0_masters(engine)
    for name, parameter in engine.module.named_parameters():
        yield name, masters[parameter].data if masters else safe_get_full_fp32_param(parameter)


def set_master_weights(engine: Any, values: dict[str, Tensor]) -> None:
    """Copy whole fp32 parameters to the master weights, without changing the weights that the model computes with.

    values: by parameter name, on any device.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    masters = _stage_0_masters(engine)
    for name, parameter in engine.module.named_parameters():
        value = values[name].to(engine.device)
        if masters:
            masters[parameter].data.copy_(value)
        elif engine.zero_optimization_stage() == 3:
            # `ds_tensor` is this process's part of DeepSpeed's flat parameter; parts have equal sizes, the last one is padded.
            part = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, part * engine.world_size - value.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, part * engine.global_rank, part))
        else:
            safe_set_full_fp32_param(parameter, value)


def _stage_0_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Map from each parameter to its fp32 master weight at stage 0; empty with ZeRO, which shards them."""
    if engine.zero_optimization_stage() > 0:
        return {}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # BF16_Optimizer: `fp16_groups` are the model's parameters, in whatever dtype
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
    return {parameter: parameter for parameter in engine.module.parameters()}


def checkpoint_function(section: dict[str, Any] | None) -> Any:
    """The function for activation checkpointing: torch's, or DeepSpeed's if the user's file has a section for it."""
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
