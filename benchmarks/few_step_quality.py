"""Measure the error of sampling in few steps, by solver: `python benchmarks/few_step_quality.py --checkpoint RUN --out DIR`.

The error is the distance of the result of few steps to the same solver's result with every training timestep, from the same
starting noise: |x_N - x_T| / |x_T| over the latent. Writes few_step_quality.md, .png and .json.

With `--real prepared:test` each sample is prompted by one of these studies and decoded, and the volumes are compared with the
studies by the metrics of `ccella-fast evaluate`.

With `--random_full_model` the network is the full-size CCELLA with random weights, on a small latent. By itself such a network
does not predict noise, and its samples would grow without bound. Its output is therefore added, at a fixed strength, to the
exact noise of unit Gaussian data.
"""

from __future__ import annotations

import argparse
import functools
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
from ccella_fast.errors import ConfigError, NonFiniteError
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.storage import atomic_path, write_json
from ccella_fast.variants import CLASS_SCALE, SPACING_SCALE
from sample_quality import LEGEND, SAMPLES, Judged, Prompt, RealStudies, add_real_options, open_real
from script import add_sampling_options, default_device, make_parser, run_script

STEPS = (10, 20, 30, 50)
STRENGTH = 0.3  # of the random network's output, in standard deviations of the noise
TOKENS = 77  # in the random text
SMALL_LATENT = (8, 8, 8)
NAMES = [name for name, solver in SOLVERS.items() if not solver.flow]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_script(_parser(), run, argv)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    """Measure all solvers and write the table, the plot and the JSON file."""
    begin = time.perf_counter()
    device = default_device().type
    real: RealStudies | None = None
    if arguments.random_full_model:
        open_real(arguments, None, default_device())
        config, subject = make_config(), "full-size CCELLA, random weights"
        grid = list(arguments.grid or SMALL_LATENT)
        random = random_denoiser(config, Schedule.from_config(config.scheduler), grid, device)

        def denoisers(seed: int) -> DenoiserFn:
            return random

    else:
        loaded = load_checkpoint(arguments.checkpoint, device=device)
        real = open_real(arguments, loaded, default_device())
        config, subject = loaded.config, f"{loaded.variant}, step {loaded.step}, {loaded.weights} weights"
        if config.scheduler.is_flow or config.scheduler.prediction != "epsilon":
            why = f"only networks that predict epsilon are measured here, and this one predicts {config.scheduler.prediction}"
            fix = "compare samples of several --num_inference_steps with `ccella-fast evaluate`"
            raise ConfigError(why, path=loaded.path, field="scheduler.prediction", fix=fix)
        grid = list(arguments.grid or config.check_grid())
        prompt_of = real.prompt if real is not None else constant_prompt(config, arguments)
        model = loaded.model.eval()

        def denoisers(seed: int) -> DenoiserFn:
            return conditioned(model, prompt_of(seed), device)

    schedule, shape = Schedule.from_config(config.scheduler), [sum(config.model.latent_channels), *grid]
    steps = [count for count in STEPS if count < len(schedule)]
    seeds = arguments.seeds or (1 if real is None else min(SAMPLES, len(real.cases)))
    if real is not None and seeds < 2:
        why = "samples are compared with real studies as a set, and a set of one volume has no distance"
        raise ConfigError(why, field="--seeds", fix=f"give at least 2, better {SAMPLES} or more")
    results, latents = measure(denoisers, schedule, shape, steps, arguments.solvers, range(seeds), device)
    judged = {} if real is None else judge(real, latents)
    record = {
        "what": "relative L2 distance of the latent to the same solver's with every timestep, mean over seeds",
        "command": " ".join(["python benchmarks/few_step_quality.py", *sys.argv[1:]]),
        "model": subject, "latent": shape, "reference_steps": len(schedule), "seeds": seeds,
        "results": results,
        "evaluation": [{"solver": name, "steps": n, **each.as_json()} for (name, n), each in judged.items()],
        "features": [] if real is None else [each.identity for each in real.extractors],
        "seconds": round(time.perf_counter() - begin, 1), "environment": describe_environment(),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "few_step_quality.json", record)
    text = table(record, judged)
    for name, content in (("md", text.encode()), ("png", plot(record))):
        with atomic_path(arguments.out / f"few_step_quality.{name}") as temporary:
            temporary.write_bytes(content)
    print(text)
    return 0


