"""Sampling: one denoising step, end to end, decode, encode, text; scaling and energy."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import reference
from benchmark_case import BenchmarkCase, Implementation, Roofline, Skip, Trial
from ccella_fast.diffusion.noise import generator, start_noise
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.nvml import open_gpu
from ccella_fast.sampling import FastSampler
from compiled_baseline import CompiledSampler
from fixtures import Workbench
from op_counter import FlashAttention, backend, count
from timer import Stopwatch, measure, slope, summary

TIMESTEP = 500
_ENERGY_SECONDS = 4.0
_STEPS = {"cpu": 2, "cuda": 20}  # of the short chains whose steps are timed


def denoising_step(bench: Workbench, batch: int = 1) -> Trial:
    """A step inside the loop, from a chain of a few of them: network, solver, noise. What does not depend on the noisy latent
    ours has computed before the loop: that is timed in the case `sampling`."""
    steps, seeds = _STEPS[bench.device.type], list(range(batch))
    conditions = bench.conditions(batch)
    shape = [bench.latent_channels, *bench.latent_grid]
    trial = Trial(shapes={"latent": [batch, *shape], "text": list(conditions["text"].shape), "steps": steps})

    # The reference draws one noise for the whole batch, we one a seed: several samples agree where no noise is added.
    gated = steps if batch == 1 else 1

    def theirs(steps: int, policy: Any = None) -> Tensor:
        return _reference_chain(bench, seeds, conditions, steps, policy)

    def ours(steps: int, sampler: FastSampler) -> Tensor:
        # From the second call with equal prompts on everything is hoisted already: what is left are the steps.
        return _our_chain(bench, sampler, seeds, conditions, steps)

    precision = bench.reference_precision
    trial.sides["reference"] = Implementation(
        precision, lambda watch: theirs(steps), lambda: theirs(gated), calls=steps
    )
    for name, (precision, sampler) in bench.samplers.items():
        output = functools.partial(ours, gated, sampler)
        trial.sides[name] = Implementation(
            precision, lambda watch, sampler=sampler: ours(steps, sampler), output, calls=steps
        )
    trial.truth = lambda: theirs(gated, _no_autocast(bench))
    trial.floor = {name: step_floor(bench, batch, side.precision) for name, side in trial.sides.items()}
    trial.notes.append(
        f"a chain of {steps} DDPM steps divided by {steps}; the gate compares latents after {gated} of them"
    )
    return trial


def denoising_step_tuned(bench: Workbench) -> Trial:
    """The same against the tuned peer."""
    steps, seeds, conditions = _STEPS[bench.device.type], [0], bench.conditions(1)
    shape = [bench.latent_channels, *bench.latent_grid]
    bench.tick("tuned peer: copying the model")
    peer = CompiledSampler(bench.model, bench.config.scheduler, bench.fast_dtype)

    def theirs() -> Tensor:
        start, source = start_noise(shape, seeds, device=bench.device), generator(seeds[0], "step", device=bench.device)
        return peer(start, **conditions, num_steps=steps, source=source)

    def ours() -> Tensor:
        return _our_chain(bench, bench.sampler, seeds, conditions, steps)

    trial = Trial(shapes={"latent": [1, *shape], "steps": steps})
    for name, run in (("tuned peer", theirs), ("ours", ours)):
        trial.sides[name] = Implementation(bench.fast_name, lambda watch, run=run: run(), run, calls=steps)
        trial.floor[name] = step_floor(bench, 1, bench.fast_name)
    trial.truth = lambda: _reference_chain(bench, seeds, conditions, steps, _no_autocast(bench))
    compiled = "compiled, max-autotune" if bench.device.type == "cuda" else "not compiled"
    trial.notes.append(
        f"MONAI's U-Net, {bench.fast_name} weights, best attention, {compiled}; first call: its compilation"
    )
    return trial


def energy(bench: Workbench) -> Trial:
    """Joules of a volume, of the GPU alone: NVML's counter over a stretch of whole chains."""
    gpu = open_gpu()
    if isinstance(gpu, str):
        raise Skip(gpu)
    steps, conditions = _STEPS["cuda"], bench.conditions(1)
    trial = Trial(shapes={"latent": [1, bench.latent_channels, *bench.latent_grid], "steps": steps})
    runs: dict[str, Callable[[], Any]] = {
        "reference": lambda: _reference_chain(bench, [0], conditions, steps, None),
        "ours": lambda: _our_chain(bench, bench.sampler, [0], conditions, steps),
    }
    joules = {}
    for name, run in runs.items():
        bench.tick(name)
        run()
        torch.cuda.synchronize()
        begun, before, count = time.perf_counter(), gpu.energy(), 0
        while time.perf_counter() - begun < _ENERGY_SECONDS:
            run()
            torch.cuda.synchronize()
            count += 1
        joules[name] = (gpu.energy() - before) / (count * steps)
        trial.facts.append((f"{name}, a denoising step", joules[name], "J"))
        total = bench.config.scheduler.num_train_timesteps
        trial.facts.append((f"{name}, a volume of {total} steps before its decode", joules[name] * total, "J"))
    trial.facts.append(("reference / ours", joules["reference"] / joules["ours"], "x"))
    return trial


