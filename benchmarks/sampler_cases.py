"""Sampling: one denoising step, end to end, decode, encode, text; scaling and energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import reference
from cases import Case, Floor, Side, Skip, Trial
from ccella_fast.diffusion import loop
from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import get_solver
from counting import FlashAttention, backend, count
from timer import Watch, measure, summary
from workbench import Workbench

TIMESTEP = 500


def denoising_step(bench: Workbench, batch: int = 1) -> Trial:
    """One step inside the loop: the network and the solver's update. Ours has computed all that depends on the report and the
    timestep before the loop; that cost is a part of the case `sampling`."""
    x, conditions = bench.latent(batch), bench.conditions(batch)
    trial = Trial(shapes={"latent": list(x.shape), "text": list(conditions["text"].shape)})
    noise_scheduler, told = reference.scheduler(bench.config.scheduler, bench.config.scheduler.num_train_timesteps)
    index = len(told) - 1 - TIMESTEP

    @torch.no_grad()
    def theirs(watch: Watch | None = None) -> Tensor:
        timesteps = torch.Tensor((told[index],)).to(x.device).expand(batch)
        with reference.autocast(x.device):
            noise, _ = bench.reference(x, timesteps, **conditions)
            if watch is not None:
                watch.mark("network")
                noise_scheduler.step(noise, noise_scheduler.timesteps[index], x)
                watch.mark("solver")
        return noise

    def ours(model: Any) -> Callable[..., Tensor]:
        schedule = Schedule.from_config(bench.config.scheduler)
        plan = get_solver("ddpm").plan(schedule, len(schedule))
        row = torch.tensor(plan.coefficients[index], dtype=torch.float32, device=x.device)
        with torch.no_grad():
            prepared = model.condition(torch.full((batch,), TIMESTEP, device=x.device), **conditions)

        @torch.no_grad()
        def step(watch: Watch | None = None) -> Tensor:
            noise = model.denoise(x, prepared)
            if watch is not None:
                watch.mark("network")
                plan.step(x, noise.float(), row, torch.randn_like(x), ())
                watch.mark("solver")
            return noise

        return step

    trial.sides["reference"] = Side(bench.reference_precision, theirs, theirs)
    if bench.fast_name != "fp32":
        same = ours(bench.model)
        trial.sides["ours fp32"] = Side("fp32", same, same)
    fast = ours(bench.fast_model)
    trial.sides["ours"] = Side(bench.fast_name, fast, fast)
    trial.truth = lambda: _truth(bench, x, conditions, batch)
    trial.floor = {name: step_floor(bench, batch, side.precision) for name, side in trial.sides.items()}
    return trial


@torch.no_grad()
def _truth(bench: Workbench, x: Tensor, conditions: dict[str, Tensor], batch: int) -> Tensor:
    return bench.reference(x, torch.full((batch,), float(TIMESTEP), device=x.device), **conditions)[0]


def step_floor(bench: Workbench, batch: int, precision: str) -> Floor:
    """FLOPs of the network without the adapter, counted on meta tensors; of the upsamplers' 27 taps 8 are needed.

    Bytes: every weight once, input and output of every convolution once (nothing else has to touch memory)."""
    precision = "fp32" if precision == "fp32" else "bf16"
    width = 4 if precision == "fp32" else 2
    flops, activations, upsampler, weights = _work(bench, batch)
    saved = upsampler * (1 - 8 / 27)
    return Floor(
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


def sampling(bench: Workbench, num_steps: int = 4) -> Trial:
    """The whole way from text features to a volume: all steps of a short chain, then the decoder, batch 1."""
    x, conditions = bench.latent(1), bench.conditions(1)
    schedule, solver = Schedule.from_config(bench.config.scheduler), get_solver("ddpm")
    shape, seeds = list(x.shape[1:]), [7]
    factor = bench.config.autoencoder.factor
    trial = Trial(shapes={"latent": list(x.shape), "volume": [s * factor for s in shape[1:]], "steps": num_steps})

    def theirs(watch: Watch | None = None, policy: Any = None) -> Tensor:
        from ccella_fast.diffusion.noise import generator, randn_per_sample

        start = randn_per_sample(shape, [generator(seeds[0], "start")], device=x.device)
        source = generator(seeds[0], "step", device=x.device)
        latent = reference.sample(
            bench.reference, start, **conditions, config=bench.config.scheduler, num_steps=num_steps,
            generator=source, policy=policy,
        )  # fmt: skip
        if watch is not None:
            watch.mark("steps")
        with torch.no_grad(), policy or reference.autocast(x.device):
            volume = bench.reference_autoencoder.decode_stage_2_outputs(latent).clamp(0, 1)
        if watch is not None:
            watch.mark("decode")
        return volume

    def ours(model: Any, autoencoder: Any) -> Callable[..., Tensor]:
        dtype = next(model.parameters()).dtype

        @torch.no_grad()
        def run(watch: Watch | None = None) -> Tensor:
            def denoise(latent: Tensor, timesteps: Tensor) -> Tensor:
                return model(latent, timesteps, **conditions).noise

            latent = loop.sample(
                denoise, start_noise(shape, seeds, device=x.device), solver=solver, schedule=schedule, seeds=seeds,
                num_steps=num_steps,
            )  # fmt: skip
            if watch is not None:
                watch.mark("steps")
            volume = autoencoder.decode(latent.to(dtype)).float().clamp(0, 1)
            if watch is not None:
                watch.mark("decode")
            return volume

        return run

    trial.sides["reference"] = Side(bench.reference_precision, theirs, theirs)
    if bench.fast_name != "fp32":
        same = ours(bench.model, bench.autoencoder)
        trial.sides["ours fp32"] = Side("fp32", same, same)
    fast = ours(bench.fast_model, bench.fast_autoencoder)
    trial.sides["ours"] = Side(bench.fast_name, fast, fast)
    full = torch.autocast(x.device.type, enabled=False)
    trial.truth = lambda: theirs(policy=full)
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
        def run(watch: Watch | None = None) -> Tensor:
            with torch.autocast(given.device.type, torch.float16, enabled=autocast and given.is_cuda):
                return call(net, value)

        return run

    stock = side(bench.reference_autoencoder, theirs, True)
    trial.sides["reference"] = Side(bench.reference_precision, stock, stock)
    if bench.fast_name != "fp32":
        same = side(bench.autoencoder, ours, False)
        trial.sides["ours fp32"] = Side("fp32", same, same)
    fast = side(bench.fast_autoencoder, ours, False)
    trial.sides["ours"] = Side(bench.fast_name, fast, fast)
    # MONAI's norm rounds to fp16 on a GPU whatever the policy, so the truth is ours in fp32 (equal to MONAI's in the tests).
    trial.truth = side(bench.autoencoder, ours, False)
    with torch.device("meta"):
        net, x = type(bench.autoencoder)(bench.config.autoencoder), torch.empty(given.shape)
    with torch.no_grad():
        counted = count(lambda: ours(net, x))
    elements = counted.bytes_by_op["convolution"] / 4
    for name, row in trial.sides.items():
        precision = "fp32" if row.precision == "fp32" else "bf16"
        width = 4 if precision == "fp32" else 2
        why = f"{counted.flops / 1e12:,.2f} TFLOP (counted), convolution inputs, weights and outputs once"
        trial.floor[name] = Floor(counted.flops, elements * width, precision, why)
    return trial


def text_encoding(bench: Workbench) -> Trial:
    """A report through the configured encoder. Without its weights on this machine there is nothing to measure."""
    from ccella_fast.data.text import TextEncoder
    from ccella_fast.errors import CcellaError

    try:
        encoder = TextEncoder(bench.config.text)
    except (CcellaError, OSError):
        raise Skip(f"the weights of {bench.config.text.encoder} are not on this machine") from None
    reports = ["No focus."] * bench.config.text.batch_size
    trial = Trial(shapes={"reports": len(reports), "tokens": bench.config.text.max_length})
    trial.sides["ours"] = Side(bench.config.text.dtype, lambda watch: encoder.encode(reports), calls=len(reports))
    return trial


def scaling(bench: Workbench) -> Trial:
    """Seconds of one denoising step against the batch, and against the voxels of the latent: slopes in a log-log plot."""
    trial = Trial(shapes={"latent": [1, bench.latent_channels, *bench.latent_grid]})
    model, divisor = bench.fast_model, bench.config.model.divisor
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
        def run(watch: Watch) -> None:
            model.denoise(x, prepared)

        return summary(measure({"": run}, bench.device, budget=1.0)[""].rounds)["median"]

    by_batch = [(batch, seconds(batch, grids[-1] if cpu else bench.latent_grid)) for batch in batches]
    by_voxels = [(math.prod(grid), seconds(1, grid)) for grid in grids]
    for what, points in (("batch", by_batch), ("latent voxels", by_voxels)):
        trial.facts += [(f"step at {what} {value}", time, "s") for value, time in points]
        trial.facts.append((f"slope with {what}", slope(points), "log-log"))
    return trial


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log(cost) over log(size): 1 is proportional, less is better than that, 2 is quadratic."""
    xs, ys = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


