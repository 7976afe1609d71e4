"""Sampling: a denoising step, text features to volume, decode, encode, text encoding, scaling and energy."""

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
from benchmark_case import BenchmarkCase, Implementation, PreparedCase, Roofline, Skip
from ccella_fast.diffusion.noise import generator, start_noise
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.nvml import open_gpu
from ccella_fast.sampling import FastSampler
from ccella_fast.variants import SPACING_SCALE
from compiled_baseline import CompiledSampler
from fixtures import Workbench
from op_counter import FlashAttention, backend, count
from timer import Stopwatch, measure, slope, summary

TIMESTEP = 500
_ENERGY_SECONDS = 4.0
STEPS = {"cpu": 2, "cuda": 20}  # in the short chains that are timed


def denoising_step(bench: Workbench, batch: int = 1) -> PreparedCase:
    """A step of the sampling loop (network, solver, noise), from a short chain.

    Ours precomputes the conditioning that does not depend on the noisy latent; the case `sampling` includes that time.
    """
    steps, seeds = STEPS[bench.device.type], list(range(batch))
    conditions = bench.conditions(batch)
    shape = [bench.latent_channels, *bench.latent_grid]
    prepared = PreparedCase(shapes={"latent": [batch, *shape], "text": list(conditions["text"].shape), "steps": steps})

    # The reference draws noise for the whole batch, ours per seed. A batch can therefore be compared after one step only, in
    # which no noise is added.
    compared = steps if batch == 1 else 1

    def baseline(steps: int, policy: Any = None) -> Tensor:
        return _reference_chain(bench, seeds, conditions, steps, policy)

    def ours(steps: int, sampler: FastSampler) -> Tensor:
        # From the second call with equal prompts on, the conditioning is cached and only the steps remain.
        return our_chain(bench, sampler, seeds, conditions, steps)

    precision = bench.reference_precision
    prepared.implementations["reference"] = Implementation(
        precision, lambda stopwatch: baseline(steps), lambda: baseline(compared), calls=steps
    )
    for name, (precision, sampler) in bench.samplers.items():
        output = functools.partial(ours, compared, sampler)
        prepared.implementations[name] = Implementation(
            precision, lambda stopwatch, sampler=sampler: ours(steps, sampler), output, calls=steps
        )
    prepared.truth = lambda: baseline(compared, _no_autocast(bench))
    prepared.rooflines = {
        name: step_roofline(bench, batch, each.precision) for name, each in prepared.implementations.items()
    }
    prepared.notes.append(
        f"a chain of {steps} DDPM steps divided by {steps}; compared with the truth: latents after {compared} of them"
    )
    return prepared


def denoising_step_tuned(bench: Workbench) -> PreparedCase:
    """A denoising step of the compiled baseline and of ours."""
    steps, seeds, conditions = STEPS[bench.device.type], [0], bench.conditions(1)
    shape = [bench.latent_channels, *bench.latent_grid]
    bench.on_progress("compiled baseline: copying the model")
    compiled = CompiledSampler(bench.model, bench.config.scheduler, bench.fast_dtype)

    def baseline() -> Tensor:
        start, source = start_noise(shape, seeds, device=bench.device), generator(seeds[0], "step", device=bench.device)
        return compiled(start, **conditions, num_inference_steps=steps, source=source)

    def ours() -> Tensor:
        return our_chain(bench, bench.sampler, seeds, conditions, steps)

    prepared = PreparedCase(shapes={"latent": [1, *shape], "steps": steps})
    for name, run in (("compiled baseline", baseline), ("ours", ours)):
        prepared.implementations[name] = Implementation(
            bench.fast_name, lambda stopwatch, run=run: run(), run, calls=steps
        )
        prepared.rooflines[name] = step_roofline(bench, 1, bench.fast_name)
    prepared.truth = lambda: _reference_chain(bench, seeds, conditions, steps, _no_autocast(bench))
    how = "compiled with max-autotune, in the first call" if bench.device.type == "cuda" else "not compiled on a CPU"
    prepared.notes.append(f"MONAI's U-Net, {bench.fast_name} weights, best attention, {how}")
    return prepared


