"""A training step with its parts, through the engine that train.py builds, and its scaling with the number of ranks."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compiled_baseline
import reference
from benchmark_case import BenchmarkCase, Implementation, PreparedCase, Roofline, Skip
from cases.sampler import step_roofline
from ccella_fast.config import Config, load_config, make_config
from ccella_fast.diffusion.objective import Objective
from ccella_fast.hardware import free_memory
from ccella_fast.storage import write_json
from ccella_fast.training.flat_adamw import MOMENTS, FlatAdamW
from fixtures import Workbench
from op_counter import FlashAttention, backend, count
from synthetic_dataset import write_prepared
from timer import Stopwatch, slope

# The gradients that are compared have passed through the whole network: the U-Net's first convolution, the adapter's latents.
_COMPARED = ("unet.conv_in.conv.weight", "ella.connector.latents")
ROOT = Path(__file__).resolve().parents[2]
_SCALE = 1.0  # the latents of the synthetic dataset have unit variance
_MOST_STEPS = 1000
# For gradients: that of the L1 loss flips its sign where the error is near zero.
_TOLERANCE = {"fp32": 5e-3, "bf16": 0.25, "fp16": 0.25}
_ADAMW_BYTES = 28  # per parameter: read p, g, m, v, write p, m, v, in fp32


def training_step(bench: Workbench, precision: str | None = None, *, compiled: bool = False) -> PreparedCase:
    """One training step: loader, forward, backward, optimizer.

    The reference uses fp16 autocast with a GradScaler on a GPU, fp32 on a CPU, and default AdamW. Ours is train.py's engine
    without EMA, which the reference does not have.

    Args:
        bench: The workbench.
        precision: Of ours; None for bf16 on a GPU or against the compiled baseline, else fp32.
        compiled: Compare with the compiled baseline instead of the reference.
    """
    bench.release()
    default = "bf16" if bench.device.type == "cuda" or compiled else "fp32"
    if precision == default:
        raise Skip(f"the case training_step already uses {default} on this device")
    precision = precision or default
    batch = bench.config.training.batch_size if bench.device.type == "cuda" else 1
    config = training_config(bench, precision, batch)
    needed = _bytes_per_parameter(precision) * bench.parameters / 2**30
    free = free_memory(bench.device) / 2**30
    if needed > free:
        raise Skip(f"it needs about {needed:.0f} GiB of memory, {free:.0f} GiB are free")
    folder = tempfile.TemporaryDirectory(prefix="ccella-bench-")
    data = write_prepared(Path(folder.name) / "prepared", config, cases=2 * batch)
    bench.on_progress("building the engine")
    engine = build_engine(bench, config, Path(folder.name))
    baseline_model = _reference(engine, precision)
    objective = Objective.from_config(config)
    stream = batch_stream(config, data, bench.device)
    items = [stream.dataset.item(index, 0) for index in range(len(stream.dataset))]
    step_class = compiled_baseline.CompiledTrainingStep if compiled else reference.ReferenceTrainingStep
    body = step_class(baseline_model, config.scheduler, weight=config.class_loss_weight)
    if precision == "fp32":  # both share their moments, as they share their weights, which halves the memory
        _share_state(body.optimizer, baseline_model, engine.optimizer)
    steps = stream.steps(0, _MOST_STEPS, background=bench.device.type == "cuda")

    def run_reference(stopwatch: Stopwatch) -> None:
        body(_collated(items[:batch]), stopwatch.mark)

    def run_ours(stopwatch: Stopwatch) -> None:
        from ccella_fast.training.loop import joint_loss

        samples = next(steps)[0]
        stopwatch.mark("loader")
        losses = joint_loss(engine, samples, objective, config.class_loss_weight)
        stopwatch.mark("forward")
        engine.backward(losses.total)
        stopwatch.mark("backward")
        engine.step()
        torch.stack(losses[:3]).tolist()  # logged at every step, as by default
        stopwatch.mark("optimizer")

    prepared = PreparedCase(shapes={"latent": [batch, bench.latent_channels, *bench.latent_grid]}, tolerance=_TOLERANCE)
    samples = stream.micro_batch(0, 0)
    gradients = _Gradients(engine, baseline_model, body, samples, objective, config)
    baseline, its_precision = ("compiled baseline", "bf16") if compiled else ("reference", bench.reference_precision)
    prepared.implementations[baseline] = Implementation(
        its_precision, run_reference, lambda: gradients.reference(autocast=True)
    )
    prepared.implementations["ours"] = Implementation(precision, run_ours, gradients.ours)
    prepared.truth = lambda: gradients.reference(autocast=False)
    for name, implementation in prepared.implementations.items():
        prepared.rooflines[name] = training_roofline(bench, batch, implementation.precision)
    prepared.notes.append(f"batch {batch}; compared with the truth: gradients of {' and '.join(_COMPARED)}")
    prepared.keep_alive.append(folder)
    return prepared


class _Gradients:
    """Two gradients of each implementation on the same samples, scaled by the largest values of the true gradients."""

    def __init__(
        self, engine: Any, baseline_model: nn.Module, body: Any, samples: Any, objective: Objective, config: Config
    ):
        self.engine, self.baseline_model, self.body, self.samples = engine, baseline_model, body, samples
        self.objective, self.weight = objective, config.class_loss_weight
        self.scales: list[float] = []

    def reference(self, *, autocast: bool) -> Tensor:
        parts = {**self.samples._asdict(), **self.samples.batch._asdict()}
        batch = {key: value for key, value in parts.items() if isinstance(value, Tensor)}
        batch["text"] = batch["text"].float()  # ours keeps it in the dtype of its weights
        with self.body.autocast() if autocast else torch.autocast(self.body.device.type, enabled=False):
            loss = self.body.loss(batch)
        # The loss is scaled as by GradScaler, because fp16 gradients would underflow.
        scale = 2.0**14 if autocast and self.body.scaler.is_enabled() else 1.0
        (loss * scale).backward()
        return self._take(self.baseline_model, 1 / scale)

    def ours(self) -> Tensor:
        from ccella_fast.training.loop import joint_loss

        loss = joint_loss(self.engine.module, self.samples, self.objective, self.weight).total
        loss.backward()
        optimizer, parameters = self.engine.optimizer, dict(self.engine.module.named_parameters())
        optimizer.finish_sums()
        optimizer.gather_factors()
        return self._scaled([optimizer.view(optimizer.gradients, parameters[name]).flatten() for name in _COMPARED])

    def _take(self, module: nn.Module, factor: float) -> Tensor:
        parameters = dict(module.named_parameters())
        found = [parameters[name].grad.detach().float().flatten() * factor for name in _COMPARED]
        for parameter in module.parameters():
            parameter.grad = None
        return self._scaled(found)

    def _scaled(self, found: list[Tensor]) -> Tensor:
        if not self.scales:  # the truth comes first
            self.scales = [float(gradient.abs().max()) for gradient in found]
        return torch.cat([gradient / scale for gradient, scale in zip(found, self.scales, strict=True)])


def build_engine(bench: Workbench, config: Config, folder: Path) -> Any:
    """The engine of train.py in a single process, without TensorBoard. No parameter is zero."""
    from ccella_fast.training import distributed
    from ccella_fast.training.deepspeed_config import merge_deepspeed_config

    distributed.initialize_processes(timedelta(minutes=10))
    from ccella_fast.training import engine as engines

    config, values = merge_deepspeed_config(
        config, None, world_size=1, output_dir=folder, auto_precision=lambda: "fp32"
    )
    values["tensorboard"] = {"enabled": False}
    with open(os.devnull, "w") as null, redirect_stdout(null):
        engine = engines.build_engine(config, values, total_steps=100_000, device=bench.device, path=None)
    bench.fill_zeros(engine.module)
    with torch.no_grad():
        for parameter, master in engine.optimizer.views(engine.optimizer.masters).items():
            master.copy_(parameter)
    return engine


def training_roofline(bench: Workbench, batch: int, precision: str) -> Roofline:
    """Roofline of a training step.

    FLOPs of the forward and backward passes of the whole model are counted on meta tensors, less 19 of the upsamplers' 27 taps.
    """
    from ccella_fast.models import build_model

    with torch.device("meta"):
        model = build_model(bench.config)
        x = torch.empty(batch, bench.latent_channels, *bench.latent_grid)
        text = torch.empty(batch, bench.config.text.max_length, bench.config.model.input_dim)
        times, spacing = torch.zeros(batch), torch.zeros(batch, 3)

    def step() -> None:
        with FlashAttention(), backend("reference"):
            loss = model(x, times, spacing=spacing, text=text)[0].sum()
        loss.backward()

    flops = count(step).flops
    forward = step_roofline(bench, batch, precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = 3 * forward.upsampler_flops * (1 - 8 / 27)
    why = (
        f"{flops / 1e9:,.0f} GFLOP forward and backward (counted) - {saved / 1e9:,.0f} (upsamplers as 8-tap phases); AdamW "
        f"{_ADAMW_BYTES} bytes for each of {parameters / 1e6:,.0f} M parameters; convolutions' inputs and outputs three times"
    )
    moved = parameters * _ADAMW_BYTES + 3 * forward.activation_bytes
    return Roofline(flops - saved, moved, forward.precision, why)


def training_config(bench: Workbench, precision: str, batch: int) -> Config:
    """The workbench's configuration for a training step at its latent size, in one process without EMA."""
    factor = bench.config.autoencoder.factor
    changes = {
        "training.precision": precision, "training.batch_size": batch, "training.zero_stage": 0,
        "training.ema_decay": 0.0, "data.dim": [axis * factor for axis in bench.latent_grid],
    }  # fmt: skip
    return make_config(changes, base=bench.config)


