"""The DeepSpeed engine: model, AdamW, learning rate, activation checkpointing; and its fp32 master weights.

DeepSpeed keeps the master weights in different attributes for each ZeRO stage and precision. In all cases, `master_weights`
returns what this process updates, and `full_tensors` whole parameters.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.models.parts import parameter_groups, select_trained
from ccella_fast.training.deepspeed_config import validate_with_deepspeed
from ccella_fast.training.flat_adamw import FlatAdamW
from ccella_fast.training.start_weights import StartWeights

logger = logging.getLogger("ccella_fast")
_SUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_engine(
    config: Config,
    deepspeed_values: dict[str, Any],
    *,
    total_steps: int,
    device: torch.device,
    path: Any,
    start_weights: StartWeights | None = None,
) -> Any:
    """A `DeepSpeedEngine` around the configured model, initialized from `training.seed` and from weights.

    Args:
        config: the configuration.
        deepspeed_values: the dictionary for `deepspeed.initialize`.
        total_steps: T, the length of the run, after which the learning rate is 0.
        device: of the model.
        path: the user's DeepSpeed file, for error messages.
        start_weights: replace the random ones; they are read once and then released.

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
    if start_weights is not None:
        start_weights.load_into(model)
    select_trained(model, config)
    if training.activation_checkpointing:
        model.set_activation_checkpointing(checkpoint_function(deepspeed_values.get("activation_checkpointing")))
    if device.type == "cuda":
        # As the activations: cuDNN would copy other weights at each call.
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        torch.backends.cudnn.benchmark = True
    optimizer = _make_optimizer(model, config, deepspeed_values)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=functools.partial(polynomial_decay, total_steps=total_steps),
        config=deepspeed_values,
    )
    if isinstance(optimizer, FlatAdamW):
        engine.enable_backward_allreduce = False  # the optimizer sums the gradients
        optimizer.is_last_micro_step = engine.is_gradient_accumulation_boundary
        dist.broadcast(optimizer.masters, 0)  # random numbers may depend on the CPU
        optimizer.copy_masters()
    return engine


def _make_optimizer(model: nn.Module, config: Config, deepspeed_values: dict[str, Any]) -> torch.optim.Optimizer:
    """Our AdamW at stage 0, PyTorch's with ZeRO, which wraps it."""
    training = config.training
    settings: dict[str, Any] = {
        "lr": training.lr,
        "betas": training.adam_betas,
        "weight_decay": training.weight_decay,
    }
    groups = parameter_groups(model, config)
    if training.zero_stage > 0:
        return torch.optim.AdamW(groups, **settings, fused=True)  # one kernel, also on a CPU
    zero = deepspeed_values["zero_optimization"]
    return FlatAdamW(
        model,
        groups=groups,
        **settings,
        dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        max_norm=training.max_grad_norm,
        rows=training.global_batch(dist.get_world_size()),
        sum_dtype=_SUM_DTYPES[deepspeed_values.get("communication_data_type", training.precision)],
        bucket=zero.get("reduce_bucket_size"),
        overlap=zero.get("overlap_comm", True),
    )


def polynomial_decay(optimizer: torch.optim.Optimizer, *, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """lr_k = lr_0 (1 - k/T)^2 after k optimizer steps (docs/explanation/method.md, section 3)."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 - min(k, total_steps) / total_steps) ** 2)


def master_weights(engine: Any) -> list[Tensor]:
    """The fp32 tensors that this process's optimizer updates: all parameters at stage 0, flat shards with ZeRO."""
    # DeepSpeed has no public access to the shards as they are; the attributes below are those of its optimizer wrappers.
    optimizer = engine.optimizer
    if isinstance(optimizer, FlatAdamW):
        return [optimizer.masters]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 in bf16
            return [shard.data for shard in getattr(optimizer, name)]
    raise TypeError(f"the master weights of {type(optimizer).__name__} are not known")


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

    def checkpoint(module: nn.Module, *tensors: Tensor) -> Any:
        if not torch.is_grad_enabled():  # nothing is kept, and DeepSpeed would count what it has to give back
            return module(*tensors)
        # All layers before may be frozen. DeepSpeed would then compute no gradient of what is trained in this module.
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        if is_trained and not any(tensor.requires_grad for tensor in tensors):
            tensors = (tensors[0].detach().requires_grad_(), *tensors[1:])
        return deepspeed.checkpointing.checkpoint(module, *tensors)

    return checkpoint
