"""Choose the launch configurations of the kernels by measurement on this machine's GPU.

    python benchmarks/tune_kernels.py [--kernel attention] [--seconds 150] [--report FILE] [--dry_run]

Every shipped configuration that the default model uses is varied in one or two factors (block sizes halved and doubled, warps,
stages). Worker processes compile the candidates and discard those that do not run or whose result differs from the shipped
configuration's (`kernel_trials.py`). Then the launch that a configuration belongs to is timed by itself, in a CUDA graph
(`kernel_launches.py`), at every size at which the model makes it (`kernel_workloads.py`), the largest share of a step first.
The fastest candidate is written to kernels/tuned/<chip>.json if its gain exceeds the noise; `kernels/tuning.py` reads that file
from then on.

Both files are written after every configuration, so a run that is cut off keeps what it has found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ccella_fast import entrypoint
from ccella_fast.errors import ConfigError
from ccella_fast.kernels import tuning
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig
from ccella_fast.storage import atomic_path
from kernel_launches import launches_of, record_launches, time_in_graph
from kernel_trials import OK, Candidate, Trial, TrialPool
from kernel_workloads import BATCHES, GRID, Call, Workload, workloads
from script import default_device, make_parser, run_script

GAIN = 1.03  # a smaller speedup is noise
MOST_CANDIDATES = 24  # of a configuration
PIPELINED = (
    "attention",
    "cross_attention",
    "upsample_conv3d",
    "conv3d",
)  # loops with tl.dot over many tiles; the others ignore the stages
SWITCHES = ("TRANSPOSED",)  # constants that are 0 or 1
COMPILING = 0.6  # most of the time limit that compilation may take

Measure = Callable[[Sequence[Callable[[], Any]]], float]  # `time_in_graph`, or what a test uses instead


class Tuned(NamedTuple):
    """What was found for one key: the best configuration, its speedup, and seconds by workload for each candidate timed."""

    config: LaunchConfig
    gain: float
    times: list[dict[str, float]]


def candidates(kernel: str, shipped: LaunchConfig) -> list[LaunchConfig]:
    """The shipped configuration, then its neighbors: one factor changed, then two, those first that keep the work per warp.

    Each is there with both values of a switch.
    """
    blocks = tuple(shipped.constants.items())
    sizes = [name not in SWITCHES for name in shipped.constants] + [True, True]  # also warps and stages
    factors = [[0, 1] if name in SWITCHES else sorted({size, _halved(size), 2 * size}) for name, size in blocks]
    factors.append(sorted({shipped.num_warps, max(1, shipped.num_warps // 2), min(16, 2 * shipped.num_warps)}))
    stages = shipped.num_stages
    factors.append(sorted({stages, max(1, stages - 1), stages + 1}) if kernel in PIPELINED else [stages])
    base = (*shipped.constants.values(), shipped.num_warps, stages)

    def rank(values: tuple[int, ...]) -> tuple[int, float]:
        changed = sum(a != b for a, b, size in zip(values, base, sizes, strict=True) if size)
        work, before = (math.prod(max(1, size) for size in each[:-2]) / each[-2] for each in (values, base))
        return changed, abs(math.log2(work / before))

    near = sorted((values for values in itertools.product(*factors) if rank(values)[0] <= 2), key=rank)
    names = [name for name, _ in blocks]
    return [LaunchConfig(dict(zip(names, values[:-2], strict=True)), *values[-2:]) for values in near[:MOST_CANDIDATES]]


def _halved(size: int) -> int:
    """tl.dot needs blocks of 16; blocks that are smaller already are not for tl.dot."""
    return max(16 if size >= 16 else 1, size // 2)


def speedup(before: dict[str, float], after: dict[str, float], known: dict[str, Workload]) -> float:
    """Geometric mean over sampling and training of the speedup of the launches that a step makes."""
    ratios = []
    for step in BATCHES:
        weights = {name: known[name].times for name in before if known[name].step == step}
        if weights:
            old, new = (sum(weight * times[name] for name, weight in weights.items()) for times in (before, after))
            ratios.append(old / new)
    return statistics.geometric_mean(ratios)


def tune_key(
    kernel: str,
    key: str,
    configs: Sequence[LaunchConfig],
    calls: dict[str, Call],
    known: dict[str, Workload],
    measure: Measure,
    *,
    deadline: float = math.inf,
) -> Tuned:
    """The fastest of some candidates for a configuration.

    Args:
        kernel: The kernel.
        key: The key of the configuration.
        configs: The shipped configuration, then candidates that are known to be correct.
        calls: The calls that use the configuration, by the name of their workload.
        known: The workloads.
        measure: Times launches.
        deadline: On `time.monotonic()`; later no further candidate is timed.
    """

    def timed(config: LaunchConfig) -> dict[str, float]:
        with tuning.override_launch_config(kernel, key, config):
            return {name: measure(launches_of(kernel, key, call)) for name, call in calls.items()}

    times: list[dict[str, float]] = []
    for config in configs:
        if times and time.monotonic() > deadline:
            break
        times.append(timed(config))
    gains = [speedup(times[0], each, known) for each in times]
    best = max(range(len(gains)), key=lambda index: gains[index])
    if gains[best] <= GAIN:
        return Tuned(configs[0], 1.0, times)
    # The fastest of many was also lucky: its gain is measured again, in turn with the shipped configuration.
    gain = statistics.median(speedup(timed(configs[0]), timed(configs[best]), known) for _ in range(3))
    return Tuned(configs[best], gain, times) if gain > GAIN else Tuned(configs[0], 1.0, times)


def write_config(chip: str, kernel: str, key: str, config: LaunchConfig) -> Path:
    """Add a configuration to the chip's file, and return the file."""
    file = tuning.tuned_file(chip)
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    table.setdefault(kernel, {})[key] = config._asdict()
    _write_json(file, table)
    return file


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def tune(
    device: torch.device,
    chip: str,
    kernels: Sequence[str],
    *,
    seconds: float,
    workers: int,
    report: Path | None = None,
    grid: Sequence[int] = GRID,
    measure: Measure = time_in_graph,
) -> None:
    """Tune the kernels, write the results and print a line for each configuration.

    Args:
        device: Where the kernels run.
        chip: Name of the file of results.
        kernels: Whose workloads are used.
        seconds: Time limit, compilation included.
        workers: Processes that compile.
        report: File for the verdict and the times of every candidate.
        grid: The latent grid, smaller in a rehearsal.
        measure: Times launches.

    Raises:
        ConfigError: No workload runs.
    """
    start = time.monotonic()
    known = {name: each for name, each in workloads(device, grid).items() if each.kernel in kernels}
    with TrialPool(workers, device, grid) as pool:
        calls: dict[str, Call] = {}
        trials = [Trial(None, [name]) for name in known]
        for name, verdict in zip(known, pool.run(trials, start + COMPILING * seconds), strict=True):
            if verdict == OK:
                calls[name] = known[name].prepare()
            else:
                print(f"{name}: {verdict}", file=sys.stderr, flush=True)
        if not calls:
            raise ConfigError("no kernel has run with its shipped configuration; the reasons are above")
        users, shares = _shares(calls, known, measure)
        _say(start, f"{len(calls)} workloads use {len(users)} configurations")
        tried = [Candidate(*key, config) for key in users for config in candidates(key[0], _shipped(key))[1:]]
        trials = [Trial(candidate, users[candidate.kernel, candidate.key]) for candidate in tried]
        verdicts = list(zip(tried, pool.run(trials, start + COMPILING * seconds), strict=True))
    _say(start, f"{sum(verdict == OK for _, verdict in verdicts)} of {len(tried)} candidates run and are correct")

    found: dict[str, Any] = {"chip": chip, "torch": torch.__version__, "triton": triton.__version__, "keys": {}}
    for key, users_of_key in users.items():
        if time.monotonic() > start + seconds:
            _say(start, "the time is over")
            break
        mine = [(each.config, verdict) for each, verdict in verdicts if (each.kernel, each.key) == key]
        configs = [_shipped(key), *(config for config, verdict in mine if verdict == OK)]
        used = {name: calls[name] for name in users_of_key}
        tuned = tune_key(*key, configs, used, known, measure, deadline=start + seconds)
        _say(start, f"{key[0]:16} {key[1]:22} {shares[key]:5.1%} {tuned.gain:5.2f}x {tuned.config}")
        if tuned.gain > 1.0:
            write_config(chip, *key, tuned.config)
        rows = [{**config._asdict(), "seconds": times} for config, times in zip(configs, tuned.times, strict=False)]
        rows += [{**config._asdict(), "discarded": verdict} for config, verdict in mine if verdict != OK]
        entry = {"share": shares[key], "gain": tuned.gain, "best": tuned.config._asdict(), "candidates": rows}
        found["keys"][" ".join(key)] = entry
        if report:
            _write_json(report, found)