def energy(bench: Workbench) -> PreparedCase:
    """Energy of a denoising step and of a volume, of the GPU alone, by NVML's counter over several whole chains."""
    gpu = open_gpu()
    if isinstance(gpu, str):
        raise Skip(gpu)
    steps, conditions = STEPS["cuda"], bench.conditions(1)
    prepared = PreparedCase(shapes={"latent": [1, bench.latent_channels, *bench.latent_grid], "steps": steps})
    runs: dict[str, Callable[[], Any]] = {
        "reference": lambda: _reference_chain(bench, [0], conditions, steps, None),
        "ours": lambda: our_chain(bench, bench.sampler, [0], conditions, steps),
    }
    joules = {}
    for name, run in runs.items():
        bench.on_progress(name)
        run()
        torch.cuda.synchronize()
        begin, before, count = time.perf_counter(), gpu.energy(), 0
        while time.perf_counter() - begin < _ENERGY_SECONDS:
            run()
            torch.cuda.synchronize()
            count += 1
        joules[name] = (gpu.energy() - before) / (count * steps)
        prepared.facts.append((f"{name}, per denoising step", joules[name], "J"))
        total = bench.config.scheduler.num_train_timesteps
        prepared.facts.append((f"{name}, per volume of {total} steps, without decoding", joules[name] * total, "J"))
    prepared.facts.append(("reference / ours", joules["reference"] / joules["ours"], "x"))
    return prepared


def _reference_chain(
    bench: Workbench, seeds: Sequence[int], conditions: dict[str, Tensor], steps: int, policy: Any
) -> Tensor:
    """The reference's loop from the starting noise of our seeds; its step noise is drawn for the whole batch."""
    shape = [bench.latent_channels, *bench.latent_grid]
    start = start_noise(shape, seeds, device=bench.device)
    source = generator(seeds[0], "step", device=bench.device)
    return reference.sample(
        bench.reference, start, **conditions, config=bench.config.scheduler, num_inference_steps=steps, generator=source,
        policy=policy,
    )  # fmt: skip


def our_chain(
    bench: Workbench, sampler: FastSampler, seeds: Sequence[int], conditions: dict[str, Tensor], steps: int
) -> Tensor:
    """The latents of a chain of DDPM steps of our sampler, one for each seed."""
    result = sampler(
        text=conditions["text"], spacing=(conditions["spacing"] / SPACING_SCALE).tolist(), seeds=seeds,
        num_inference_steps=steps, solver="ddpm", latent_shape=(bench.latent_channels, *bench.latent_grid),
        batch_size=len(seeds), decode=False, progress=False,
    )  # fmt: skip
    return result.latents.to(bench.device)


def _no_autocast(bench: Workbench) -> torch.autocast:
    return torch.autocast(bench.device.type, enabled=False)


def step_roofline(bench: Workbench, batch: int, precision: str) -> Roofline:
    """Roofline of a denoising step.

    FLOPs: the network without the adapter, counted on meta tensors, with 8 instead of 27 taps in the upsamplers. Bytes: every
    weight once, and input and output of every convolution once; nothing else has to touch memory.
    """
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
    """FLOPs of a U-Net pass, elements in and out of its convolutions, FLOPs of its upsamplers, and its number of weights."""
    from ccella_fast.models import build_model

    with torch.device("meta"):
        model = build_model(bench.config)
        x = torch.empty(batch, bench.latent_channels, *bench.latent_grid)
        text = torch.empty(batch, bench.config.text.max_length, bench.config.model.input_dim)
        times, spacing = torch.zeros(batch), torch.zeros(batch, 3)
    unet = getattr(model, "unet", model)
    elements, upsampler = [0], [0]

    def count_convolution(module: Any, inputs: Any, output: Tensor) -> None:
        elements[0] += inputs[0].numel() + output.numel()
        if type(module).__name__ == "UpsampleConv3d":
            upsampler[0] += 2 * output.numel() * module.weight[0].numel()

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(count_convolution)
    with torch.no_grad(), FlashAttention(), backend("reference"):
        conditioning = model.condition(times, spacing=spacing, text=text)
        elements[0] = upsampler[0] = 0
        counted = count(lambda: model.denoise(x, conditioning))
    return counted.flops, elements[0], upsampler[0], sum(p.numel() for p in unet.parameters())


