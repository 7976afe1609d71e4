"""Merge the training settings with the user's DeepSpeed file.

`merge_deepspeed_config` returns the configuration with the file's values, which is stored with the run and compared on resume,
and the dictionary for `deepspeed.initialize`. Where both set something, the file wins, and the difference is logged. DeepSpeed
silently ignores misspelled keys and many others; here each acts or raises ConfigError, see `deepspeed_keys`. Neither torch nor
DeepSpeed is imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ccella_fast.config import Config, make_config
from ccella_fast.errors import ConfigError
from ccella_fast.training.deepspeed_keys import Given, check_effects, nested, prints_at_info, read_keys

logger = logging.getLogger("ccella_fast")

# Sections and keys that are passed to DeepSpeed as they are.
_PASSED = frozenset(
    "activation_checkpointing comet comms_logger communication_data_type csv_monitor disable_python_gc dump_state "
    "flops_profiler memory_breakdown steps_per_print tensorboard timers wall_clock_breakdown wandb zero_optimization".split()
)
_NAMES = {  # of a DeepSpeed key in the configuration
    "gradient_clipping": "training.max_grad_norm",
    "zero_optimization.stage": "training.zero_stage",
    "optimizer.params.lr": "training.lr",
    "optimizer.params.betas": "training.adam_betas",
    "optimizer.params.weight_decay": "training.weight_decay",
}


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
    given = read_deepspeed_file(path) if path else {}
    overrides = {name: given[key] for key, name in _NAMES.items() if key in given}
    overrides |= _batch_sizes(given, config, world_size, path)
    if "bf16.enabled" in given:
        overrides["training.precision"] = "bf16" if given["bf16.enabled"] else "fp32"
    if "activation_checkpointing" in given:
        overrides["training.activation_checkpointing"] = given.pop("activation_checkpointing")
    elif any(key.startswith("activation_checkpointing.") for key in given):
        overrides["training.activation_checkpointing"] = True
    merged = make_config(overrides, base=config, origin=path)
    _log_differences(config, merged, path)
    if merged.training.precision == "auto":
        merged = make_config({"training.precision": auto_precision()}, base=merged)
    check_effects(given, stage=merged.training.zero_stage, precision=merged.training.precision, path=path)
    return merged, _engine_values(merged, given, world_size, output_dir)


def read_deepspeed_file(path: str | Path) -> Given:
    """The keys that a DeepSpeed file sets. Raises ConfigError for an unreadable file and for what `read_keys` refuses.

    `activation_checkpointing` may be true or false.
    """
    import hjson  # DeepSpeed's own reader

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = hjson.loads(text, object_pairs_hook=_unique_keys)
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
        raise ConfigError(f"the key {bad.args[0]!r:.60} appears twice", path=path, fix="keep one of them") from None
    if not text.strip():  # an empty object for Hjson
        raise ConfigError("this DeepSpeed file is empty", path=path, fix="write {} for DeepSpeed's defaults")
    if not isinstance(values, dict):
        raise ConfigError("a DeepSpeed configuration must be one JSON object", path=path, fix="enclose it in {...}")
    if "bfloat16" in values:  # the name in older releases of DeepSpeed
        if "bf16" in values:
            raise ConfigError("bf16 and bfloat16 are the same section", path=path, field="bfloat16", fix="remove one")
        values["bf16"] = values.pop("bfloat16")
    switch = values.get("activation_checkpointing")
    if type(switch) is bool:
        del values["activation_checkpointing"]
    given = read_keys(values, path)
    return {**given, "activation_checkpointing": switch} if type(switch) is bool else given


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


def _batch_sizes(given: Given, config: Config, world_size: int, path: object) -> dict[str, Any]:
    """Complete the batch sizes, of which any may be missing.

    train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x processes.
    """
    names = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    total, micro, steps = (given.get(name) for name in names)
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


def _engine_values(config: Config, given: Given, world_size: int, output_dir: Path) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: what the file has, what follows from the configuration, and defaults."""
    training = config.training
    micro, steps, bf16 = training.batch_size, training.gradient_accumulation_steps, training.precision == "bf16"
    zero = training.zero_stage > 0
    values = {key: value for key, value in nested(given).items() if key in _PASSED}
    if not given.get("comms_logger.enabled"):
        values.pop("comms_logger", None)  # DeepSpeed enables it if the section exists
    # Sums of bf16 gradients lose small contributions. Without ZeRO our own optimizer always adds in fp32.
    sums = given.get("data_types.grad_accum_dtype", "fp32")
    tensorboard = {"enabled": True, "output_path": str(output_dir), "job_name": "tensorboard"}
    if given.get("csv_monitor.enabled"):
        values["csv_monitor"] = {"output_path": str(output_dir), "job_name": "csv"} | values["csv_monitor"]
    log_level = given.get("log_level") or ("info" if prints_at_info(given) else None)
    return {
        **values,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * world_size,
        # Without ZeRO our own optimizer clips the gradients and keeps the bf16 weights (training/flat_adamw.py).
        "gradient_clipping": training.max_grad_norm if zero else 0.0,
        "bf16": {"enabled": bf16 and zero},
        **({"data_types": {"grad_accum_dtype": sums}} if bf16 and zero else {}),
        "zero_optimization": {**values.get("zero_optimization", {}), "stage": training.zero_stage},
        "tensorboard": tensorboard | values.get("tensorboard", {}),
        # Use torch's fused AdamW also with offloading to the CPU: DeepSpeed's own would have to be compiled with g++.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's throughput timer would synchronize with the GPU at every step.
        "timers": {"throughput": {"enabled": False} | values.get("timers", {}).get("throughput", {})},
        **({"log_level": log_level} if log_level else {}),  # DeepSpeed's own is warning
    }


def _log_differences(before: Config, after: Config, path: object) -> None:
    """Log the training settings that the file `path` has changed."""
    old, new = before.training.model_dump(), after.training.model_dump()
    for key in old:
        if old[key] != new[key]:
            logger.info("training.%s is %s (from %s), not %s", key, new[key], path, old[key])


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dictionary. Raises KeyError for a key that occurs twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result