def measure(
    denoisers: Callable[[int], DenoiserFn], schedule: Schedule, shape: Sequence[int], steps: Sequence[int],
    solvers: Sequence[str], seeds: Sequence[int], device: str,
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], list[Tensor]]]:  # fmt: skip
    """Measure every solver at every number of steps.

    Args:
        denoisers: For a seed, the network under its prompt as a function of (x, timesteps).
        schedule: The noise schedule of training.
        shape: Of the latent, (C, X, Y, Z).
        steps: The numbers of steps.
        solvers: The names of the solvers.
        seeds: One starting noise per seed.
        device: Where to sample.

    Returns:
        One entry per solver and number of steps: the mean distance over seeds, the distance of each seed, and the spread (the
        standard deviation of the latent relative to that of the result with every timestep). And of each solver and number of
        steps, also with every timestep, the latents on the CPU in the order of the seeds.
    """
    latents: dict[tuple[str, int], list[Tensor]] = {}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    total = len(schedule)
    bar = tqdm(total=len(seeds) * (total + sum(steps)), desc="evaluations of all solvers", mininterval=1.0)
    for seed in seeds:
        denoiser = denoisers(seed)
        references = sample_with_all(denoiser, schedule, shape, total, solvers, seed, device, bar.update)
        for name, truth in zip(solvers, references, strict=True):
            latents.setdefault((name, total), []).append(truth.cpu())
        for count in steps:
            results = sample_with_all(denoiser, schedule, shape, count, solvers, seed, device, bar.update)
            for name, result, truth in zip(solvers, results, references, strict=True):
                latents.setdefault((name, count), []).append(result.cpu())
                distance = ((result - truth).norm() / truth.norm()).item()
                found.setdefault((name, count), []).append((distance, (result.std() / truth.std()).item()))
    bar.close()
    entries = [
        {
            "solver": name, "steps": count, "stochastic": get_solver(name).plan(schedule, count).stochastic,
            "distance": sum(d for d, _ in pairs) / len(pairs), "distances": [d for d, _ in pairs],
            "spread": sum(s for _, s in pairs) / len(pairs),
        }
        for (name, count), pairs in sorted(found.items(), key=lambda item: (solvers.index(item[0][0]), item[0][1]))
    ]  # fmt: skip
    return entries, latents


def judge(real: RealStudies, latents: dict[tuple[str, int], list[Tensor]]) -> dict[tuple[str, int], Judged]:
    """Compare the decoded samples of each solver and number of steps with the real studies."""
    bar = tqdm(latents.items(), desc="comparing with the studies", unit="set", mininterval=1.0)
    return {key: real.compare(samples) for key, samples in bar}


def sample_with_all(
    denoiser: DenoiserFn, schedule: Schedule, shape: Sequence[int], num_inference_steps: int, solvers: Sequence[str], seed: int,
    device: str, done: Callable[[], Any],
) -> list[Tensor]:  # fmt: skip
    """The sample of each solver from one seed.

    All solvers take the same number of evaluations, so they advance together, with one batch per step.

    Raises:
        NonFiniteError: A sample is not finite.
    """
    start = start_noise(shape, [seed], device=device)
    trajectories = [Trajectory(get_solver(name).plan(schedule, num_inference_steps), start, [seed]) for name in solvers]
    for i in range(num_inference_steps):
        outputs = denoiser(torch.cat([each.x for each in trajectories]), torch.cat([each.t for each in trajectories]))
        for trajectory, output in zip(trajectories, outputs.split(1), strict=True):
            trajectory.draw_noise(i)
            trajectory.advance(lambda x, t, output=output: output)
        done()
    results = [trajectory.result()[0] for trajectory in trajectories]
    if not all(bool(result.isfinite().all()) for result in results):
        raise NonFiniteError("a sample is not finite because the model has diverged", fix="use an earlier checkpoint")
    return results


def constant_prompt(config: Config, arguments: argparse.Namespace) -> Callable[[int], Prompt]:
    """The same report (or the null report) and, if the variant takes one, the same class for every seed."""
    text = None
    if config.model.traits.text:
        from ccella_fast.data.text_encoder import TextEncoder

        text = torch.from_numpy(TextEncoder(config.text).encode([arguments.report]).features)
    prompt = Prompt(text, arguments.pirads, config.data.spacing)
    return lambda seed: prompt