def _reference_chain(
    bench: Workbench, seeds: Sequence[int], conditions: dict[str, Tensor], steps: int, policy: Any
) -> Tensor:
    """The reference draws its noise for the whole batch; for the gate to compare, it starts from our seeds' noise."""
    shape = [bench.latent_channels, *bench.latent_grid]
    start = start_noise(shape, seeds, device=bench.device)
    source = generator(seeds[0], "step", device=bench.device)
    return reference.sample(
        bench.reference, start, **conditions, config=bench.config.scheduler, num_steps=steps, generator=source,
        policy=policy,
    )  # fmt: skip


def _our_chain(
    bench: Workbench, sampler: FastSampler, seeds: Sequence[int], conditions: dict[str, Tensor], steps: int
) -> Tensor:
    result = sampler(
        text=conditions["text"], spacing=(conditions["spacing"] / 100).tolist(), seeds=seeds, num_steps=steps, solver="ddpm",
        latent_shape=(bench.latent_channels, *bench.latent_grid), batch_size=len(seeds), decode=False, progress=False,
    )  # fmt: skip
    return result.latents.to(bench.device)


def _no_autocast(bench: Workbench) -> torch.autocast:
    return torch.autocast(bench.device.type, enabled=False)


def step_floor(bench: Workbench, batch: int, precision: str) -> Roofline:
    """FLOPs of the network without the adapter, counted on meta tensors; of the upsamplers' 27 taps 8 are needed.

    Bytes: every weight once, input and output of every convolution once (nothing else has to touch memory)."""
    precision = "fp32" if precision == "fp32" else "bf16"
    width = 4 if precision == "fp32" else 2
    flops, activations, upsampler, weights = _work(bench, batch)
    saved = upsampler * (1 - 8 / 27)
    return Roofline(
        flops - saved, activations * width + weights * width, precision,
        f"U-Net {flops / 1e9:,.0f} GFLOP (counted) - {saved / 1e9:,.0f} (upsamplers as 8-tap phases); "
        f"{weights / 1e6:,.0f} M weights and {activations / 1e6:,.0f} M convolution inputs and outputs, each once",
        upsampler_flops=upsampler, activation_bytes=activations * width,
    )  # fmt: skip


def _work(bench: Workbench, batch: int) -> tuple[float, float, float, float]:
    """FLOPs of a U-Net pass; elements in and out of its convolutions; FLOPs in its upsamplers; its weights."""
    from ccella_fast.models import build_model

    with torch.device("meta"):
        model = build_model(bench.config)
        x = torch.empty(batch, bench.latent_channels, *bench.latent_grid)
        text = torch.empty(batch, bench.config.text.max_length, bench.config.model.input_dim)
        times, spacing = torch.zeros(batch), torch.zeros(batch, 3)
    unet = getattr(model, "unet", model)
    elements, upsampler = [0], [0]

    def convolution(module: Any, inputs: Any, output: Tensor) -> None:
        elements[0] += inputs[0].numel() + output.numel()
        if type(module).__name__ == "UpsampleConv3d":
            upsampler[0] += 2 * output.numel() * module.weight[0].numel()

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(convolution)
    with torch.no_grad(), FlashAttention(), backend("reference"):
        prepared = model.condition(times, spacing=spacing, text=text)
        elements[0] = upsampler[0] = 0
        counted = count(lambda: model.denoise(x, prepared))
    return counted.flops, elements[0], upsampler[0], sum(p.numel() for p in unet.parameters())


