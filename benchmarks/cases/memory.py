"""Memory: peaks of a denoising step and the decoder, activations of training, the largest latent, checkpoints on disk."""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reference
from benchmark_case import BenchmarkCase, Implementation, PreparedCase, Skip
from cases.sampler import TIMESTEP
from ccella_fast.hardware import free_memory
from fixtures import Workbench
from op_counter import FlashAttention, HalfAutocast, backend, saved_bytes
from timer import Stopwatch

OUT = Path(__file__).resolve().parents[2] / "out"
_GIB, _MIB = 2**30, 2**20
# Per parameter: weights, gradients and two moments in fp32; and the reference's fp16 casts of the weights, or our bf16 weights.
_STATE_BYTES = {"reference": 16 + 2, "ours": 16 + 2}
_RESERVE = 4 * _GIB  # CUDA context, workspaces, temporary tensors of the widest block
_MOST_SECONDS = 20.0  # a training step longer than this ends the search for a larger latent


def peak(run: Callable[[], Any], device: torch.device) -> float:
    """Peak bytes of `run` above the level before it: of torch's allocator on a GPU, of the process on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    before = _process_bytes("VmRSS")
    run()
    return max(0, _process_bytes("VmHWM") - before)


def _process_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def denoising_memory(bench: Workbench) -> PreparedCase:
    """Peak memory of one denoising step, without weights and inputs."""
    x, conditions = bench.latent(1), bench.conditions(1)
    timesteps = torch.full((1,), float(TIMESTEP), device=bench.device)
    with torch.no_grad():
        conditioning = bench.sampler.model.condition(timesteps, **conditions)

    @torch.no_grad()
    def baseline() -> None:
        with reference.autocast(bench.device):
            bench.reference(x, timesteps, **conditions)

    @torch.no_grad()
    def ours() -> None:
        bench.sampler.model.denoise(x, conditioning)

    return _peaks(bench, {"reference": baseline, "ours": ours}, {"latent": list(x.shape)})


def decode_memory(bench: Workbench) -> PreparedCase:
    """Peak memory of the decoder, without weights and inputs."""
    grid = [axis // 2 for axis in bench.latent_grid] if bench.device.type == "cpu" else bench.latent_grid
    z = bench.latent(1, grid)

    @torch.no_grad()
    def baseline() -> None:
        with reference.autocast(bench.device):
            bench.reference_autoencoder.decode_stage_2_outputs(z)

    @torch.no_grad()
    def ours() -> None:
        bench.sampler.autoencoder.decode(z.to(bench.fast_dtype))

    return _peaks(bench, {"reference": baseline, "ours": ours}, {"latent": list(z.shape)})


def _peaks(bench: Workbench, runs: dict[str, Callable[[], Any]], shapes: dict[str, Any]) -> PreparedCase:
    prepared = PreparedCase(shapes=shapes)
    found = {}
    for name, run in runs.items():
        run()  # allocates caches and workspaces that persist
        found[name] = peak(run, bench.device)
        prepared.facts.append((f"{name}, peak beyond weights", found[name] / _MIB, "MiB"))
    if found["ours"]:
        prepared.facts.append(("reference / ours", found["reference"] / found["ours"], "x"))
    counter = "the peak of torch's allocator" if bench.device.type == "cuda" else "the peak of the process"
    prepared.notes.append(f"measured as {counter}")
    return prepared


def training_memory(bench: Workbench) -> PreparedCase:
    """Bytes that autograd keeps for the backward pass, per voxel of the latent: counted, for the 16-bit paths of a GPU."""
    grid = bench.config.check_grid()
    kept = {name: activation_bytes(bench, name, grid) for name in ("reference", "ours")}
    prepared = PreparedCase(shapes={"latent": [1, bench.latent_channels, *grid]})
    for name, (voxel, fixed) in kept.items():
        prepared.facts.append((f"{name}, kept per latent voxel", voxel / 1024, "KiB"))
        prepared.facts.append((f"{name}, kept whatever the latent", fixed / _MIB, "MiB"))
    prepared.facts.append(("reference / ours, per voxel", kept["reference"][0] / kept["ours"][0], "x"))
    return prepared


def activation_bytes(bench: Workbench, implementation: str, grid: list[int]) -> tuple[float, float]:
    """Bytes that autograd keeps at batch 1: (per latent voxel, independent of the latent), a line through two grids.

    `implementation` is "reference" or "ours"; `grid` is the larger of the two latent grids.
    """
    from ccella_fast.models import build_model

    with torch.device("meta"):
        model: Any = build_model(bench.config)
        if implementation == "reference":
            model = reference.shared_with(model)
            for module in model.modules():
                if hasattr(module, "use_flash_attention"):
                    module.use_flash_attention = True
        else:
            model = model.bfloat16()

    def kept(grid: list[int]) -> int:
        dtype = torch.float32 if implementation == "reference" else torch.bfloat16
        with torch.device("meta"):
            x = torch.empty(1, bench.latent_channels, *grid, dtype=dtype)
            text = torch.empty(1, bench.config.text.max_length, bench.config.model.input_dim, dtype=dtype)
            times, spacing = torch.zeros(1), torch.zeros(1, 3)
        mode = HalfAutocast() if implementation == "reference" else FlashAttention()
        with mode, backend("triton"):
            return saved_bytes(lambda: model(x, times, spacing=spacing, text=text)[0].float().mean())

    small = [axis // 2 for axis in grid]
    voxels, few = math.prod(grid), math.prod(small)
    more, less = kept(grid), kept(small)
    slope = (more - less) / (voxels - few)
    return slope, more - slope * voxels


def largest_latent(bench: Workbench) -> PreparedCase:
    """The largest latent that trains at batch 1: computed for both implementations, and on a GPU tried with ours."""
    bench.release()
    grid = bench.config.check_grid()
    total = free_memory(bench.device)
    prepared = PreparedCase(shapes={"memory_bytes": total})
    parameters = bench.parameters
    for name, state in _STATE_BYTES.items():
        voxel, fixed = activation_bytes(bench, name, grid)
        left = total - parameters * state - fixed - _RESERVE
        prepared.facts.append((f"{name}, by arithmetic", max(0.0, left / voxel) / 1e6, "M voxels"))
    prepared.notes.append(
        f"free memory less {18 * parameters / _GIB:.1f} GiB of states and {_RESERVE / _GIB:.0f} GiB of reserve"
    )
    if bench.device.type != "cuda":
        prepared.notes.append("the numbers above are computed, for 16 bit; on a GPU they are also tried")
        return prepared
    prepared.facts.append(("ours, tried", _try_larger(bench, grid) / 1e6, "M voxels"))
    return prepared


def _try_larger(bench: Workbench, grid: list[int]) -> int:
    """Double the shortest axis until a training step of the bf16 model no longer fits."""
    model = bench.sampler.model.train().requires_grad_(True)
    states = [
        torch.empty(parameter.numel() * 12, dtype=torch.uint8, device=bench.device) for parameter in model.parameters()
    ]
    fits, grid = 0, list(grid)
    try:
        while True:
            bench.on_progress(f"trying {grid}")
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            x, conditions = bench.latent(1, grid), bench.conditions(1)
            model(x, torch.tensor([TIMESTEP], device=bench.device), **conditions).noise.float().abs().mean().backward()
            end.record()
            torch.cuda.synchronize()
            fits = math.prod(grid)
            if start.elapsed_time(end) / 1e3 > _MOST_SECONDS:
                return fits
            grid[grid.index(min(grid))] *= 2
    except torch.OutOfMemoryError:
        return fits
    finally:
        del states
        model.requires_grad_(False).eval()
        for parameter in model.parameters():
            parameter.grad = None


def checkpoint(bench: Workbench) -> PreparedCase:
    """Weights and optimizer to disk and back: one torch.save as in the reference, and our checkpoint with hashes and fsync."""
    from cases.training import build_engine, training_config
    from ccella_fast.checkpoint import read_state, step_folder
    from ccella_fast.processes import HostCollectives
    from ccella_fast.training import checkpointing
    from ccella_fast.training.flat_adamw import MOMENTS
    from ccella_fast.training.run_status import RunStatus

    bench.release()
    size = bench.parameters * 20
    OUT.mkdir(exist_ok=True)
    if shutil.disk_usage(OUT).free < 3 * size or free_memory(bench.device) < 1.6 * size:
        raise Skip(f"it needs {3 * size / 1e9:.0f} GB of disk space and {1.6 * size / 1e9:.0f} GB of memory")
    folder = tempfile.TemporaryDirectory(prefix="checkpoint-", dir=OUT)
    config = training_config(bench, "fp32", 1)
    engine = build_engine(bench, config, Path(folder.name))
    engine.optimizer.step()
    run = Path(folder.name) / "run"
    status = RunStatus(run, writes=False)
    facts: dict[str, Any] = {"scale_factor": [1.0], "intensity_scale": {}}
    writer = checkpointing.CheckpointWriter(run, engine, None, config, facts, None, status, HostCollectives())

    def baseline(stopwatch: Stopwatch) -> None:
        path = Path(folder.name) / "reference.pt"
        moments = {name: getattr(engine.optimizer, name) for name in MOMENTS}
        torch.save({"unet_state_dict": engine.module.state_dict(), "optimizer": moments}, path)
        stopwatch.mark("save")
        loaded = torch.load(path, map_location=bench.device, weights_only=True)
        engine.module.load_state_dict(loaded["unet_state_dict"])
        stopwatch.mark("load")

    def ours(stopwatch: Stopwatch) -> None:
        shutil.rmtree(run, ignore_errors=True)
        writer.save(1, {})
        stopwatch.mark("copy")
        writer.finish()
        stopwatch.mark("save")
        folder = step_folder(run, 1)
        checkpointing.restore_checkpoint(folder, engine, None, read_state(folder))
        stopwatch.mark("load")

    prepared = PreparedCase(shapes={"parameters": sum(p.numel() for p in engine.module.parameters())})
    prepared.implementations = {"reference": Implementation("fp32", baseline), "ours": Implementation("fp32", ours)}
    prepared.notes.append(
        "ours also writes the SHA-256 of every file and waits for the disk; training waits for the part `copy` alone"
    )
    prepared.keep_alive.append(folder)
    return prepared


CASES = [
    BenchmarkCase("training_memory", "memory", "bytes kept for backward: the reference under fp16 autocast, ours in bf16",
         training_memory, quick=("cpu", "cuda"), budget=0, set_up={"cpu": 5, "cuda": 10}),
    BenchmarkCase("denoising_memory", "memory", "peak memory of one denoising step: the reference's and ours", denoising_memory,
         quick=("cuda",), budget=0, set_up={"cpu": 20, "cuda": 5}),
    BenchmarkCase("decode_memory", "memory", "peak memory of the decoder: MONAI's, and ours", decode_memory,
         quick=("cuda",), budget=0, set_up={"cpu": 30, "cuda": 5}),
    BenchmarkCase("largest_latent", "memory", "the largest latent that trains at batch 1", largest_latent,
         budget=0, set_up={"cpu": 20, "cuda": 60}),
    BenchmarkCase("checkpoint", "memory", "a training checkpoint to disk and back: torch.save, and ours", checkpoint,
         budget=0, set_up={"cpu": 150, "cuda": 90}),
]  # fmt: skip