def batch_stream(config: Config, data: Path, device: torch.device) -> Any:
    """As in train.py: the latents are resident on the device if they fit."""
    from ccella_fast.data.loading.dataset import PreparedDataset
    from ccella_fast.data.loading.resident_latents import choose_latent_source
    from ccella_fast.training.batches import BatchStream

    dataset = PreparedDataset(data, config, "train")
    text_dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    return BatchStream(
        dataset, seed=0, batch_size=config.training.batch_size, accumulation=1, rank=0, world_size=1,
        scale=torch.full((sum(config.model.latent_channels),), _SCALE),
        objective=Objective.from_config(config), source=choose_latent_source(dataset, device, text_dtype),
        device=device,
    )  # fmt: skip


def _reference(engine: Any, precision: str) -> reference.ReferenceModel:
    """The reference on the memory of the engine's weights if they are fp32, on an fp32 copy otherwise."""
    if precision != "fp32":
        return reference.shared_with(copy.deepcopy(engine.module).float())
    model = reference.shared_with(engine.module)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Parameters of its own: those of the engine pass their gradients to the engine's optimizer.
            setattr(module, name, nn.Parameter(parameter.detach()))
    return model


def _share_state(baseline: torch.optim.Optimizer, model: nn.Module, ours: FlatAdamW) -> None:
    moments = {name: {p.data_ptr(): view for p, view in ours.views(getattr(ours, name)).items()} for name in MOMENTS}
    for parameter in model.parameters():
        shared = {name: views[parameter.data_ptr()] for name, views in moments.items()}
        baseline.state[parameter] = {"step": torch.tensor(0.0), **shared}


