"""What fewer steps cost, for each solver: `python benchmarks/few_step_quality.py --checkpoint RUN --out DIR`.

Distance of the result of few steps to the same solver's result with every training timestep, from the same starting noise:
|x_N - x_T| / |x_T| over the latent. Writes few_step_quality.md, .png and .json.

With `--random_full_model` the network is the full-size CCELLA with random weights, on a small latent. Alone such a network
predicts no noise and its samples would grow without bound, so it is added, at a fixed strength, to the exact noise of unit
Gaussian data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast import build_model, entrypoint, load_checkpoint
from ccella_fast.config import Config, make_config
from ccella_fast.diffusion.noise import start_noise
from ccella_fast.diffusion.schedule import Schedule
from ccella_fast.diffusion.solvers import SOLVERS, get_solver
from ccella_fast.diffusion.trajectory import DenoiserFn, Trajectory
from ccella_fast.environment import describe_environment
from ccella_fast.errors import NonFiniteError
from ccella_fast.sampling.request import CLASSES
from ccella_fast.storage import atomic_path, check_writable, write_json
from ccella_fast.variants import CLASS_SCALE, SPACING_SCALE

STEPS = (10, 20, 30, 50)
STRENGTH = 0.3  # of the random network, in standard deviations of the noise
TOKENS = 77  # of the random text
SMALL_LATENT = (8, 8, 8)
NAMES = [name for name, solver in SOLVERS.items() if not solver.flow]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return entrypoint.run_command(lambda: run(arguments), debug=arguments.debug)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    check_writable(arguments.out, "--out")
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.random_full_model:
        config, subject = make_config(), "full-size CCELLA, random weights"
        grid = list(arguments.grid or SMALL_LATENT)
        denoiser = random_denoiser(config, Schedule.from_config(config.scheduler), grid, device)
    else:
        loaded = load_checkpoint(arguments.checkpoint, device=device)
        config, subject = loaded.config, f"{loaded.variant}, step {loaded.step}, {loaded.weights} weights"
        grid = list(arguments.grid or config.check_grid())
        denoiser = checkpoint_denoiser(loaded.model.eval(), config, arguments, device)
    schedule, shape = Schedule.from_config(config.scheduler), [sum(config.model.latent_channels), *grid]
    steps = [count for count in STEPS if count < len(schedule)]
    results = measure(denoiser, schedule, shape, steps, arguments.solvers, range(arguments.seeds), device)
    record = {
        "what": "relative L2 distance of the latent to the same solver's with every timestep, mean over seeds",
        "command": " ".join(["python benchmarks/few_step_quality.py", *sys.argv[1:]]),
        "model": subject, "latent": shape, "reference_steps": len(schedule), "seeds": arguments.seeds,
        "results": results, "seconds": round(time.perf_counter() - began, 1), "environment": describe_environment(),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "few_step_quality.json", record)
    text = table(record)
    for name, content in (("md", text.encode()), ("png", plot(record))):
        with atomic_path(arguments.out / f"few_step_quality.{name}") as temporary:
            temporary.write_bytes(content)
    print(text)
    return 0


def measure(
    denoiser: DenoiserFn, schedule: Schedule, shape: Sequence[int], steps: Sequence[int], solvers: Sequence[str],
    seeds: Sequence[int], device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """One entry for each solver and number of steps: the mean distance, each seed's, and the spread (the standard deviation of
    the latent over the reference's)."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    total = len(schedule)
    bar = tqdm(total=len(seeds) * (total + sum(steps)), desc="evaluations of all solvers", mininterval=1.0)
    for seed in seeds:
        reference = together(denoiser, schedule, shape, total, solvers, seed, device, bar.update)
        for count in steps:
            results = together(denoiser, schedule, shape, count, solvers, seed, device, bar.update)
            for name, result, truth in zip(solvers, results, reference, strict=True):
                distance = ((result - truth).norm() / truth.norm()).item()
                found.setdefault((name, count), []).append((distance, (result.std() / truth.std()).item()))
    bar.close()
    return [
        {
            "solver": name, "steps": count, "stochastic": get_solver(name).plan(schedule, count).stochastic,
            "distance": sum(d for d, _ in pairs) / len(pairs), "distances": [d for d, _ in pairs],
            "spread": sum(s for _, s in pairs) / len(pairs),
        }
        for (name, count), pairs in sorted(found.items(), key=lambda item: (solvers.index(item[0][0]), item[0][1]))
    ]  # fmt: skip


def together(
    denoiser: DenoiserFn, schedule: Schedule, shape: Sequence[int], num_steps: int, solvers: Sequence[str], seed: int,
    device: str, done: Callable[[], Any],
) -> list[Tensor]:  # fmt: skip
    """The sample of each solver from one seed. They walk side by side, one batch for all: they take as many evaluations."""
    start = start_noise(shape, [seed], device=device)
    walks = [Trajectory(get_solver(name).plan(schedule, num_steps), start, [seed]) for name in solvers]
    for i in range(num_steps):
        outputs = denoiser(torch.cat([walk.x for walk in walks]), torch.cat([walk.t for walk in walks]))
        for walk, output in zip(walks, outputs.split(1), strict=True):
            walk.draw_noise(i)
            walk.advance(lambda x, t, output=output: output)
        done()
    results = [walk.result()[0] for walk in walks]
    if not all(bool(result.isfinite().all()) for result in results):
        raise NonFiniteError("a sample is not finite: the model has diverged", fix="use an earlier checkpoint")
    return results


