"""Merge the training settings with the user's DeepSpeed file.

`merge_deepspeed_config` returns the configuration with the file's values, which is stored with the run and compared on resume,
and the dictionary for `deepspeed.initialize`. Where both set something, the file wins, and the difference is logged. DeepSpeed
silently ignores a misspelled top-level key; here it raises ConfigError. Neither torch nor DeepSpeed is imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ccella_fast.config import Config, make_config
from ccella_fast.errors import ConfigError, did_you_mean

logger = logging.getLogger("ccella_fast")

# Top-level keys that are passed to DeepSpeed.
PASSED_KEYS = frozenset(
    "aio checkpoint comet comms_logger communication_data_type csv_monitor data_types disable_allgather disable_python_gc "
    "dump_state flops_profiler gradient_allreduce_op gradient_predivide_factor log_level memory_breakdown prescale_gradients "
    "steps_per_print tensorboard timers wall_clock_breakdown wandb zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer zero_optimization".split()
)
# Top-level keys whose values are merged into the configuration.
MERGED_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 bfloat16 fp16 "
    "optimizer scheduler activation_checkpointing".split()
)
# Top-level keys of DeepSpeed that have no effect here or are not tested. They raise instead of being ignored silently.
UNSUPPORTED_KEYS = frozenset(
    "amp autotuning compile compression_training curriculum_learning data_efficiency dataloader_drop_last datastates_ckpt "
    "eigenvalue elasticity expert_parallel expert_parallel_size graph_harvesting hybrid_engine load_from_fp32_weights "
    "managed_gradient_accumulation nebula pipeline pld progressive_layer_drop quantize_training "
    "seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients tensor_parallel "
    "torch_autocast use_data_before_expert_parallelism vocabulary_size weight_quantization zero_quantized_gradients "
    "zenflow".split()
)
_OPTIMIZER = {"type", "params"}
_OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam", "bias_correction"}
_KNOWN_KEYS = {  # of the sections in which DeepSpeed ignores unknown keys
    "activation_checkpointing": {
        "partition_activations", "number_checkpoints", "contiguous_memory_optimization", "synchronize_checkpoint_boundary",
        "profile", "cpu_checkpointing",
    },
    "checkpoint": {"tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer",
                   "checkpoint_serialization"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "optimizer": _OPTIMIZER,
}  # fmt: skip
ADAM_EPS = 1e-8


def merge_deepspeed_config(
    config: Config,
    path: str | Path | None,
    *,
    world_size: int,
    output_dir: Path,
    auto_precision: Callable[[], Literal["bf16", "fp32"]],
) -> tuple[Config, dict[str, Any]]:
    """Merge `config` with the user's DeepSpeed file.

    Args:
        config: the configuration.
        path: the file, in JSON or HJSON (which allows comments), or None.
        world_size: number of processes.
        output_dir: folder of the TensorBoard logs.
        auto_precision: returns the precision if `training.precision` is "auto" and the file does not set it.

    Returns:
        The merged configuration, and the dictionary for `deepspeed.initialize`.

    Raises:
        ConfigError: the file cannot be read, or contains a key or value that is not supported.
    """
    file_values = read_deepspeed_file(path) if path else {}
    values = {key: value for key, value in file_values.items() if value != "auto"}
    overrides = {
        **_batch_sizes(values, config, world_size, path),
        **_precision(values, path),
        **_optimizer(values, path),
    }
    if "gradient_clipping" in values:
        overrides["training.max_grad_norm"] = values["gradient_clipping"]
    zero = _zero(values, path)
    if "stage" in zero:
        overrides["training.zero_stage"] = zero["stage"]
    if "activation_checkpointing" in values:
        overrides["training.activation_checkpointing"] = True
    merged = make_config(overrides, base=config, origin=path)
    _log_differences(config, merged, path)
    if merged.training.precision == "auto":
        merged = make_config({"training.precision": auto_precision()}, base=merged)
    passed = {key: value for key, value in values.items() if key in PASSED_KEYS or key == "activation_checkpointing"}
    return merged, passed | _engine_values(merged, passed, zero, world_size, output_dir)


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed file. Raises ConfigError for unreadable files, and for keys that are unknown or not supported."""
    import hjson  # DeepSpeed's own reader

    path = Path(path)
    try:
        values = hjson.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise ConfigError("this DeepSpeed file does not exist", path=path, fix="check the path") from None
    except (OSError, UnicodeDecodeError) as bad:
        why = "it is not UTF-8 text" if isinstance(bad, UnicodeDecodeError) else os.strerror(bad.errno or 0)
        raise ConfigError(f"this DeepSpeed file cannot be read: {why}", path=path, fix="check the path") from None
    except RecursionError:
        raise ConfigError("this DeepSpeed file is nested too deeply", path=path, fix="correct the file") from None
    except OverflowError:
        raise ConfigError("this DeepSpeed file has a number that is too large", path=path, fix="correct it") from None
    except hjson.HjsonDecodeError as bad:
        where = f"line {bad.lineno}, column {bad.colno}"
        raise ConfigError(f"malformed JSON at {where}: {bad.msg}", path=path, fix="correct the file there") from None
    except KeyError as bad:
        raise ConfigError(f"the key '{bad.args[0]}' appears twice", path=path, fix="keep one of them") from None
    if not isinstance(values, dict):
        raise ConfigError("a DeepSpeed configuration must be one JSON object", path=path, fix="enclose it in {...}")
    for key in values:
        if key in UNSUPPORTED_KEYS:
            raise ConfigError(f"the DeepSpeed key '{key}' is not supported", path=path, field=key, fix="remove it")
        if key not in PASSED_KEYS | MERGED_KEYS:
            raise ConfigError(
                f"unknown key '{key}'", path=path, field=key, fix=did_you_mean(key, PASSED_KEYS | MERGED_KEYS)
            )
    for section, known in _KNOWN_KEYS.items():
        _check_keys(_section(values, section, path), known, section, path)
    return values


