"""A denoising step and a training step with another backend for one kernel at a time: what each kernel gains the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmark_case import BenchmarkCase, Implementation, PreparedCase
from cases.sampler import STEPS, our_chain
from cases.training import batch_stream, build_engine, training_config
from ccella_fast.diffusion.objective import Objective
from ccella_fast.kernels.backend import KERNELS, choose, triton_unsupported_reason
from ccella_fast.sampling import FastSampler
from fixtures import Workbench
from op_counter import backend
from synthetic_dataset import write_prepared
from timer import Stopwatch

Run = Callable[[Stopwatch], Any]


def choices(bench: Workbench) -> tuple[dict[str, str], dict[str, str]]:
    """Title -> value of CCELLA_FAST_BACKEND, the defaults first; and title -> reason of those that are not supported here."""
    supported, missing = {"defaults": ""}, {}
    for kernel in KERNELS:
        support = import_module(f"ccella_fast.kernels.{kernel}").backend_support(bench.device, bench.fast_dtype)
        default = choose(kernel, support)
        for name, reason in support.items():
            if reason is not None:
                missing[f"{kernel}: {name}"] = reason
            elif name != default:
                supported[f"{kernel}: {name}"] = f"{kernel}={name}"
    if triton_unsupported_reason(bench.device, bench.fast_dtype) is None:
        supported["all Triton"] = "triton"
    return supported | {"all PyTorch": "reference"}, missing


def _under(value: str, run: Run) -> Run:
    def wrapped(stopwatch: Stopwatch) -> Any:
        with backend(value):
            return run(stopwatch)

    return wrapped


def denoising_step_by_kernel(bench: Workbench) -> PreparedCase:
    """A captured step of the sampler's loop, one sampler per choice."""
    steps, conditions = STEPS[bench.device.type], bench.conditions(1)
    shape = [bench.latent_channels, *bench.latent_grid]
    supported, missing = choices(bench)
    prepared = PreparedCase(shapes={"latent": [1, *shape], "steps": steps}, missing=missing)
    for title, value in supported.items():
        with backend(value):
            sampler = FastSampler(bench.model, bench.autoencoder, config=bench.config)
        run = _under(value, lambda stopwatch, sampler=sampler: our_chain(bench, sampler, [0], conditions, steps))
        prepared.implementations[title] = Implementation(bench.fast_name, run, calls=steps)
    prepared.notes.append("times faster: than with the default backends")
    return prepared


def training_step_by_kernel(bench: Workbench) -> PreparedCase:
    """Forward, backward and optimizer of train.py's engine, also with activation checkpointing."""
    from ccella_fast.training.engine import checkpoint_function
    from ccella_fast.training.loop import joint_loss

    bench.release()
    cuda = bench.device.type == "cuda"
    precision, batch = ("bf16", bench.config.training.batch_size) if cuda else ("fp32", 1)
    config = training_config(bench, precision, batch)
    folder = tempfile.TemporaryDirectory(prefix="ccella-bench-")
    data = write_prepared(Path(folder.name) / "prepared", config, cases=2 * batch)
    engine = build_engine(bench, config, Path(folder.name))
    objective, samples = (
        Objective.from_config(config),
        batch_stream(config, data, bench.device).micro_batch(0, 0),
    )

    def step(stopwatch: Stopwatch) -> None:
        losses = joint_loss(engine, samples, objective, config.class_loss_weight)
        stopwatch.mark("forward")
        engine.backward(losses.total)
        stopwatch.mark("backward")
        engine.step()
        stopwatch.mark("optimizer")

    def recomputing(stopwatch: Stopwatch) -> None:
        engine.module.set_activation_checkpointing(checkpoint_function(None))
        try:
            step(stopwatch)
        finally:
            engine.module.set_activation_checkpointing(None)

    supported, missing = choices(bench)
    prepared = PreparedCase(shapes={"latent": [batch, bench.latent_channels, *bench.latent_grid]}, missing=missing)
    for title, value in supported.items():
        prepared.implementations[title] = Implementation(precision, _under(value, step))
    prepared.implementations["activation checkpointing"] = Implementation(precision, recomputing)
    prepared.notes.append("times faster: than with the default backends")
    prepared.keep_alive.append(folder)
    return prepared


CASES = [
    BenchmarkCase(
        "denoising_step_by_kernel", "kernels", "a denoising step with another backend for one kernel at a time",
        denoising_step_by_kernel, budget=8, set_up={"cpu": 30, "cuda": 25},
    ),
    BenchmarkCase(
        "training_step_by_kernel", "kernels", "a training step with another backend for one kernel at a time",
        training_step_by_kernel, budget=12, set_up={"cpu": 60, "cuda": 40},
    ),
]  # fmt: skip
