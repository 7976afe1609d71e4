"""A training step with its parts, through the engine that train.py builds; and how it scales with ranks."""

from __future__ import annotations

import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reference
from cases import Case, Floor, Side, Skip, Trial
from ccella_fast.config import Config, make_config
from ccella_fast.diffusion.schedule import Schedule
from counting import FlashAttention, backend, count
from prepared import write_prepared
from sampler_cases import step_floor
from timer import Watch
from workbench import Workbench

# Gradients that have come through everything: the U-Net's first convolution, the adapter's latents.
_LOOKED_AT = ("unet.conv_in.conv.weight", "ella.connector.latents")
_SCALE = 1.0  # latents of the random folder have unit variance
_TOLERANCE = {"fp32": 5e-3, "bf16": 0.25, "fp16": 0.25}  # of a gradient: L1's flips sign where the error is near zero
_ADAMW_BYTES = 28  # a parameter: read p, g, m, v, write p, m, v, in fp32


def training_step(bench: Workbench, precision: str | None = None) -> Trial:
    """loader, forward, backward, optimizer. The reference: fp16 autocast and GradScaler on a GPU, fp32 on a CPU, default
    AdamW. Ours: train.py's engine, without EMA, which the reference has not."""
    bench.release()
    precision = precision or ("bf16" if bench.device.type == "cuda" else "fp32")
    batch = bench.config.training.batch_size if bench.device.type == "cuda" else 1
    config = _config(bench, precision, batch)
    needed = _bytes_per_parameter(precision) * 0.5755e9 / 2**30
    if bench.device.type == "cpu" and needed > _memory_gib():
        raise Skip(f"it needs about {needed:.0f} GiB of memory, {_memory_gib():.0f} are free")
    folder = tempfile.TemporaryDirectory(prefix="ccella-bench-")
    data = write_prepared(Path(folder.name) / "prepared", config, cases=2 * batch)
    bench.tick("building the engine")
    engine = build_engine(bench, config, Path(folder.name))
    theirs = _reference(engine, precision)
    schedule = Schedule.from_config(config.scheduler)
    feed = _feed(config, data)
    items = [feed.dataset[index] for index in range(len(feed.dataset))]
    body = reference.TrainingStep(theirs, config.scheduler, weight=config.class_loss_weight)
    if precision == "fp32":  # one set of moments for both, as there is one set of weights: half the memory
        _share_state(body.optimizer, engine.optimizer)
    steps = feed.steps(0, 1_000_000, background=bench.device.type == "cuda")

    def run_reference(watch: Watch) -> None:
        body(_collated(items[:batch]), watch.mark)

    def run_ours(watch: Watch) -> None:
        from ccella_fast.training.loop import joint_loss

        samples = next(steps)[0].to(bench.device)
        watch.mark("loader")
        losses = joint_loss(engine, samples, schedule, config.class_loss_weight)
        watch.mark("forward")
        engine.backward(losses.total)
        watch.mark("backward")
        engine.step()
        torch.stack(losses[:3]).tolist()  # logged at every step, as the default is
        watch.mark("optimizer")

    trial = Trial(shapes={"latent": [batch, bench.latent_channels, *bench.latent_grid]}, tolerance=_TOLERANCE)
    samples = feed.micro_batch(0, 0).to(bench.device)
    gate = _Gate(engine, theirs, body, samples, schedule, config)
    name = bench.reference_precision
    trial.sides["reference"] = Side(name, run_reference, lambda: gate.reference(autocast=True))
    trial.sides["ours"] = Side(precision, run_ours, gate.ours)
    trial.truth = lambda: gate.reference(autocast=False)
    for side, row in trial.sides.items():
        trial.floor[side] = training_floor(bench, batch, row.precision)
    trial.notes.append(f"batch {batch}; gate: gradients of {' and '.join(_LOOKED_AT)}")
    trial.holds.append(folder)
    return trial


class _Gate:
    """The same samples through both, and two gradients of each, scaled by the largest of the true ones."""

    def __init__(self, engine: Any, theirs: nn.Module, body: Any, samples: Any, schedule: Schedule, config: Config):
        self.engine, self.theirs, self.body, self.samples = engine, theirs, body, samples
        self.schedule, self.weight = schedule, config.class_loss_weight
        self.scales: list[float] = []

    def reference(self, *, autocast: bool) -> Tensor:
        batch = {key: value for key, value in self.samples._asdict().items() if isinstance(value, Tensor)}
        with reference.autocast(self.samples.latents.device) if autocast else torch.autocast("cpu", enabled=False):
            loss = self.body.loss(batch)
        # The loss is scaled as GradScaler would: fp16 gradients underflow otherwise.
        scale = 2.0**14 if autocast and self.body.device.type == "cuda" else 1.0
        (loss * scale).backward()
        return self._take(self.theirs, 1 / scale)

    def ours(self) -> Tensor:
        from ccella_fast.training.loop import joint_loss

        loss = joint_loss(self.engine.module, self.samples, self.schedule, self.weight).total
        loss.backward()
        return self._take(self.engine.module, 1.0)

    def _take(self, module: nn.Module, factor: float) -> Tensor:
        parameters = dict(module.named_parameters())
        found = [parameters[name].grad.detach().float().flatten() * factor for name in _LOOKED_AT]
        for parameter in module.parameters():
            parameter.grad = None
        if not self.scales:  # the truth comes first
            self.scales = [float(gradient.abs().max()) for gradient in found]
        return torch.cat([gradient / scale for gradient, scale in zip(found, self.scales, strict=True)])