def validate_with_deepspeed(
    values: dict[str, Any], config_class: Callable[[dict[str, Any]], Any], path: str | Path | None
) -> None:
    """Validate `values` with DeepSpeed's own classes. Raises ConfigError for their errors.

    config_class: `DeepSpeedConfig`; a parameter, so that this module does not import DeepSpeed.
    """
    from pydantic import ValidationError

    try:
        config_class(values)
    except ValidationError as bad:
        first = bad.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{bad.title}: {first['msg']}", path=path, field=field, fix="see deepspeed.ai, config-json"
        ) from None
    except (AssertionError, ValueError, TypeError) as bad:
        why = f"DeepSpeed rejects this configuration: {str(bad).splitlines()[0]:.200}"
        raise ConfigError(why, path=path, fix="correct the value; see deepspeed.ai, config-json") from None


def _batch_sizes(values: dict[str, Any], config: Config, world_size: int, path: object) -> dict[str, Any]:
    """Complete the batch sizes, of which any may be missing.

    train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x processes.
    """
    names = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    for name in names:
        if name in values and (type(values[name]) is not int or values[name] < 1):
            why = f"{name} must be a whole number of at least 1, got {values[name]!r:.40}"
            raise ConfigError(why, path=path, field=name, fix="correct the number")
    total, micro, steps = (values.get(name) for name in names)
    if total is not None:
        if micro is not None and steps is None:
            steps = max(1, total // (micro * world_size))
        else:
            steps = steps or config.training.gradient_accumulation_steps
            micro = micro or max(1, total // (steps * world_size))
        if micro * steps * world_size != total:
            why = (
                f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
                f"{steps} x {world_size} processes (= {micro * steps * world_size})"
            )
            raise ConfigError(why, path=path, field="train_batch_size", fix="remove or correct one of the three")
    sizes = {"training.batch_size": micro, "training.gradient_accumulation_steps": steps}
    return {key: value for key, value in sizes.items() if value is not None}


def _precision(values: dict[str, Any], path: object) -> dict[str, Any]:
    if _section(values, "fp16", path).get("enabled", False) not in (False, "auto"):
        why = "fp16 is not supported: 3D latent diffusion and T5 features overflow in it"
        raise ConfigError(why, path=path, field="fp16.enabled", fix='use "bf16": {"enabled": true}')
    bf16 = _section(values, "bf16", path) or _section(values, "bfloat16", path)
    _check_keys(bf16, {"enabled", "check_grad_overflow", "immediate_grad_update"}, "bf16", path)
    if bf16.get("check_grad_overflow", True) is not True:
        why = "check_grad_overflow must be true: gradients are always checked for non-finite values"
        raise ConfigError(why, path=path, field="bf16.check_grad_overflow", fix="remove it")
    enabled = bf16.get("enabled", "auto" if not bf16 else False)
    return {} if enabled == "auto" else {"training.precision": "bf16" if enabled else "fp32"}


def _optimizer(values: dict[str, Any], path: object) -> dict[str, Any]:
    """The settings of the file's optimizer, which must be AdamW."""
    scheduler = _section(values, "scheduler", path)
    if scheduler:
        why = f"the scheduler '{scheduler.get('type')}' is not supported: the learning rate is always lr (1 - k/T)^2"
        fix = "remove the section; set training.lr and max_train_steps"
        raise ConfigError(why, path=path, field="scheduler", fix=fix)
    section = _section(values, "optimizer", path)
    if not section:
        return {}
    name, params = str(section.get("type")), _section(section, "params", path)
    if name.lower() not in ("adam", "adamw") or params.get("adam_w_mode", True) is not True:
        fix = 'use {"type": "AdamW"} or remove the section'
        raise ConfigError(f"the optimizer '{name}' is not supported", path=path, field="optimizer.type", fix=fix)
    _check_keys(params, _OPTIMIZER_PARAMS, "optimizer.params", path)
    if params.get("eps", ADAM_EPS) not in ("auto", ADAM_EPS):
        why = f"eps must be {ADAM_EPS}, got {params['eps']!r:.40}"
        raise ConfigError(why, path=path, field="optimizer.params.eps", fix=f"remove it, or use {ADAM_EPS}")
    names = {"lr": "training.lr", "betas": "training.adam_betas", "weight_decay": "training.weight_decay"}
    return {names[key]: value for key, value in params.items() if key in names and value != "auto"}


def _zero(values: dict[str, Any], path: object) -> dict[str, Any]:
    """The file's section zero_optimization, without the values that are "auto"."""
    section = _section(values, "zero_optimization", path)
    zero = {key: value for key, value in section.items() if value != "auto"}
    for name in ("offload_optimizer", "offload_param"):
        device = _section(zero, name, path).get("device", "none")
        if device == "nvme":
            why = "offloading to NVMe is not supported"
            raise ConfigError(why, path=path, field=f"zero_optimization.{name}.device", fix='use "cpu"')
    return zero


def _engine_values(
    config: Config, passed: dict[str, Any], zero: dict[str, Any], world_size: int, output_dir: Path
) -> dict[str, Any]:
    """The values that follow from the configuration, and defaults where the file (`passed`) has none."""
    training = config.training
    micro, steps, bf16 = training.batch_size, training.gradient_accumulation_steps, training.precision == "bf16"
    # Sums of bf16 gradients lose small contributions. Our optimizer at stage 0 always accumulates in fp32.
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and training.zero_stage else {}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * world_size,
        # At stage 0 the optimizer clips the gradients and keeps the bf16 weights itself (training/flat_adamw.py).
        "gradient_clipping": training.max_grad_norm if training.zero_stage else 0.0,
        "bf16": {"enabled": bf16 and training.zero_stage > 0},
        "zero_optimization": {**zero, "stage": training.zero_stage},
        "steps_per_print": passed.get("steps_per_print"),
        "tensorboard": passed.get("tensorboard")
        or {"enabled": True, "output_path": str(output_dir), "job_name": "tensorboard"},
        # Use torch's fused AdamW also with offloading to the CPU: DeepSpeed's own would have to be compiled with g++.
        "zero_force_ds_cpu_optimizer": passed.get("zero_force_ds_cpu_optimizer", False),
        # DeepSpeed's throughput timer would synchronize with the GPU at every step.
        "timers": passed.get("timers", {"throughput": {"enabled": False}}),
        **({} if "data_types" in passed else accumulation),
    }


def _log_differences(before: Config, after: Config, path: object) -> None:
    """Log the training settings that the file `path` has changed."""
    old, new = before.training.model_dump(), after.training.model_dump()
    for key in old:
        if old[key] != new[key]:
            logger.info("training.%s is %s (from %s), not %s", key, new[key], path, old[key])


def _section(values: Mapping[str, Any], name: str, path: object) -> dict[str, Any]:
    """A copy of the section `name`; empty if it is missing or "auto"."""
    section = values.get(name) or {}
    if section != "auto" and not isinstance(section, dict):
        raise ConfigError(f"the section '{name}' must be a JSON object", path=path, field=name, fix="write it as {...}")
    return {} if section == "auto" else dict(section)


def _check_keys(section: Mapping[str, Any], known: set[str], name: str, path: object) -> None:
    """Raise ConfigError for a key of the section `name` that is not in `known`."""
    for key in section:
        if key not in known:
            raise ConfigError(f"unknown key '{key}'", path=path, field=f"{name}.{key}", fix=did_you_mean(key, known))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dictionary. Raises KeyError for a key that occurs twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result