def sampling(bench: Workbench) -> PreparedCase:
    """Text features to a volume, batch 1. Ours gets another prompt in each call, so that its conditioning is not cached."""
    steps, seeds, factor = 2 * STEPS[bench.device.type], [7], bench.config.autoencoder.factor
    prompts = [bench.conditions(1, seed=seed) for seed in (1, 2)]
    prepared = PreparedCase(
        shapes={
            "latent": [1, bench.latent_channels, *bench.latent_grid],
            "volume": [axis * factor for axis in bench.latent_grid], "steps": steps,
        }
    )  # fmt: skip

    def baseline(stopwatch: Stopwatch | None = None) -> Tensor:
        latent = _reference_chain(bench, seeds, prompts[0], steps, None)
        if stopwatch is not None:
            stopwatch.mark("steps")
        with torch.no_grad(), reference.autocast(bench.device):
            volume = bench.reference_autoencoder.decode_stage_2_outputs(latent).clamp(0, 1)
        if stopwatch is not None:
            stopwatch.mark("decode")
        return volume

    @torch.no_grad()
    def truth() -> Tensor:  # with our decoder in fp32, because MONAI's norm rounds to fp16 on a GPU
        latent = _reference_chain(bench, seeds, prompts[0], steps, _no_autocast(bench))
        return bench.autoencoder.decode(latent).clamp(0, 1)

    def ours(sampler: FastSampler) -> Callable[..., Tensor]:
        turns = itertools.cycle([1, 0])

        @torch.no_grad()
        def run(stopwatch: Stopwatch | None = None) -> Tensor:
            prompt = prompts[0] if stopwatch is None else prompts[next(turns)]
            latent = our_chain(bench, sampler, seeds, prompt, steps)
            if stopwatch is not None:
                stopwatch.mark("steps")
            volume = sampler.autoencoder.decode(latent.to(sampler.dtype)).float().clamp(0, 1)
            if stopwatch is not None:
                stopwatch.mark("decode")
            return volume

        return run

    prepared.implementations["reference"] = Implementation(bench.reference_precision, baseline, baseline)
    for name, (precision, sampler) in bench.samplers.items():
        run = ours(sampler)
        prepared.implementations[name] = Implementation(precision, run, run)
    prepared.truth = truth
    prepared.notes.append("the steps of ours include the adapter at all timesteps of the chain")
    return prepared