CASES = [
    Case(
        "denoising_step", "sampler", "one denoising step in the loop, batch 1: the reference's eager step, and ours",
        denoising_step, quick=("cpu", "cuda"), budget=30, set_up={"cpu": 25, "cuda": 30},
    ),
    Case(
        "decode", "sampler", "latent to volume: MONAI's AutoencoderKlMaisi, and ours", decode,
        quick=("cpu", "cuda"), budget=16, set_up={"cpu": 15, "cuda": 5},
    ),
    Case(
        "sampling", "sampler", "text features to volume at equal steps, decode included: the reference's loop, and ours",
        sampling, quick=("cuda",), budget=40, set_up={"cpu": 120, "cuda": 15},
    ),
    Case(
        "denoising_step_batch_8", "sampler", "one denoising step in the loop, batch 8: the reference's, and ours",
        lambda bench: denoising_step(bench, 8), quick=("cuda",), budget=30, set_up={"cpu": 60, "cuda": 10},
    ),
    Case(
        "encode", "sampler", "volume to latent: MONAI's AutoencoderKlMaisi, and ours", encode,
        quick=("cuda",), budget=12, set_up={"cpu": 15, "cuda": 5},
    ),
    Case("text_encoding", "sampler", "reports to features, per report", text_encoding, set_up={"cpu": 5, "cuda": 5}),
    Case("scaling", "sampler", "how a step's cost grows with the batch and with the latent", scaling,
         set_up={"cpu": 30, "cuda": 20}),
]  # fmt: skip