def sampling(bench: Workbench) -> Trial:
    """The whole way from text features to a volume, batch 1. Ours gets another prompt each time."""
    steps, seeds, factor = 2 * _STEPS[bench.device.type], [7], bench.config.autoencoder.factor
    prompts = [bench.conditions(1, seed=seed) for seed in (1, 2)]
    trial = Trial(
        shapes={
            "latent": [1, bench.latent_channels, *bench.latent_grid],
            "volume": [axis * factor for axis in bench.latent_grid], "steps": steps,
        }
    )  # fmt: skip

    def theirs(watch: Stopwatch | None = None) -> Tensor:
        latent = _reference_chain(bench, seeds, prompts[0], steps, None)
        if watch is not None:
            watch.mark("steps")
        with torch.no_grad(), reference.autocast(bench.device):
            volume = bench.reference_autoencoder.decode_stage_2_outputs(latent).clamp(0, 1)
        if watch is not None:
            watch.mark("decode")
        return volume

    @torch.no_grad()
    def truth() -> Tensor:  # the decoder is ours in fp32: MONAI's norm rounds to fp16 on a GPU
        latent = _reference_chain(bench, seeds, prompts[0], steps, _no_autocast(bench))
        return bench.autoencoder.decode(latent).clamp(0, 1)

    def ours(sampler: FastSampler) -> Callable[..., Tensor]:
        turns = itertools.cycle([1, 0])

        @torch.no_grad()
        def run(watch: Stopwatch | None = None) -> Tensor:
            prompt = prompts[0] if watch is None else prompts[next(turns)]
            latent = _our_chain(bench, sampler, seeds, prompt, steps)
            if watch is not None:
                watch.mark("steps")
            volume = sampler.autoencoder.decode(latent.to(sampler.dtype)).float().clamp(0, 1)
            if watch is not None:
                watch.mark("decode")
            return volume

        return run

    trial.sides["reference"] = Implementation(bench.reference_precision, theirs, theirs)
    for name, (precision, sampler) in bench.samplers.items():
        run = ours(sampler)
        trial.sides[name] = Implementation(precision, run, run)
    trial.truth = truth
    trial.notes.append("steps: of ours with the adapter for all timesteps of the chain")
    return trial