def decode(bench: Workbench) -> PreparedCase:
    """Latent to volume. On a CPU each axis is halved again, because the decoder costs as much as 25 denoising steps."""
    grid = [axis // 2 for axis in bench.latent_grid] if bench.device.type == "cpu" else bench.latent_grid
    z = bench.latent(1, grid)
    return _autoencoder(bench, z, lambda net, z: net.decode(z), lambda net, z: net.decode_stage_2_outputs(z))


def encode(bench: Workbench) -> PreparedCase:
    """Volume to mean and sigma of its latent; the means are compared."""
    factor = bench.config.autoencoder.factor
    grid = [axis // 2 for axis in bench.latent_grid] if bench.device.type == "cpu" else bench.latent_grid
    image = bench.random(1, 1, *[axis * factor for axis in grid]).sigmoid()
    return _autoencoder(bench, image, lambda net, x: net.encode(x)[0], lambda net, x: net.encode(x)[0])


def _autoencoder(bench: Workbench, given: Tensor, ours: Callable, baseline: Callable) -> PreparedCase:
    prepared = PreparedCase(shapes={"input": list(given.shape)})

    def call_of(net: Any, call: Callable, autocast: bool) -> Callable[..., Tensor]:
        value = given.to(next(net.parameters()).dtype)

        @torch.no_grad()
        def run(stopwatch: Stopwatch | None = None) -> Tensor:
            with torch.autocast(given.device.type, torch.float16, enabled=autocast and given.is_cuda):
                return call(net, value)

        return run

    monai = call_of(bench.reference_autoencoder, baseline, True)
    prepared.implementations["reference"] = Implementation(bench.reference_precision, monai, monai)
    for name, (precision, sampler) in bench.samplers.items():
        run = call_of(sampler.autoencoder, ours, False)
        prepared.implementations[name] = Implementation(precision, run, run)
    # MONAI's norm always rounds to fp16 on a GPU, so the truth is ours in fp32, which the tests show to equal MONAI's.
    prepared.truth = call_of(bench.autoencoder, ours, False)
    with torch.device("meta"):
        plain = reference.autoencoder_shared_with(Autoencoder(bench.config.autoencoder), splits=1)
        x = torch.empty(given.shape)
    with torch.no_grad():
        counted = count(lambda: baseline(plain, x))
    elements = counted.bytes_by_op["convolution"] / 4
    for name, implementation in prepared.implementations.items():
        precision = "fp32" if implementation.precision == "fp32" else "bf16"
        width = 4 if precision == "fp32" else 2
        why = f"{counted.flops / 1e12:,.2f} TFLOP (counted), convolution inputs, weights and outputs once"
        prepared.rooflines[name] = Roofline(counted.flops, elements * width, precision, why)
    return prepared


def text_encoding(bench: Workbench) -> PreparedCase:
    """Reports through the configured encoder, skipped when its weights are not on this machine."""
    from ccella_fast.data.text_encoder import TextEncoder
    from ccella_fast.errors import CcellaError

    try:
        encoder = TextEncoder(bench.config.text)
    except (CcellaError, OSError):
        raise Skip(f"the weights of {bench.config.text.encoder} are not on this machine") from None
    reports = ["No focus."] * bench.config.text.batch_size
    prepared = PreparedCase(shapes={"reports": len(reports), "tokens": bench.config.text.max_length})
    prepared.implementations["ours"] = Implementation(
        bench.config.text.dtype, lambda stopwatch: encoder.encode(reports), calls=len(reports)
    )
    return prepared


def scaling(bench: Workbench) -> PreparedCase:
    """Seconds of one denoising step by batch size, and by the number of latent voxels, with log-log slopes."""
    prepared = PreparedCase(shapes={"latent": [1, bench.latent_channels, *bench.latent_grid]})
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
            conditioning = model.condition(torch.full((batch,), TIMESTEP, device=x.device), **conditions)

        @torch.no_grad()
        def run(stopwatch: Stopwatch) -> None:
            model.denoise(x, conditioning)

        return summary(measure({"": run}, bench.device, budget=1.0)[""].rounds)["median"]

    by_batch = [(batch, seconds(batch, grids[-1] if cpu else bench.latent_grid)) for batch in batches]
    by_voxels = [(math.prod(grid), seconds(1, grid)) for grid in grids]
    for what, points in (("batch", by_batch), ("latent voxels", by_voxels)):
        prepared.facts += [(f"step at {what} {value}", time, "s") for value, time in points]
        prepared.facts.append((f"slope with {what}", slope(points), "log-log"))
        prepared.curves[f"step against {what}, s"] = points
    return prepared


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
        "denoising_step_tuned", "sampler", "one denoising step: the compiled baseline (bf16, channels-last), and ours",
        denoising_step_tuned, budget=15, set_up={"cpu": 15, "cuda": 150}, last=True,
    ),
]  # fmt: skip