def _shares(
    calls: dict[str, Call], known: dict[str, Workload], measure: Measure
) -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], float]]:
    """The workloads that use each configuration, and its share of the kernels' time in the steps; the largest share first."""
    users: dict[tuple[str, str], list[str]] = {}
    shares: dict[tuple[str, str], float] = {}
    totals = dict.fromkeys(BATCHES, 0.0)
    parts: list[tuple[tuple[str, str], str, float]] = []
    for name, call in calls.items():
        for launch in record_launches(call):
            key, spent = (launch.kernel, launch.key), known[name].times * measure([launch.repeat])
            users.setdefault(key, []).append(name)
            parts.append((key, known[name].step, spent))
            totals[known[name].step] += spent
    for key, step, spent in parts:
        shares[key] = shares.get(key, 0.0) + spent / totals[step] / sum(total > 0 for total in totals.values())
    order = sorted(users, key=lambda key: -shares[key])
    return {key: users[key] for key in order}, {key: shares[key] for key in order}


def _shipped(key: tuple[str, str]) -> LaunchConfig:
    return DEFAULT_LAUNCH_CONFIGS[key[0]][key[1]]


def _say(start: float, text: str) -> None:
    print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_script(_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    """Tune the selected kernels, or list their candidates."""
    kernels = [arguments.kernel] if arguments.kernel else sorted(DEFAULT_LAUNCH_CONFIGS)
    if arguments.dry_run:
        for kernel in kernels:
            for key, shipped in DEFAULT_LAUNCH_CONFIGS[kernel].items():
                print(f"{kernel:18} {key:24} {len(candidates(kernel, shipped)):4} candidates")
        return 0
    device = default_device()
    if device.type != "cuda":
        raise ConfigError(
            "tuning needs a GPU, and there is none on this machine",
            fix="use a GPU, or list the candidates with --dry_run",
        )
    chip = torch.cuda.get_device_name(device)
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    tune(device, chip, kernels, seconds=arguments.seconds, workers=workers, report=arguments.report)
    return 0


def _parser() -> entrypoint.Parser:
    parser = make_parser(str(__doc__))
    parser.add_argument("--kernel", choices=sorted(DEFAULT_LAUNCH_CONFIGS), help="tune only this kernel")
    parser.add_argument("--seconds", type=float, default=150.0, help="stop after this time (default 150)")
    parser.add_argument("--report", type=Path, help="file for the verdict and the times of every candidate (JSON)")
    parser.add_argument("--dry_run", action="store_true", help="list the candidates and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