def decode(bench: Workbench) -> Trial:
    """Latent to volume. On a CPU half the grid again: the decoder costs as much as 25 denoising steps."""
    grid = [axis // 2 for axis in bench.latent_grid] if bench.device.type == "cpu" else bench.latent_grid
    z = bench.latent(1, grid)
    return _autoencoder(bench, z, lambda net, z: net.decode(z), lambda net, z: net.decode_stage_2_outputs(z))


def encode(bench: Workbench) -> Trial:
    """Volume to the mean and sigma of its latent."""
    factor = bench.config.autoencoder.factor
    grid = [axis // 2 for axis in bench.latent_grid] if bench.device.type == "cpu" else bench.latent_grid
    image = bench.random(1, 1, *[axis * factor for axis in grid]).sigmoid()
    return _autoencoder(bench, image, lambda net, x: net.encode(x)[0], lambda net, x: net.encode(x)[0])


def _autoencoder(bench: Workbench, given: Tensor, ours: Callable, theirs: Callable) -> Trial:
    trial = Trial(shapes={"input": list(given.shape)})

    def side(net: Any, call: Callable, autocast: bool) -> Callable[..., Tensor]:
        value = given.to(next(net.parameters()).dtype)

        @torch.no_grad()
        def run(watch: Stopwatch | None = None) -> Tensor:
            with torch.autocast(given.device.type, torch.float16, enabled=autocast and given.is_cuda):
                return call(net, value)

        return run

    stock = side(bench.reference_autoencoder, theirs, True)
    trial.sides["reference"] = Implementation(bench.reference_precision, stock, stock)
    for name, (precision, sampler) in bench.samplers.items():
        run = side(sampler.autoencoder, ours, False)
        trial.sides[name] = Implementation(precision, run, run)
    # MONAI's norm rounds to fp16 on a GPU whatever the policy, so the truth is ours in fp32 (equal to MONAI's in the tests).
    trial.truth = side(bench.autoencoder, ours, False)
    with torch.device("meta"):
        plain = reference.autoencoder_shared_with(Autoencoder(bench.config.autoencoder), splits=1)
        x = torch.empty(given.shape)
    with torch.no_grad():
        counted = count(lambda: theirs(plain, x))
    elements = counted.bytes_by_op["convolution"] / 4
    for name, row in trial.sides.items():
        precision = "fp32" if row.precision == "fp32" else "bf16"
        width = 4 if precision == "fp32" else 2
        why = f"{counted.flops / 1e12:,.2f} TFLOP (counted), convolution inputs, weights and outputs once"
        trial.floor[name] = Roofline(counted.flops, elements * width, precision, why)
    return trial


def text_encoding(bench: Workbench) -> Trial:
    """A report through the configured encoder. Without its weights on this machine there is nothing to measure."""
    from ccella_fast.data.text_encoder import TextEncoder
    from ccella_fast.errors import CcellaError

    try:
        encoder = TextEncoder(bench.config.text)
    except (CcellaError, OSError):
        raise Skip(f"the weights of {bench.config.text.encoder} are not on this machine") from None
    reports = ["No focus."] * bench.config.text.batch_size
    trial = Trial(shapes={"reports": len(reports), "tokens": bench.config.text.max_length})
    trial.sides["ours"] = Implementation(
        bench.config.text.dtype, lambda watch: encoder.encode(reports), calls=len(reports)
    )
    return trial


def scaling(bench: Workbench) -> Trial:
    """Seconds of one denoising step against the batch, and against the voxels of the latent: slopes in a log-log plot."""
    trial = Trial(shapes={"latent": [1, bench.latent_channels, *bench.latent_grid]})
    model, divisor = bench.sampler.model, bench.config.model.divisor
    cpu = bench.device.type == "cpu"
    batches = [1, 2, 4] if cpu else [1, 2, 4, 8]
    steps = [4, 2, 1] if cpu else [2, 1]
    grids = [[max(divisor, axis // step) for axis in bench.latent_grid] for step in steps]
    if not cpu:
        grids.append([axis * 2 for axis in bench.latent_grid])

    def seconds(batch: int, grid: list[int]) -> float:
        x, conditions = bench.latent(batch, grid), bench.conditions(batch)
        with torch.no_grad():
            prepared = model.condition(torch.full((batch,), TIMESTEP, device=x.device), **conditions)

        @torch.no_grad()
        def run(watch: Stopwatch) -> None:
            model.denoise(x, prepared)

        return summary(measure({"": run}, bench.device, budget=1.0)[""].rounds)["median"]

    by_batch = [(batch, seconds(batch, grids[-1] if cpu else bench.latent_grid)) for batch in batches]
    by_voxels = [(math.prod(grid), seconds(1, grid)) for grid in grids]
    for what, points in (("batch", by_batch), ("latent voxels", by_voxels)):
        trial.facts += [(f"step at {what} {value}", time, "s") for value, time in points]
        trial.facts.append((f"slope with {what}", slope(points), "log-log"))
        trial.curves[f"step against {what}, s"] = points
    return trial


CASES = [
    BenchmarkCase(
        "denoising_step", "sampler", "one denoising step in the loop, batch 1: the reference's eager step, and ours",
        denoising_step, quick=("cpu", "cuda"), profile=True, budget=20, set_up={"cpu": 25, "cuda": 30},
    ),
    BenchmarkCase(
        "decode", "sampler", "latent to volume: MONAI's AutoencoderKlMaisi, and ours", decode,
        quick=("cpu", "cuda"), profile=True, budget=12, set_up={"cpu": 15, "cuda": 5},
    ),
    BenchmarkCase(
        "sampling", "sampler", "text features to volume at equal steps, decode included: the reference's loop, and ours",
        sampling, quick=("cuda",), budget=40, set_up={"cpu": 120, "cuda": 15},
    ),
    BenchmarkCase(
        "denoising_step_batch_8", "sampler", "one denoising step in the loop, batch 8: the reference's, and ours",
        lambda bench: denoising_step(bench, 8), quick=("cuda",), budget=30, set_up={"cpu": 60, "cuda": 10},
    ),
    BenchmarkCase(
        "encode", "sampler", "volume to latent: MONAI's AutoencoderKlMaisi, and ours", encode,
        quick=("cuda",), budget=12, set_up={"cpu": 15, "cuda": 5},
    ),
    BenchmarkCase("text_encoding", "sampler", "reports to features, per report", text_encoding, set_up={"cpu": 5, "cuda": 5}),
    BenchmarkCase("scaling", "sampler", "how a step's cost grows with the batch and with the latent", scaling,
         set_up={"cpu": 30, "cuda": 20}),
    BenchmarkCase(
        "energy", "sampler", "joules of a denoising step and of a volume, by NVML: the reference's, and ours", energy,
        quick=("cuda",), budget=2 * _ENERGY_SECONDS, set_up={"cpu": 0, "cuda": 5},
    ),
    BenchmarkCase(
        "denoising_step_tuned", "sampler", "one denoising step: the tuned peer (compiled, bf16, channels-last), and ours",
        denoising_step_tuned, budget=15, set_up={"cpu": 15, "cuda": 150}, last=True,
    ),
]  # fmt: skip
