"""`train.py --dry-run`: settings, data, memory and disk space of a run that is not started."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccella_fast.config import Config
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.data.manifest import Manifest
from ccella_fast.models import build_model
from ccella_fast.models.parts import select_trained
from ccella_fast.quantities import counted, format_bytes
from ccella_fast.training import distributed
from ccella_fast.training.activation_memory import activation_bytes
from ccella_fast.training.condition_dropout import ConditionDropout
from ccella_fast.training.flat_adamw import factored_weights
from ccella_fast.training.resume import flatten
from ccella_fast.training.run import RunPlan, make_run_plan
from ccella_fast.training.snapshots import DTYPE

_FP32 = 4


def describe_run(
    config: Config,
    *,
    data: Path,
    run: Path,
    deepspeed_file: Path | None,
    allow: Sequence[str] = (),
    as_json: bool = False,
) -> str:
    """Check the settings and the data as a real run does, and describe the run as a table or as JSON.

    Args:
        config: the configuration.
        data: the prepared folder; every file is compared with its SHA-256 and every shape with the configuration.
        run: the run's folder; nothing is written to it.
        deepspeed_file: the user's DeepSpeed configuration.
        allow: names of findings about the data with which the run would start nevertheless.
        as_json: JSON, with every setting and the values for DeepSpeed.

    Raises:
        CcellaError: as `train`.
    """
    plan = make_run_plan(config, data=data, run=run, deepspeed_file=deepspeed_file, allow=allow)
    online = plan.config.training.latents == "online"
    dataset = PreparedDataset(data, plan.config, "train", needs="images" if online else "latents")
    ConditionDropout.from_config(plan.config, dataset)  # the null report must be there
    with torch.device("meta"):
        model = build_model(plan.config)
    select_trained(model, plan.config)
    parameters, trained = count_parameters(model)
    facts = {
        "variant": plan.config.model.variant,
        "parameters": parameters,
        "trained_parameters": trained,
        "start_weights": [] if plan.start_weights is None else plan.start_weights.table,
        "data": _data_facts(dataset.prepared, len(dataset), dataset.copies),
        "run": _run_facts(plan, len(dataset)),
        "memory": _memory_facts(plan, model, dataset.prepared),
        "host": {"checkpoint_copy": checkpoint_bytes(plan.config, model)},
        "disk": _disk_facts(plan, model),
    }
    if as_json:
        # Who clips depends on precision and ZeRO stage; DeepSpeed's own value is 0 where the optimizer does it.
        engine = plan.engine_values | {"gradient_clipping": plan.config.training.max_grad_norm}
        return json.dumps({**facts, "config": plan.config.dump(), "deepspeed": engine}, indent=2)
    return _table(plan, facts)


def _data_facts(prepared: Manifest, selected: int, copies: int) -> dict[str, Any]:
    train = [case for case in prepared.cases if case.split == "train"]
    classes = Counter("unknown" if case.pirads is None else ("neg", "pos")[case.pirads.index(1)] for case in train)
    return {
        "studies": dict(Counter(case.split for case in prepared.cases)),
        "selected_for_training": selected,
        "augmented_copies": copies,
        "classes_of_train": dict(classes),
        "reports_of_train": sum(not case.text_isnull for case in train),
        "truncated_reports": len(prepared.truncated_reports),
        "sequences": list(prepared.data.sequences),
        "dim": prepared.data.dim,
        "spacing": prepared.data.spacing,
        "encoder": None if prepared.text is None else prepared.text.encoder,
    }


def _run_facts(plan: RunPlan, studies: int) -> dict[str, Any]:
    training, processes = plan.config.training, plan.facts["world_size"]
    batch = training.global_batch(processes)
    return {
        "steps": plan.total_steps,
        "epochs": round(plan.total_steps * batch / studies, 2),
        "batch": batch,
        "processes": processes,
        "precision": training.precision,
        "zero_stage": training.zero_stage,
        "gradient_clipping": training.max_grad_norm,
    }


def _memory_facts(plan: RunPlan, model: nn.Module, prepared: Manifest) -> dict[str, Any]:
    """Bytes per process. `activations` is None, with the reason, if they are not estimated."""
    each = state_bytes(plan.config, plan.facts["world_size"], model)
    if plan.config.training.activation_checkpointing:
        return {**each, "activations": None, "activations_reason": "not estimated with activation checkpointing"}
    tokens = prepared.text.max_length if prepared.text else 1
    kind = "cuda" if distributed.uses_gpu() else "cpu"
    return {
        **each,
        "activations": activation_bytes(plan.config, tokens=tokens, device_type=kind),
        "activations_reason": None,
    }


def _disk_facts(plan: RunPlan, model: nn.Module) -> dict[str, Any]:
    # Each checkpoint contains a copy of the autoencoder.
    parameters, trained = count_parameters(model)
    vae = sum(file.stat().st_size for file in (plan.data / "vae").rglob("*") if file.is_file())
    training, every = plan.config.training, plan.config.training.power_ema_snapshot_steps
    return {
        "snapshot": DTYPE.itemsize
        * (trained if training.low_rank.rank else parameters)
        * len(training.power_ema_widths),
        "most_snapshots": math.ceil(plan.total_steps / every) if every else 0,
        "checkpoint": checkpoint_bytes(plan.config, model) + vae,
        "base_weights": _FP32 * (parameters - trained) if plan.config.training.low_rank.rank else 0,
        "most_checkpoints": plan.config.training.checkpoints_total_limit
        + (1 if plan.config.monitoring.best_metric is None else 2),
    }


def _table(plan: RunPlan, facts: dict[str, Any]) -> str:
    """The facts as aligned lines of `name  value`."""
    data, run, memory, disk = facts["data"], facts["run"], facts["memory"], facts["disk"]
    default = flatten(Config().dump())
    changed = {key: value for key, value in flatten(plan.config.dump()).items() if value != default.get(key)}
    states = sum(size for name, size in memory.items() if not name.startswith("activations"))
    kept = (
        memory["activations_reason"]
        or f"{format_bytes(memory['activations'])} kept for the backward pass of a micro-batch"
    )
    clipped = (
        f"gradients clipped to {run['gradient_clipping']:g}" if run["gradient_clipping"] else "gradients not clipped"
    )
    counts = lambda numbers: ", ".join(f"{number} {name}" for name, number in numbers.items())  # noqa: E731
    batch = counted(run["batch"], "study", "studies")
    base = (
        f", and {format_bytes(disk['base_weights'])} for the weights that are not trained"
        if disk["base_weights"]
        else ""
    )
    frozen = facts["trained_parameters"] != facts["parameters"]
    trained = f", of which {facts['trained_parameters']:,} are trained" if frozen else ""
    mm, grid = " x ".join(f"{size:g}" for size in data["spacing"]), " x ".join(map(str, data["dim"]))
    rows = [
        *((key, json.dumps(value)) for key, value in changed.items()),
        ("", ""),
        ("prepared folder", f"{plan.data}: {counts(data['studies'])}; every file was checked"),
        ("train split", f"{data['selected_for_training']} used, {data['reports_of_train']} with a report, "
                        f"{data['augmented_copies']} augmented copies each"),
        ("classes of train", counts(data["classes_of_train"])),
        ("grid", f"{', '.join(data['sequences'])}: {grid} voxels of {mm} mm"),
        ("text encoder", f"{data['encoder'] or 'none'}, truncated reports: {data['truncated_reports']}"),
        ("", ""),
        ("model", f"{facts['variant']}, {facts['parameters']:,} parameters{trained}"),
        *facts["start_weights"],
        ("length", f"{counted(run['steps'], 'step')} of {batch}, epochs: {run['epochs']:g}"),
        ("training", f"{counted(run['processes'], 'process', 'processes')}, {run['precision']}, "
                     f"ZeRO {run['zero_stage']}, {clipped}"),
        ("", ""),
        ("memory per process", f"{format_bytes(states)} for weights, gradients, optimizer and averages"),
        *((f"  {name}", format_bytes(size)) for name, size in memory.items() if not name.startswith("activations")),
        ("  activations", kept),
        ("host memory", f"{format_bytes(facts['host']['checkpoint_copy'])} over all processes, for the copy of a checkpoint "
                        "that is being written"),
        ("disk", f"{format_bytes(disk['checkpoint'])} per checkpoint, "
                 f"at most {counted(disk['most_checkpoints'], 'checkpoint')}{base}"),
        *([("", f"{format_bytes(disk['snapshot'])} per snapshot of averages, "
                f"{counted(disk['most_snapshots'], 'snapshot')}")] if disk["most_snapshots"] else []),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
    return "\n".join(["settings that differ from the defaults", *lines])


def state_bytes(config: Config, world_size: int, model: nn.Module) -> dict[str, int]:
    """Bytes of what one process keeps between two steps.

    ZeRO 1 shards the optimizer's state and the averages, ZeRO 2 also the gradients, ZeRO 3 also the weights. Gradients are
    added in fp32, at stage 1 in a second buffer that is not sharded. Without ZeRO the wide layers' weights have none
    (training/flat_adamw.py).
    """
    training, bf16 = config.training, config.training.precision == "bf16"
    stage, (parameters, trained) = training.zero_stage, count_parameters(model)
    first, second, third = (world_size if stage >= least else 1 for least in (1, 2, 3))
    weights = 2 if bf16 else _FP32
    masters = _FP32 if bf16 or stage > 0 else 0
    with_gradient, gradient = trained, {1: 2 + _FP32}.get(stage, _FP32) if bf16 else _FP32
    if stage == 0:
        with_gradient -= factored_weights(model, training.global_batch(world_size))
    return {
        "weights": parameters * weights // third,
        "gradients": with_gradient * gradient // second,
        "optimizer": trained * (masters + 2 * _FP32) // first,
        "averages": trained * _FP32 * _averages(config) // first,
    }


def checkpoint_bytes(config: Config, model: nn.Module) -> int:
    """Disk space of the fp32 tensors: weights, averages if there are any, and the two moments of what is trained.

    With low-rank adapters, a checkpoint has what is trained alone.
    """
    parameters, trained = count_parameters(model)
    if config.training.low_rank.rank > 0:
        parameters = trained
    return _FP32 * (parameters * (1 + _averages(config)) + 2 * trained)


def _averages(config: Config) -> int:
    """The number of averages of the weights."""
    training = config.training
    return (training.ema_decay > 0) + (len(training.power_ema_widths) if training.power_ema_snapshot_steps else 0)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The number of the model's parameters, and of those that are trained."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters), trained