def build_engine(bench: Workbench, config: Config, folder: Path) -> Any:
    """What train.py trains with, alone in its world, without TensorBoard; no parameter starts at zero."""
    from ccella_fast.training import processes
    from ccella_fast.training.deepspeed_config import merge

    processes.initialise()
    from ccella_fast.training import engine as engines

    config, values = merge(config, None, world_size=1, output_dir=folder)
    values["tensorboard"] = {"enabled": False}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        engine = engines.build_engine(config, values, total_steps=100_000, device=bench.device, path=None)
    bench.fill_zeros(engine.module)
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()
    return engine


def training_floor(bench: Workbench, batch: int, precision: str) -> Floor:
    """FLOPs of forward and backward of the whole model, counted on meta tensors, less 19 of 27 taps of the upsamplers."""
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
    forward = step_floor(bench, batch, precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = 3 * forward.upsampler_flops * (1 - 8 / 27)
    why = (
        f"{flops / 1e9:,.0f} GFLOP forward and backward (counted) - {saved / 1e9:,.0f} (upsamplers as 8-tap phases); AdamW "
        f"{_ADAMW_BYTES} bytes for each of {parameters / 1e6:,.0f} M parameters; convolutions' inputs and outputs three times"
    )
    moved = parameters * _ADAMW_BYTES + 3 * forward.activation_bytes
    return Floor(flops - saved, moved, forward.precision, why)


def _config(bench: Workbench, precision: str, batch: int) -> Config:
    factor = bench.config.autoencoder.factor
    changes = {
        "training.precision": precision, "training.batch_size": batch, "training.zero_stage": 0,
        "training.ema_decay": 0.0, "data.dim": [axis * factor for axis in bench.latent_grid],
    }  # fmt: skip
    return make_config(changes, base=bench.config)


def _feed(config: Config, data: Path) -> Any:
    from ccella_fast.data.dataset import PreparedDataset
    from ccella_fast.training.feed import Feed

    return Feed(
        PreparedDataset(data, config, "train"), seed=0, batch_size=config.training.batch_size, accumulation=1, rank=0,
        world_size=1, scale=torch.full((sum(config.model.latent_channels),), _SCALE),
        num_timesteps=config.scheduler.num_train_timesteps,
    )  # fmt: skip


def _reference(engine: Any, precision: str) -> reference.ReferenceModel:
    """On the engine's own weights in fp32; on an fp32 copy of them otherwise."""
    if precision == "fp32":
        return reference.shared_with(engine.module)
    import copy

    return reference.shared_with(copy.deepcopy(engine.module).float())


def _share_state(theirs: torch.optim.Optimizer, ours: torch.optim.Optimizer) -> None:
    for group in ours.param_groups:
        for parameter in group["params"]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            ours.state[parameter] = theirs.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _collated(items: list[Any]) -> dict[str, Tensor]:
    """What the reference's loader hands over: its stored latents, stacked from RAM, and the loop's random numbers."""
    fields = {"latents": "latent_mean", "text": "text", "pirads": "pirads", "spacing": "spacing"}
    batch = {name: torch.stack([getattr(item, field) for item in items]) for name, field in fields.items()}
    batch["has_class"] = torch.tensor([item.has_class for item in items])
    batch["noise"] = torch.randn_like(batch["latents"])
    batch["timesteps"] = torch.randint(0, 1000, (len(items),))
    return batch


def _bytes_per_parameter(precision: str) -> int:
    return 20 if precision == "fp32" else 20 + 16


def _memory_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


CASES = [
    Case(
        "training_step", "training", "one training step: the reference's loop body, and ours through DeepSpeed",
        training_step, quick=("cpu", "cuda"), budget=30, set_up={"cpu": 60, "cuda": 40},
    ),
    Case(
        "training_step_bf16", "training", "one training step on a CPU: the reference in fp32, ours in bf16",
        lambda bench: training_step(bench, "bf16"), budget=30, set_up={"cpu": 90, "cuda": 40},
    ),
]  # fmt: skip
