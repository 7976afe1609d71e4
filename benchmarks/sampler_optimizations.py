"""What each optimization of the sampler gains, and what feature reuse costs:
`python benchmarks/sampler_optimizations.py --out DIR`.

The same request is drawn with everything on, with one lever off at a time, with all off, and with deep features reused at
several intervals and depths: all in turn in one process. Beside each time stands the relative distance |x - x_off| / |x_off| of
its latents to those of the plain loop in fp32. Conditioning before the loop is part of the time, decoding is not.

Without --checkpoint the model is the full-size CCELLA with random weights. Its times are those of a trained one; its distances
are not: a random network magnifies every rounding, and its features change from step to step as no trained one's do.
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
from ccella_fast.storage import check_writable, write_json
from timer import measure

ONE_OFF = ("precompute_conditioning", "channels_last", "packed_weights", "phase_upsampler", "cuda_graph")
REUSES = [Reuse(interval, depth) for interval in (2, 3, 5) for depth in (1, 3)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return entrypoint.run_command(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    check_writable(arguments.out, "--out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = _model(arguments.checkpoint, device)
    request, features = _request(model, config, arguments), _features(model, config)

    def make(optimizations: Optimizations, dtype: str = "auto") -> FastSampler:
        return FastSampler(model, config=config, optimizations=optimizations, dtype=dtype)

    sides: dict[str, Callable[[], torch.Tensor]] = {}

    def add(name: str, sampler: FastSampler, **more: Any) -> None:
        texts = itertools.cycle(features)  # another report each time: its conditioning has to be computed
        sides[name] = lambda: sampler(**request, text=next(texts), **more).latents

    fast = make(Optimizations())
    add("all on", fast)
    for name in ONE_OFF:
        if name != "cuda_graph" or device.type == "cuda":
            add(f"{name} off", make(replace(Optimizations(), **{name: False})))
    add("fp32 weights", make(Optimizations(), "float32"))
    add("all off, fp32", make(Optimizations.off(), "float32"))
    for reuse in REUSES:
        add(f"reuse, interval {reuse.interval}, depth {reuse.depth}", fast, reuse=reuse)
    drawn = {name: draw() for name, draw in sides.items()}
    truth = drawn["all off, fp32"]
    distances = {name: float((latents - truth).norm() / truth.norm()) for name, latents in drawn.items()}
    timings = measure(
        {name: lambda stopwatch, draw=draw: draw() for name, draw in sides.items()},
        device,
        budget=60 * arguments.minutes,
    )
    rows = _rows({name: timing.rounds for name, timing in timings.items()}, distances, arguments.num_steps)
    record = {
        "command": " ".join(["python benchmarks/sampler_optimizations.py", *sys.argv[1:]]),
        "weights": "random" if arguments.checkpoint is None else "trained",
        "steps": arguments.num_steps, "solver": arguments.solver, "latent": list(truth.shape), "dtype": str(fast.dtype),
        "rows": rows, "environment": describe_environment(),
    }  # fmt: skip
    write_json(arguments.out / "sampler_optimizations.json", record)
    line = "{:30} {:>10} {:>14} {:>12}".format
    print(line("", "s a step", "x of all off", "distance"))
    for row in rows:
        print(line(row["name"], f"{row['seconds_a_step']:.4f}", f"{row['speed']:.2f}", f"{row['distance']:.1e}"))
    return 0


def _rows(rounds: dict[str, list[float]], distances: dict[str, float], steps: int) -> list[dict[str, Any]]:
    plain = rounds["all off, fp32"]
    return [
        {
            "name": name,
            "seconds_a_step": statistics.median(seconds) / steps,
            "speed": statistics.median(theirs / ours for theirs, ours in zip(plain, seconds, strict=True)),
            "distance": distances[name],
        }
        for name, seconds in rounds.items()
    ]


def _model(checkpoint: Path | None, device: torch.device):
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint, device=device)
        return loaded.model, loaded.config
    torch.manual_seed(0)
    with device:
        model = build_model("CCELLA").eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # what training starts at zero would hide the rest
            parameter.normal_(0, 0.02)
    return model, config_of(model, None)


def _request(model: Any, config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    channels, grid = sum(config.model.latent_channels), arguments.grid or config.check_grid()
    return {
        "seeds": [0], "pirads": "pos" if model.variant.class_input == "given" else None,
        "num_steps": arguments.num_steps, "solver": arguments.solver, "latent_shape": (channels, *grid),
        "decode": False, "progress": False,
    }  # fmt: skip


def _features(model: Any, config: Any) -> list[torch.Tensor | None]:
    """Of two reports, drawn."""
    if not model.variant.text:
        return [None]
    source = torch.Generator().manual_seed(0)
    return list(torch.randn(2, 1, config.text.max_length, config.model.input_dim, generator=source))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for sampler_optimizations.json")
    parser.add_argument("--checkpoint", type=Path, help="run folder, step folder or .pt (default: random, full size)")
    parser.add_argument("--grid", type=int, nargs=3, metavar="N", help="latent grid (default: the training grid's)")
    parser.add_argument("--num_steps", type=int, default=10, help="steps of each draw (default 10)")
    parser.add_argument("--solver", default="dpmpp_2m", help="default dpmpp_2m")
    parser.add_argument("--minutes", type=float, default=5.0, help="budget of the timed rounds (default 5)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