def _collated(items: list[Any]) -> dict[str, Tensor]:
    """A batch as the reference's loader returns it: stored latents stacked from RAM, and the random numbers of the loop."""
    fields = {"latents": "latent_mean", "text": "text", "pirads": "pirads", "spacing": "spacing"}
    batch = {name: torch.stack([getattr(item, field) for item in items]) for name, field in fields.items()}
    batch["has_class"] = torch.stack([item.has_class for item in items])
    batch["noise"] = torch.randn_like(batch["latents"])
    batch["timesteps"] = torch.randint(0, 1000, (len(items),))
    return batch


def _bytes_per_parameter(precision: str) -> int:
    return 20 if precision == "fp32" else 18 + 16


def scaling_with_ranks(bench: Workbench) -> PreparedCase:
    """Samples per second of train.py with 1, 2, 4 ... processes at a fixed batch per process.

    Each process has one GPU, or on a CPU one core. In a log-log plot a slope of 1 means perfect scaling.
    """
    cuda = bench.device.type == "cuda"
    most = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    if most < 2:
        raise Skip(f"scaling needs at least two {'GPUs' if cuda else 'cores'}, there is one")
    bench.release()
    config = bench.config if cuda else load_config(ROOT / "configs" / "demo.json")
    ranks = [count for count in (1, 2, 4, 8) if count <= most]
    prepared = PreparedCase(
        shapes={"ranks": ranks, "batch per rank": config.training.batch_size, "latent": config.check_grid()}
    )
    points = []
    with tempfile.TemporaryDirectory(prefix="ccella-bench-") as folder:
        data = write_prepared(Path(folder) / "prepared", config, cases=8 * config.training.batch_size)
        write_json(Path(folder) / "config.json", config.dump())
        for count in ranks:
            bench.on_progress(f"{count} processes")
            points.append((count, _samples_per_second(Path(folder), data, count, cuda)))
            prepared.facts.append((f"{count} ranks", points[-1][1], "samples/s"))
    prepared.facts.append(("slope of samples/s with ranks", slope(points), "log-log"))
    prepared.curves["samples/s against ranks"] = points
    if not cuda:
        prepared.notes.append("the demo's model, one thread per process: gloo between cores of one machine")
    return prepared


def _samples_per_second(folder: Path, data: Path, ranks: int, cuda: bool) -> float:
    """Median of the second half of a short run's metrics."""
    run, steps = folder / f"run-{ranks}", 20
    settings = [f"training.max_train_steps={steps}", f"training.checkpointing_steps={steps}", "training.ema_decay=0"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        ROOT / "ccella_fast" / "train.py", "--config", folder / "config.json", "--data", data, "--output_dir", run,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | (
        {} if cuda else {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    )
    done = subprocess.run([*map(str, command), *overrides], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"train.py ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]:.200}"
        )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["samples_per_second"] for line in lines[len(lines) // 2 :])


CASES = [
    BenchmarkCase(
        "training_step", "training", "one training step: the reference's loop body, and ours through DeepSpeed",
        training_step, quick=("cpu", "cuda"), budget=30, set_up={"cpu": 50, "cuda": 40},
    ),
    BenchmarkCase(
        "training_step_bf16", "training", "one training step on a CPU: the reference in fp32, ours in bf16",
        lambda bench: training_step(bench, "bf16"), budget=30, set_up={"cpu": 90, "cuda": 40}, bf16=True,
    ),
    BenchmarkCase(
        "training_step_tuned", "training", "one training step: the compiled baseline (bf16 autocast, fused AdamW), and ours",
        lambda bench: training_step(bench, compiled=True), budget=20, set_up={"cpu": 90, "cuda": 180}, bf16=True, last=True,
    ),
    BenchmarkCase(
        "scaling_with_ranks", "training", "samples per second of train.py with 1, 2, 4 ... processes", scaling_with_ranks,
        budget=0, set_up={"cpu": 90, "cuda": 120},
    ),
]  # fmt: skip