def random_denoiser(config: Config, schedule: Schedule, grid: Sequence[int], device: str) -> DenoiserFn:
    """sigma_t x, the expected noise in unit Gaussian data, plus the output of a random network."""
    torch.manual_seed(0)
    model = build_model(config).eval().to(device)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # some weights of a new network are zero
            weight.normal_(0, weight[0].numel() ** -0.5)
    text = torch.randn(1, TOKENS, config.model.input_dim, device=device)
    network = conditioned(model, Prompt(text, None, config.data.spacing), device)
    sigma = torch.tensor((1 - schedule.alphas_cumprod) ** 0.5, dtype=torch.float32, device=device)
    probe = torch.randn(1, sum(config.model.latent_channels), *grid, device=device)
    strength = STRENGTH / network(probe, torch.tensor([len(schedule) // 2], device=device)).std()
    return lambda x, t: sigma[t].view(-1, 1, 1, 1, 1) * x + strength * network(x, t)


def conditioned(model: Any, prompt: Prompt, device: str) -> DenoiserFn:
    """The model under one prompt. The adapter's output is cached by timestep, because all solvers use the same ones."""
    variant, rows = model.variant, {"spacing": torch.tensor([prompt.spacing], device=device) * SPACING_SCALE}
    if variant.class_input == "given":
        rows["pirads"] = torch.tensor([[CLASS_SCALE * (prompt.pirads == name) for name in CLASS_NAMES]], device=device)
    if variant.text:
        assert prompt.text is not None
        rows["text"] = prompt.text.float().to(device)
        adapter, cache = functools.partial(type(model.ella).forward, model.ella), {}

        def cached_adapter(text: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
            for t in set(timesteps.tolist()) - cache.keys():
                cache[t] = adapter(text[:1], torch.tensor([t], device=text.device))
            contexts, heads = zip(*(cache[t] for t in timesteps.tolist()), strict=True)
            return torch.cat(contexts), None if heads[0] is None else torch.cat(heads)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if variant.text:
            model.ella.forward = cached_adapter
        return model(x, t, **{name: row.expand(len(x), *row.shape[1:]) for name, row in rows.items()}).noise

    return denoise


def table(record: dict[str, Any], judged: dict[tuple[str, int], Judged]) -> str:
    """The distances as Markdown tables."""
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
    note = (
        "\\* adds noise at each step: another number of steps follows another path, which causes most of the distance."
    )
    return "\n".join([*lines, "", note, "", *_judged_tables(judged), f"    {record['command']}", ""])


def _judged_tables(judged: dict[tuple[str, int], Judged]) -> list[str]:
    """The lines of a table for each feature space."""
    counts, names = sorted({count for _, count in judged}), list(dict.fromkeys(name for name, _ in judged))
    spaces = list(dict.fromkeys(pair for each in judged.values() for pair in each.spaces()))
    lines = [f"Compared with real studies: {LEGEND}", ""] if judged else []
    for sequence, space in spaces:
        lines += [f"| {sequence}, {space} | {' | '.join(f'{count} steps' for count in counts)} |"]
        lines += [f"|---|{'---:|' * len(counts)}"]
        for name in names:
            cells = ["; ".join(judged[name, count].cells(sequence, space)) for count in counts]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def plot(record: dict[str, Any]) -> bytes:
    """PNG of the distance by the number of steps, log-log; a method of order p has slope -p."""
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


def _parser() -> entrypoint.Parser:
    parser = make_parser(str(__doc__))
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="run folder, step folder or reference .pt")
    model.add_argument(
        "--random_full_model", action="store_true", help="a full-size model with random weights, on a small latent"
    )
    add_sampling_options(parser, out="the table, the plot and the JSON file", grid="the model's; 8 8 8 if random")
    parser.add_argument("--solvers", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    about = f"number of starting noises (default 1; with --real one per study, at most {SAMPLES})"
    parser.add_argument("--seeds", type=entrypoint.whole_number(1), help=about)
    add_real_options(parser)
    parser.add_argument("--report", default="", help="prompt, for variants that take one (default: the null report)")
    parser.add_argument("--pirads", choices=CLASS_NAMES, default="pos", help="class, for variants that take one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
