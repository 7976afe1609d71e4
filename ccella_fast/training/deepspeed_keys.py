"""Every key of a DeepSpeed file: where it acts, or why it is refused.

`KEYS` has a row for each key; messages, the checks of `read_keys` and `check_effects`, and the page of the documentation follow
from it. A key acts, or has the value of what happens anyway, or raises ConfigError: none is ignored silently. `null` and "auto"
stand for a key that is not set. Neither torch nor DeepSpeed is imported; the tests compare the rows with DeepSpeed's classes.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.optional import install

Given = dict[str, Any]  # the keys that a file sets, with dots: {"zero_optimization.stage": 2}
BF16_STAGE_1 = "1 in bf16"  # where DeepSpeed has an optimizer of its own, with fewer settings
WHERE = "0", "1", BF16_STAGE_1, "2", "3"
_SHARDED = WHERE[1:]
_ZERO = "1", "2", "3"  # DeepSpeed's optimizers for ZeRO
_LARGEST = 2**63 - 1
_MISSING: Any = object()


@dataclass(frozen=True)
class Kind:
    """A kind of value: how messages call it, and the function that returns a value of it or raises ValueError."""

    words: str
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Key:
    """A key of a DeepSpeed file.

    Attributes:
        text: what it does here; of a fixed key, why it is fixed; of a refused one, why it is refused.
        kind: of its values; None: refused.
        fixed: the only accepted value, if there is one.
        default: the value that is the same as leaving it out, and therefore accepted everywhere.
        where: ZeRO stages at which it acts, of `WHERE`.
        needs: a key without which it has no effect.
        prints: whether it prints at DeepSpeed's log level "info".
        fix: what to do about a refused value.
    """

    text: str
    kind: Kind | None = None
    fixed: Any = _MISSING
    default: Any = _MISSING
    where: tuple[str, ...] = WHERE
    needs: str = ""
    prints: bool = False
    fix: str = "remove it"


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not value.strip():
        raise ValueError
    return value


def _whole(least: int) -> Kind:
    def read(value: Any) -> int:
        if type(value) not in (int, float) or value != int(value) or not least <= value <= _LARGEST:
            raise ValueError
        return int(value)  # 5e8 is a float in JSON

    return Kind(f"a whole number of at least {least}", read)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return value


def _at_least_0(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError
    return value


def _one_of(*names: str) -> Kind:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return value

    return Kind("one of " + ", ".join(f'"{name}"' for name in names), read)


def _adam(value: Any) -> str:
    if _text(value).lower() not in ("adam", "adamw"):
        raise ValueError
    return value


def _list_of(each: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def read(value: Any) -> list[Any]:
        if type(value) is not list:
            raise ValueError
        return [each(entry) for entry in value]

    return read


_FLAG, _TEXT = Kind("true or false", _flag), Kind("text that is not empty", _text)
_COUNT, _SIZE, _NUMBER = _whole(1), _whole(0), Kind("a number", _number)
_NUMBERS, _TEXTS = Kind("a list of numbers", _list_of(_number)), Kind("a list of texts", _list_of(_text))
_ANY = Kind("a value", lambda value: value)


def _fixed(value: Any, text: str, fix: str = "remove it") -> Key:
    return Key(text, _ANY, fixed=value, default=value, fix=fix)


def _all(row: Callable[[str], Key], prefix: str, names: str) -> dict[str, Key]:
    return {prefix + name: row(name) for name in names.split()}


def _refused(text: str, fix: str = "remove it") -> Callable[[str], Key]:
    return lambda name: Key(text, fix=fix)


def _monitor(name: str, words: str) -> Callable[[str], Key]:
    return lambda key: Key(f"{words}: {key.replace('_', ' ')}", _TEXT, needs=f"{name}.enabled")


_CHECKPOINTS = "checkpoints are written and read by ccella_fast itself"
_FP16 = "fp16 is not supported: 3D latent diffusion and T5 features overflow in it"
_NVME = "offloading to NVMe is not supported"
_OUR_OPTIMIZER = "the optimizer is always AdamW with bias correction and fp32 state"
_EMPTIED = "it empties inputs that blocks of the network share"
_MEAN = "gradients are averaged over processes"
_TENSORBOARD, _CSV = "TensorBoard", "CSV files"

KEYS: dict[str, Key] = {
    # Batch, precision and optimizer: merged into the configuration.
    "train_batch_size": Key("studies per optimizer step, over all processes", _COUNT),
    "train_micro_batch_size_per_gpu": Key("training.batch_size", _COUNT),
    "gradient_accumulation_steps": Key("training.gradient_accumulation_steps", _COUNT),
    "gradient_clipping": Key("training.max_grad_norm; 0: gradients are not clipped",
                             Kind("a number of at least 0", _at_least_0)),
    "bf16.enabled": Key("training.precision: bf16 or fp32", _FLAG),
    "bf16.immediate_grad_update": _fixed(False, "gradients are added to their fp32 sums after each backward pass"),
    "bf16.check_grad_overflow": _fixed(True, "gradients are always checked for non-finite values"),
    "bf16.bf16_master_weights_and_grads": _fixed(False, "master weights are always fp32"),
    "bf16.bf16_optimizer_states": _fixed(False, "the optimizer's state is always fp32"),
    "fp16.enabled": _fixed(False, _FP16, 'use "bf16": {"enabled": true}'),
    **{f"fp16.{name}": _fixed(value, _FP16) for name, value in {
        "auto_cast": False, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2,
        "consecutive_hysteresis": False, "min_loss_scale": 1, "fp16_master_weights_and_grads": False,
    }.items()},
    "data_types.grad_accum_dtype": Key("the dtype in which gradients are summed over micro-batches",
                                       _one_of("fp32", "bf16"), default="fp32", where=_SHARDED, needs="bf16.enabled"),
    "data_types.param_dtype": Key("checked to be the precision of the run", _one_of("fp32", "bf16")),
    "data_types.buffer_dtype": Key("the network's buffers keep their dtype"),
    "data_types.keep_in_fp32_modules": Key("the network's buffers keep their dtype"),
    "optimizer.type": Key("both are AdamW", Kind("Adam or AdamW", _adam),
                          fix='use {"type": "AdamW"} or remove the section'),
    "optimizer.legacy_fusion": _fixed(False, "the optimizer is AdamW"),
    "optimizer.params.lr": Key("training.lr", _NUMBER),
    "optimizer.params.betas": Key("training.adam_betas", _NUMBERS),
    "optimizer.params.weight_decay": Key("training.weight_decay", _NUMBER),
    "optimizer.params.eps": _fixed(1e-8, "epsilon cannot be set"),
    **{f"optimizer.params.{name}": _fixed(value, _OUR_OPTIMIZER) for name, value in {
        "adam_w_mode": True, "torch_adam": True, "bias_correction": True, "fp32_optimizer_states": True,
        "amsgrad": False,
    }.items()},
    "optimizer.params.max_grad_norm": Key("DeepSpeed does not clip here", fix='use "gradient_clipping"'),
    "scheduler": Key("the learning rate is always lr (1 - k/T)^2",
                     fix="remove the section; set training.lr and max_train_steps"),
    # Sums of gradients.
    "communication_data_type": Key("the dtype in which gradients are summed over processes", _one_of("fp32", "bf16"),
                                   fix="use fp32 or bf16"),
    "prescale_gradients": _fixed(False, _MEAN),
    "gradient_predivide_factor": _fixed(1, _MEAN),
    "gradient_allreduce_op": _fixed("mean", _MEAN),
    "managed_gradient_accumulation": _fixed(True, "the training loop counts micro-batches"),
    "disable_allgather": _fixed(False, "DeepSpeed does not read it"),
    "disable_python_gc": Key("true: Python does not collect cyclic garbage by itself", _FLAG, default=False),
    "zero_allow_untested_optimizer": _fixed(False, "AdamW needs no permission"),
    "zero_force_ds_cpu_optimizer": _fixed(False, "DeepSpeed's own Adam would have to be compiled"),
    # ZeRO.
    "zero_optimization.stage": Key("training.zero_stage", _SIZE),
    "zero_optimization.contiguous_gradients": Key("gradients are copied to one buffer before they are summed", _FLAG,
                                                  default=True, where=_ZERO),
    "zero_optimization.reduce_scatter": Key("each process receives only the sums of its shard", _FLAG, default=True,
                                            where=_ZERO),
    "zero_optimization.reduce_bucket_size": Key("gradients that are summed over processes at a time", _COUNT,
                                                default=500_000_000, where=("0", *_ZERO)),
    "zero_optimization.use_multi_rank_bucket_allreduce": Key("buckets of several processes are summed together", _FLAG,
                                                             default=True, where=("1", "2")),
    "zero_optimization.allgather_partitions": _fixed(True, "DeepSpeed does not read it"),
    "zero_optimization.allgather_bucket_size": _fixed(500_000_000, "the weights are gathered in one operation"),
    "zero_optimization.overlap_comm": Key("gradients are summed during the backward pass", _FLAG,
                                          where=("0", *_ZERO)),
    "zero_optimization.round_robin_gradients": Key("parameters are dealt out to processes in turn", _FLAG,
                                                   default=False, where=("1", "2")),
    "zero_optimization.parameter_alignment": Key("every parameter starts at an address divisible by 16", _FLAG,
                                                 default=False, where=("1", "2")),
    "zero_optimization.compute_grad_norm": _fixed(True, "every step logs the norm and is skipped if it is not finite"),
    "zero_optimization.ignore_unused_parameters": _fixed(True, "DeepSpeed's check does not reach this network"),
    "zero_optimization.load_from_fp32_weights": _fixed(True, _CHECKPOINTS),
    "zero_optimization.elastic_checkpoint": _fixed(False, _CHECKPOINTS),
    "zero_optimization.pipeline_loading_checkpoint": _fixed(False, _CHECKPOINTS),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _fixed(
        True, "checkpoints always have the whole weights, in fp32"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": Key("checkpoints always have the whole weights"),
    "zero_optimization.legacy_stage1": _fixed(False, "DeepSpeed has removed it"),
    "zero_optimization.log_trace_cache_warnings": _fixed(False, "the order of the network's modules never changes"),
    "zero_optimization.override_module_apply": _fixed(True, "it acts only while DeepSpeed builds a model"),
    "zero_optimization.zero_hpz_partition_size": _fixed(1, "a second partition of the weights is not supported"),
    **_all(lambda name: _fixed(False, "weights and gradients are exchanged as they are"), "zero_optimization.",
           "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": _fixed(False, "the optimizer is AdamW"),
    "zero_optimization.leaf_module": Key("the network has no modules that must be gathered as a whole"),
    "zero_optimization.zenflow": Key("ZenFlow is not supported"),
    **_all(_refused("DeepSpeed has replaced it", 'use "offload_optimizer" or "offload_param"'), "zero_optimization.",
           "cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
    **_all(_refused("DeepSpeed has removed it"), "zero_optimization.",
           "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param"),
    # ZeRO stage 3.
    **{f"zero_optimization.{name}": Key(text, kind, default=default, where=("3",)) for name, kind, default, text in [
        ("sub_group_size", _COUNT, 1_000_000_000, "weights that the optimizer updates at a time"),
        ("stage3_prefetch_bucket_size", _SIZE, 50_000_000, "weights that are gathered ahead of their use"),
        ("stage3_param_persistence_threshold", _SIZE, 100_000, "smaller parameters are not sharded"),
        ("stage3_model_persistence_threshold", _SIZE, _LARGEST, "at most this many weights are not sharded"),
        ("stage3_max_live_parameters", _SIZE, 1_000_000_000, "whole weights in memory at a time"),
        ("stage3_max_reuse_distance", _SIZE, 1_000_000_000, "weights used again within this distance stay whole"),
        ("stage3_module_granularity_threshold", _SIZE, 0, "modules with smaller parts are gathered as a whole"),
        ("stage3_use_all_reduce_for_fetch_params", _FLAG, False, "weights are gathered by an all-reduce"),
        ("stage3_allgather_sequential", _FLAG, False, "weights are gathered one by one"),
        ("memory_efficient_linear", _FLAG, True, "linear layers keep their sharded weight for the backward pass"),
        ("enable_sanity_checks", _FLAG, False, "compares the order of parameters of all processes"),
    ]},
    # Offloading.
    "zero_optimization.offload_optimizer.device": Key("cpu: master weights, their gradients and Adam's state are in "
        "host memory, and the optimizer runs on the CPU", _one_of("none", "cpu"), default="none", where=_SHARDED,
        fix=f'use "cpu": {_NVME}'),
    "zero_optimization.offload_optimizer.pin_memory": Key("whether that memory is page-locked", _FLAG, default=True,
        where=_SHARDED, needs="zero_optimization.offload_optimizer.device"),
    "zero_optimization.offload_optimizer.ratio": _fixed(1, "the optimizer's state is offloaded as a whole"),
    "zero_optimization.offload_optimizer.super_offload": _fixed(False, "SuperOffload is not supported"),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _fixed(0.8, "SuperOffload is not supported"),
    "zero_optimization.offload_param.device": Key("cpu: the shards of the weights are in host memory",
        _one_of("none", "cpu"), default="none", where=("3",), fix=f'use "cpu": {_NVME}'),
    "zero_optimization.offload_param.pin_memory": Key("whether that memory is page-locked", _FLAG, default=True,
        where=("3",), needs="zero_optimization.offload_param.device"),
    **{f"zero_optimization.{name}": _fixed(value, _NVME) for name, value in {
        "offload_optimizer.buffer_count": 4, "offload_optimizer.pipeline_read": False,
        "offload_optimizer.pipeline_write": False, "offload_optimizer.fast_init": False,
        "offload_param.buffer_count": 5, "offload_param.buffer_size": 100_000_000,
        "offload_param.max_in_cpu": 1_000_000_000,
    }.items()},
    **_all(_refused(_NVME), "", "zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_param.nvme_path aio"),
    # Activation checkpointing: a section with a key switches it on.
    "activation_checkpointing.synchronize_checkpoint_boundary": Key(
        "waits for the device at the start and end of each recomputed block", _FLAG),
    "activation_checkpointing.profile": Key("prints the time of each recomputed block", _FLAG),
    "activation_checkpointing.partition_activations": _fixed(False, _EMPTIED),
    "activation_checkpointing.cpu_checkpointing": _fixed(False, _EMPTIED),
    "activation_checkpointing.contiguous_memory_optimization": _fixed(False, "it needs partition_activations"),
    "activation_checkpointing.number_checkpoints": Key("it needs contiguous_memory_optimization"),
    # Checkpoints.
    "checkpoint.tag_validation": _fixed("Warn", _CHECKPOINTS),
    **_all(lambda name: _fixed(False, _CHECKPOINTS), "checkpoint.",
           "load_universal use_node_local_storage parallel_write.pipeline_stage"),
    "checkpoint.checkpoint_serialization": _fixed(True, _CHECKPOINTS),
    "checkpoint.writer": Key(_CHECKPOINTS),
    # What is printed and logged.
    "log_level": Key("what DeepSpeed itself logs; warning, or info if a key needs it",
                     _one_of("debug", "info", "warning", "error", "critical")),
    "steps_per_print": Key("every so many optimizer steps, prints step, skipped steps and learning rate", _COUNT,
                           prints=True),
    "dump_state": Key("prints DeepSpeed's settings and the engine's attributes at the start", _FLAG, default=False,
                      prints=True),
    "wall_clock_breakdown": Key("prints the time of forward, backward and optimizer at every step", _FLAG,
                                default=False),
    "memory_breakdown": Key("prints the memory in use before and after each part of a step", _FLAG, default=False),
    "timers.throughput.enabled": Key("also prints samples per second", _FLAG, default=False, needs="steps_per_print",
                                     prints=True),
    "timers.throughput.synchronized": Key("waits for the device when measuring", _FLAG, default=True,
                                          needs="timers.throughput.enabled"),
    "flops_profiler.enabled": Key("prints FLOPs, parameters and times of the modules in one step", _FLAG,
                                  default=False),
    **{f"flops_profiler.{name}": Key(text, kind, default=default, needs="flops_profiler.enabled")
       for name, kind, default, text in [
        ("profile_step", _COUNT, 1, "the step that is measured"),
        ("module_depth", _whole(-1), -1, "to which depth of modules; -1: the innermost"),
        ("top_modules", _COUNT, 1, "how many modules of each depth are listed"),
        ("detailed", _FLAG, True, "whether every module is listed"),
        ("output_file", _TEXT, _MISSING, "file to write instead of printing"),
        ("recompute_fwd_factor", Kind("a number of at least 0", _at_least_0), 0, "recomputed share of the forward pass"),
    ]},
    "comms_logger.enabled": Key("measures DeepSpeed's collectives and prints a table at the end", _FLAG, default=False,
                                where=_SHARDED),
    **{f"comms_logger.{name}": Key(text, kind, default=default, where=_SHARDED, needs="comms_logger.enabled",
                                   prints=name == "verbose")
       for name, kind, default, text in [
        ("verbose", _FLAG, False, "prints each collective"),
        ("prof_all", _FLAG, True, "whether all collectives are measured"),
        ("prof_ops", _TEXTS, [], "those that are measured if not all are"),
        ("debug", _FLAG, False, "names the function that called the collective"),
    ]},
    # Monitors, which receive the numbers of metrics.jsonl.
    "tensorboard.enabled": Key("TensorBoard files; true unless set", _FLAG),
    "tensorboard.output_path": Key("their folder; the run's unless set", _TEXT),
    "tensorboard.job_name": Key("the folder in it; tensorboard unless set", _TEXT),
    "csv_monitor.enabled": Key("a CSV file for each number", _FLAG, default=False),
    "csv_monitor.output_path": Key("their folder; the run's unless set", _TEXT, needs="csv_monitor.enabled"),
    "csv_monitor.job_name": Key("the folder in it; csv unless set", _TEXT, needs="csv_monitor.enabled"),
    "wandb.enabled": Key("Weights & Biases (package wandb)", _FLAG, default=False),
    **_all(_monitor("wandb", "Weights & Biases"), "wandb.", "group team project"),
    "comet.enabled": Key("Comet (package comet_ml)", _FLAG, default=False),
    **_all(_monitor("comet", "Comet"), "comet.", "project workspace experiment_name experiment_key mode"),
    "comet.samples_log_interval": Key("Comet: studies between two logged steps", _COUNT, default=100,
                                      needs="comet.enabled"),
    "comet.online": Key("Comet: false writes to a local folder", _FLAG, needs="comet.enabled"),
    "comet.api_key": Key("it would be printed with the other settings", fix="set COMET_API_KEY in the environment"),
    # Sections and keys of other methods.
    **_all(_refused("DeepSpeed has removed it"), "",
           "amp nebula compression_training quantize_training sparse_gradients eigenvalue sparse_attention elasticity "
           "graph_harvesting curriculum_learning progressive_layer_drop pld allgather_size"),
    **_all(_refused("the network is not a language model or a mixture of experts"), "",
           "vocabulary_size expert_parallel expert_parallel_size use_data_before_expert_parallelism hybrid_engine "
           "weight_quantization"),
    **_all(_refused("only data parallelism (ZeRO) is supported"), "",
           "pipeline tensor_parallel sequence_parallel_size seq_parallel_communication_data_type"),
    **_all(_refused("data is read, ordered and batched by ccella_fast itself"), "",
           "data_efficiency dataloader_drop_last"),
    **_all(_refused(_CHECKPOINTS), "", "datastates_ckpt load_from_fp32_weights use_node_local_storage"),
    **_all(_refused("it is a key of zero_optimization"), "", "zero_quantized_gradients zenflow"),
    "torch_autocast": Key("the precision is that of the weights", fix='use "bf16": {"enabled": true}'),
    "compile": Key("DeepSpeed's compiler is not supported"),
    "autotuning": Key("trials of DeepSpeed's autotuner cannot be distinguished from runs",
                      fix="remove it, and compare batch sizes with --dry-run"),
}  # fmt: skip
SECTIONS = {name.rpartition(".")[0] for name in KEYS if "." in name}
SECTIONS |= {name.rpartition(".")[0] for name in SECTIONS if "." in name}
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
_LOUD = "debug", "info"


def read_keys(values: Mapping[str, Any], path: object) -> Given:
    """The keys that a file sets, without those that are null or "auto".

    Raises ConfigError for a key that is unknown or refused, and for a wrong value.
    """
    given: Given = {}
    for name, value in _leaves(values, "", path):
        key = KEYS[name]
        if key.kind is None:
            raise _error(f"the DeepSpeed key '{name}' is not supported: {key.text}", name, path, key.fix)
        if key.fixed is not _MISSING and not _same(value, key.fixed):
            raise _error(f"{name} must be {json.dumps(key.fixed)}: {key.text}", name, path, key.fix)
        try:
            given[name] = key.kind.read(value)
        except (ValueError, OverflowError):
            why = f"{name} must be {key.kind.words}, got {value!r:.40}"
            raise _error(why, name, path, key.fix if key.fix != Key.fix else "correct the value") from None
    return given


def check_effects(given: Given, *, stage: int, precision: str, path: object) -> None:
    """Raise ConfigError for a key without effect at this ZeRO stage and precision, or without another key or package."""
    here = _place(given, stage, precision)
    for name, value in given.items():
        key = KEYS[name]
        if _same(value, key.default):
            continue
        if here not in key.where:
            why = f"{name} has no effect at ZeRO stage {here}, only at {stages(key)}"
            raise _error(why, name, path, f"remove it, or use ZeRO stage {stages(key)}")
        needed = {**given, "bf16.enabled": precision == "bf16"}.get(key.needs) if key.needs else True
        if needed is None or (needed is False and key.needs == "bf16.enabled"):
            raise _error(f"{name} has no effect without {key.needs}", name, path, f"set {key.needs} too, or remove it")
        if key.prints and value and given.get("log_level", "info") not in _LOUD:
            why = f"{name} prints at log level info, which log_level '{given['log_level']}' hides"
            raise _error(why, name, path, "remove log_level, or this key")
    dtype = given.get("data_types.param_dtype", precision)
    if dtype != precision:
        name, fix = "data_types.param_dtype", 'set "bf16": {"enabled": ...}, or remove it'
        raise _error(f"{name} is '{dtype}', but this run computes in {precision}", name, path, fix)
    for monitor, package in _PACKAGES.items():
        if given.get(f"{monitor}.enabled") and importlib.util.find_spec(package) is None:
            why = f"{monitor} needs the package {package}, which is not installed"
            raise _error(why, f"{monitor}.enabled", path, f"{install(package)}, or remove the section")


def stages(key: Key) -> str:
    """The ZeRO stages at which a key acts, in words."""
    shown = ["1 in fp32" if place == "1" and BF16_STAGE_1 not in key.where else place
             for place in key.where if place != BF16_STAGE_1 or "1" not in key.where]  # fmt: skip
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


def prints_at_info(given: Given) -> bool:
    """Whether a key is set that prints at DeepSpeed's log level "info"."""
    return any(KEYS[name].prints and value for name, value in given.items())