def checkpoint_denoiser(model: Any, config: Config, arguments: argparse.Namespace, device: str) -> DenoiserFn:
    """The checkpoint's network under one report (or the null report) and, where it takes one, one class."""
    row, text, pirads = model.variant, None, None
    if row.class_input == "given":
        pirads = torch.tensor([[CLASS_SCALE * (arguments.pirads == name) for name in CLASSES]], device=device)
    if row.text:
        from ccella_fast.data.text_encoder import TextEncoder

        text = torch.from_numpy(TextEncoder(config.text).encode([arguments.report]).features).float().to(device)
    return conditioned(model, torch.tensor([config.data.spacing], device=device) * SPACING_SCALE, text, pirads)


def random_denoiser(config: Config, schedule: Schedule, grid: Sequence[int], device: str) -> DenoiserFn:
    """sigma_t x, which is the noise expected in unit Gaussian data, and the random network's word on top."""
    torch.manual_seed(0)
    model = build_model(config).eval().to(device)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # fresh networks end in zeros
            weight.normal_(0, weight[0].numel() ** -0.5)
    text = torch.randn(1, TOKENS, config.model.input_dim, device=device)
    network = conditioned(model, torch.tensor([config.data.spacing], device=device) * SPACING_SCALE, text, None)
    sigma = torch.tensor((1 - schedule.alphas_cumprod) ** 0.5, dtype=torch.float32, device=device)
    probe = torch.randn(1, sum(config.model.latent_channels), *grid, device=device)
    strength = STRENGTH / network(probe, torch.tensor([len(schedule) // 2], device=device)).std()
    return lambda x, t: sigma[t].view(-1, 1, 1, 1, 1) * x + strength * network(x, t)


def conditioned(model: Any, spacing: Tensor, text: Tensor | None, pirads: Tensor | None) -> DenoiserFn:
    """model under one condition. What its adapter makes of the text at a timestep is remembered: all solvers visit the same."""
    if text is not None:
        adapter, known = model.ella.forward, {}

        def remembering(text: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
            for t in set(timesteps.tolist()) - known.keys():
                known[t] = adapter(text[:1], torch.tensor([t], device=text.device))
            contexts, heads = zip(*(known[t] for t in timesteps.tolist()), strict=True)
            return torch.cat(contexts), None if heads[0] is None else torch.cat(heads)

        model.ella.forward = remembering

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        rows = {"spacing": spacing, "text": text, "pirads": pirads}
        return model(x, t, **{k: None if v is None else v.expand(len(x), *v.shape[1:]) for k, v in rows.items()}).noise

    return denoise


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    counts = sorted({entry["steps"] for entry in record["results"]})
    lines = [
        f"Few-step quality: {record['model']}, latent {record['latent']}, {record['seeds']} seed(s)",
        "",
        f"Relative L2 distance to the same solver's {record['reference_steps']}-step result; in brackets the standard "
        "deviation over that result's.",
        "",
        f"| solver | {' | '.join(f'{count} steps' for count in counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for name in dict.fromkeys(entry["solver"] for entry in record["results"]):
        entries = {entry["steps"]: entry for entry in record["results"] if entry["solver"] == name}
        cells = [f"{entries[count]['distance']:.4f} ({entries[count]['spread']:.3f})" for count in counts]
        mark = " *" if entries[counts[0]]["stochastic"] else ""
        lines.append(f"| {name}{mark} | {' | '.join(cells)} |")
    note = "\\* adds noise at each step: another number of steps is another path, and most of the distance is that."
    return "\n".join([*lines, "", note, "", f"    {record['command']}", ""])


def plot(record: dict[str, Any]) -> bytes:
    """Distance against steps, both logarithmic; a method of order p falls with slope -p."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    counts = sorted({entry["steps"] for entry in record["results"]})
    for name in dict.fromkeys(entry["solver"] for entry in record["results"]):
        entries = [entry for entry in record["results"] if entry["solver"] == name]
        style = "--" if entries[0]["stochastic"] else "-"
        label = f"{name} (adds noise)" if entries[0]["stochastic"] else name
        axes.plot([e["steps"] for e in entries], [e["distance"] for e in entries], style, marker="o", ms=4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("steps")
    axes.set_ylabel(f"relative L2 distance to {record['reference_steps']} steps")
    axes.set_title(record["model"], fontsize=10, loc="left")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="run folder, step folder or reference .pt")
    model.add_argument("--random_full_model", action="store_true", help="full size, random weights, small latent")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, the plot and the JSON")
    parser.add_argument(
        "--grid", type=int, nargs=3, metavar="N", help="latent voxels (default: the model's; 8 8 8 if random)"
    )
    parser.add_argument("--solvers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, default=1, help="how many starting noises (default 1)")
    parser.add_argument("--report", default="", help="prompt of a checkpoint that takes one (default: the null report)")
    parser.add_argument("--pirads", choices=CLASSES, default="pos", help="class, for variants that are given one")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
