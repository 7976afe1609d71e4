"""Measure the gain of each sampler optimization and the error of feature reuse.

    python benchmarks/sampler_optimizations.py --out DIR

The same request is sampled with all optimizations, with one off at a time, with all off, and with deep features reused at
several intervals and depths, in turn in one process. Next to each time, the table has the relative distance |x - x_off| /
|x_off| of the latents to those of the eager baseline in fp32. The time includes conditioning before the loop, but not
decoding.

With --checkpoint and `--real prepared:test`, samples that these studies prompt are decoded too, and the volumes are compared
with the studies by the metrics of `ccella-fast evaluate`. The distance is then that of the latents of all these samples.

Without --checkpoint the model is the full-size CCELLA with random weights. Its times are those of a trained model, but its
distances are not: a random network magnifies rounding errors, and its features change more between steps than a trained one's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ccella_fast import FastSampler, build_model, entrypoint, load_checkpoint
from ccella_fast.environment import describe_environment
from ccella_fast.sampling import Optimizations, Reuse
from ccella_fast.sampling.pretrained import config_of
from ccella_fast.storage import write_json
from sample_quality import LEGEND, SAMPLES, Judged, RealStudies, add_real_options, open_real
from script import add_sampling_options, default_device, make_parser, run_script
from timer import measure

ONE_OFF = ("precompute_conditioning", "channels_last", "packed_weights", "phase_upsampler", "cuda_graph")
REUSES = [Reuse(interval, depth) for interval in (2, 3, 5) for depth in (1, 3)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_script(_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table and write the JSON file."""
    device = default_device()
    loaded = None if arguments.checkpoint is None else load_checkpoint(arguments.checkpoint, device=device)
    real = open_real(arguments, loaded, device)
    model, config = _random_model(device) if loaded is None else (loaded.model, loaded.config)
    request, features = _request(model, config, arguments), _features(model, config)
    compared = request | ({"text": features[0]} if real is None else _prompts(model, real))

    def make(optimizations: Optimizations, dtype: str = "auto") -> FastSampler:
        return FastSampler(model, config=config, optimizations=optimizations, dtype=dtype)

    implementations: dict[str, Callable[[], torch.Tensor]] = {}
    sampled: dict[str, torch.Tensor] = {}

    def add(name: str, sampler: FastSampler, **more: Any) -> None:
        texts = itertools.cycle(features)  # another report in each call, so that its conditioning is computed again
        implementations[name] = lambda: sampler(**request, text=next(texts), **more).latents
        sampled[name] = sampler(**compared, **more).latents

    fast = make(Optimizations())
    add("all on", fast)
    for name in ONE_OFF:
        if name != "cuda_graph" or device.type == "cuda":
            add(f"{name} off", make(replace(Optimizations(), **{name: False})))
    add("fp32 weights", make(Optimizations(), "float32"))
    add("all off, fp32", make(Optimizations.off(), "float32"))
    for reuse in REUSES:
        add(f"reuse, interval {reuse.interval}, depth {reuse.depth}", fast, reuse=reuse)
    truth = sampled["all off, fp32"]
    distances = {name: float((latents - truth).norm() / truth.norm()) for name, latents in sampled.items()}
    judged = {} if real is None else {name: real.compare(latents) for name, latents in sampled.items()}
    timings = measure(
        {name: lambda stopwatch, draw=draw: draw() for name, draw in implementations.items()},
        device,
        budget=60 * arguments.minutes,
    )
    rows = _rows({name: timing.rounds for name, timing in timings.items()}, distances, arguments.num_inference_steps)
    record = {
        "command": " ".join(["python benchmarks/sampler_optimizations.py", *sys.argv[1:]]),
        "weights": "random" if arguments.checkpoint is None else "trained",
        "steps": arguments.num_inference_steps, "solver": arguments.solver, "latent": list(truth.shape),
        "dtype": str(fast.dtype),
        "rows": rows, "evaluation": {name: each.as_json() for name, each in judged.items()},
        "features": [] if real is None else [each.identity for each in real.extractors],
        "environment": describe_environment(),
    }  # fmt: skip
    write_json(arguments.out / "sampler_optimizations.json", record)
    for text in _table(rows, judged):
        print(text)
    return 0


def _table(rows: list[dict[str, Any]], judged: dict[str, Judged]) -> list[str]:
    spaces = list(dict.fromkeys(pair for each in judged.values() for pair in each.spaces()))
    line = ("{:30} {:>10} {:>14} {:>12}" + "  {:>26}" * len(spaces)).format
    lines = [line("", "s per step", "x of all off", "distance", *(", ".join(pair) for pair in spaces))]
    for row in rows:
        cells = ["; ".join(judged[row["name"]].cells(*pair)) for pair in spaces]
        numbers = f"{row['seconds_a_step']:.4f}", f"{row['speed']:.2f}", f"{row['distance']:.1e}"
        lines.append(line(row["name"], *numbers, *cells))
    return [*lines, *([f"Last columns: {LEGEND}"] if spaces else [])]


def _rows(rounds: dict[str, list[float]], distances: dict[str, float], steps: int) -> list[dict[str, Any]]:
    baseline = rounds["all off, fp32"]
    return [
        {
            "name": name,
            "seconds_a_step": statistics.median(seconds) / steps,
            "speed": statistics.median(slow / fast for slow, fast in zip(baseline, seconds, strict=True)),
            "distance": distances[name],
        }
        for name, seconds in rounds.items()
    ]


def _random_model(device: torch.device):
    torch.manual_seed(0)
    with device:
        model = build_model("CCELLA").eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # parameters that are zero before training would hide the effect of others
            parameter.normal_(0, 0.02)
    return model, config_of(model, None)


def _request(model: Any, config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    channels, grid = sum(config.model.latent_channels), arguments.grid or config.check_grid()
    return {
        "seeds": [0], "pirads": "pos" if model.variant.class_input == "given" else None,
        "num_inference_steps": arguments.num_inference_steps, "solver": arguments.solver, "latent_shape": (channels, *grid),
        "decode": False, "progress": False,
    }  # fmt: skip


def _prompts(model: Any, real: RealStudies) -> dict[str, Any]:
    """The part of a request that asks for what the studies show, in batches of the checkpoint's size."""
    prompts = [real.prompt(k) for k in range(max(2, min(SAMPLES, len(real.cases))))]
    return {
        "seeds": list(range(len(prompts))), "spacing": [prompt.spacing for prompt in prompts],
        "text": torch.cat([prompt.text for prompt in prompts if prompt.text is not None]) if model.variant.text else None,
        "pirads": [prompt.pirads for prompt in prompts] if model.variant.class_input == "given" else None,
    }  # fmt: skip


def _features(model: Any, config: Any) -> list[torch.Tensor | None]:
    """Random features of two reports; [None] if the variant takes no text."""
    if not model.variant.text:
        return [None]
    source = torch.Generator().manual_seed(0)
    return list(torch.randn(2, 1, config.text.max_length, config.model.input_dim, generator=source))


def _parser() -> entrypoint.Parser:
    parser = make_parser(str(__doc__))
    add_sampling_options(parser, out="sampler_optimizations.json", grid="the model's")
    parser.add_argument(
        "--checkpoint", type=Path, help="run folder, step folder or .pt (default: full size, random weights)"
    )
    add_real_options(parser)
    parser.add_argument("--num_inference_steps", type=int, default=10, help="sampling steps (default 10)")
    parser.add_argument("--solver", default="dpmpp_2m", help="solver (default dpmpp_2m)")
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes for the timed rounds (default 5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