def nested(given: Given) -> dict[str, Any]:
    """The keys as sections: {"zero_optimization": {"stage": 2}}."""
    result: dict[str, Any] = {}
    for name, value in given.items():
        *sections, last = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def _leaves(values: Mapping[str, Any], prefix: str, path: object) -> Iterator[tuple[str, Any]]:
    """Name and value of every key that is not null or "auto", below sections too. Raises ConfigError for unknown names."""
    for key, value in values.items():
        name = prefix + key
        if "." in key or (name not in KEYS and name not in SECTIONS):
            known = {other.removeprefix(prefix) for other in KEYS.keys() | SECTIONS if other.startswith(prefix)}
            here = {other for other in known if "." not in other}
            shown = repr(key)[1:-1][:60]  # one line, whatever the file has
            raise _error(f"unknown key '{shown}'", prefix + shown, path, did_you_mean(shown, here))
        if value is None or value == "auto":
            continue
        if name in KEYS:
            yield name, value
        else:
            if not isinstance(value, dict):
                raise _error(f"the section '{name}' must be a JSON object", name, path, "write it as {...}")
            yield from _leaves(value, f"{name}.", path)


def _place(given: Given, stage: int, precision: str) -> str:
    """The entry of `WHERE` for a run."""
    sums = given.get("data_types.grad_accum_dtype", "fp32")
    offloaded = given.get("zero_optimization.offload_optimizer.device", "none") != "none"
    return BF16_STAGE_1 if (stage, precision, sums, offloaded) == (1, "bf16", "fp32", False) else str(stage)


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal; true and 1 are not."""
    if isinstance(value, str) and isinstance(other, str):
        return value.lower() == other.lower()
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _error(why: str, name: str, path: object, fix: str) -> ConfigError:
    return ConfigError(why, path=path, field=name, fix=fix)
