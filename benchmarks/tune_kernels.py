"""Pick the kernels' launch configurations by measurement, on the GPU that is here.

    python benchmarks/tune_kernels.py [--kernel attention] [--seconds 300] [--dry_run]

Every shipped configuration is varied one step in each direction (block sizes halved and doubled, warps, stages). A candidate
that does not compile, or whose result is not the shipped one's, is out; the fastest of the others over all problems of its key
is written to kernels/tuned/<chip>.json when it gains more than the noise. `kernels/tuning.py` reads that file from then on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ccella_fast.config import ModelConfig
from ccella_fast.kernels import tuning
from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.cross_attention import cross_attention
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.residual_shift import residual_shift
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d
from ccella_fast.storage import atomic_path

LATENT = (64, 64, 32)  # the default model's latent grid, docs/explanation/method.md, section 1
GAIN = 1.03  # less is noise

Result = list[Tensor]  # the output and its gradients


class TuningProblem(NamedTuple):
    """One call of a kernel, forward and backward, at a size of the default model."""

    kernel: str
    name: str
    run: Callable[[], Result]


def problems(device: torch.device, config: ModelConfig, batch: int) -> Iterator[TuningProblem]:
    """The default model's calls at every level, for a batch."""
    for level, channels in enumerate(config.num_channels):
        grid = [size >> level for size in LATENT]
        where, volume = f"batch {batch}, level {level}", _volume(device, batch, channels, grid)
        weight, bias = _draw(device, channels), _draw(device, channels)
        groups = config.norm_num_groups

        def norm(x=volume, w=weight, b=bias, groups=groups):
            return group_norm_silu(x, groups, w, b, backend="triton")

        yield TuningProblem("group_norm_silu", where, _both(norm, volume, weight, bias))
        yield TuningProblem(
            "residual_shift",
            where,
            _both(lambda x=volume, b=bias: residual_shift(x, x, b, backend="triton"), volume, bias),
        )
        if level:  # the upsampler between this level and the one above it
            kernel = _draw(device, channels, channels, 3, 3, 3)

            def upsample(x=volume, w=kernel, b=bias):
                return upsample_conv3d(x, w, b, backend="triton")

            yield TuningProblem("upsample_conv3d", where, _both(upsample, volume))
        if config.attention_levels[level]:
            yield from _attentions(device, config, batch, level, channels, math.prod(grid), where)


def _attentions(
    device: torch.device, config: ModelConfig, batch: int, level: int, channels: int, voxels: int, where: str
) -> Iterator[TuningProblem]:
    width = config.num_head_channels[level]
    heads = channels // width
    q, k, v = (_draw(device, batch, heads, voxels, width) for _ in range(3))
    yield TuningProblem("attention", where, _both(lambda: attention(q, k, v, backend="triton"), q, k, v))
    tokens, gated = _draw(device, batch, voxels, channels), _draw(device, batch, voxels, 8 * channels)
    keys, values = (_draw(device, batch, heads, config.num_latents, width) for _ in range(2))
    square, vector = [_draw(device, channels, channels) for _ in range(2)], [_draw(device, channels) for _ in range(3)]

    def cross():
        return cross_attention(
            tokens, keys, values, ln_weight=vector[0], ln_bias=vector[1], w_q=square[0], w_out=square[1],
            b_out=vector[2], num_heads=heads, backend="triton",
        )  # fmt: skip

    yield TuningProblem("cross_attention", where, _both(cross, tokens))
    yield TuningProblem("geglu", where, _both(lambda: geglu(gated, backend="triton"), gated))


def candidates(shipped: LaunchConfig) -> list[LaunchConfig]:
    """The neighbours of a configuration, itself first."""
    sizes = [(size, max(16, size // 2), 2 * size) for size in shipped.constants.values()]
    warps = (shipped.num_warps, max(1, shipped.num_warps // 2), min(16, 2 * shipped.num_warps))
    stages = (shipped.num_stages, max(1, shipped.num_stages - 1), shipped.num_stages + 1)
    found = {
        (*blocks, w, s): LaunchConfig(dict(zip(shipped.constants, blocks, strict=True)), w, s)
        for blocks in itertools.product(*sizes)
        for w in warps
        for s in stages
    }
    return list(found.values())


def keys_of(problem: TuningProblem) -> list[str]:
    """Which configurations of its kernel a problem reads, in order of use."""
    asked: list[str] = []
    plain = tuning.launch_config

    def noted(kernel: str, key: str, device: torch.device) -> LaunchConfig:
        if kernel == problem.kernel and key not in asked:
            asked.append(key)
        return plain(kernel, key, device)

    with _replaced_everywhere(plain, noted):
        problem.run()
    return asked


def best(
    kernel: str,
    key: str,
    members: Sequence[TuningProblem],
    measure: Callable[[Callable[[], Result]], float],
    *,
    deadline: float = math.inf,
) -> tuple[LaunchConfig, float]:
    """The fastest right candidate and its speed-up over the shipped one: the geometric mean over the key's problems."""
    shipped, *others = candidates(DEFAULT_LAUNCH_CONFIGS[kernel][key])
    truth = [problem.run() for problem in members]
    base = [measure(problem.run) for problem in members]
    winner, gain = shipped, 1.0
    for candidate in others:
        if time.monotonic() > deadline:
            break
        with tuning.override_launch_config(kernel, key, candidate):
            try:
                if not all(_same(problem.run(), right) for problem, right in zip(members, truth, strict=True)):
                    continue
                times = [measure(problem.run) for problem in members]
            except Exception as error:  # out of registers or shared memory: what a tuner is there to find out
                print(f"  {kernel} {key} {candidate}: {type(error).__name__}", file=sys.stderr)
                continue
        ratio = math.exp(sum(math.log(a / b) for a, b in zip(base, times, strict=True)) / len(base))
        if ratio > max(gain, GAIN):
            winner, gain = candidate, ratio
    return winner, gain


def write(chip: str, kernel: str, key: str, config: LaunchConfig) -> Path:
    """Add one configuration to the chip's file."""
    file = tuning.tuned_file(chip)
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    table.setdefault(kernel, {})[key] = config._asdict()
    file.parent.mkdir(exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file


def _same(results: Result, right: Result) -> bool:
    """Equal but for the order of sums: each tensor to 1 % of its largest element."""
    return all(
        bool((a.float() - b.float()).abs().max() <= 0.01 * b.float().abs().max())
        for a, b in zip(results, right, strict=True)
    )


def _both(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], Result]:
    def run() -> Result:
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            y = forward()
            return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]

    return run


def _draw(device: torch.device, *shape: int) -> Tensor:
    scale = 1.0 if len(shape) < 3 else math.prod(shape[1:]) ** -0.5 if len(shape) == 5 else 0.5
    return (scale * torch.randn(shape, device=device)).to(torch.bfloat16)


def _volume(device: torch.device, batch: int, channels: int, grid: Sequence[int]) -> Tensor:
    x = torch.randn(batch, channels, *grid, device=device).to(torch.bfloat16)
    return x.to(memory_format=torch.channels_last_3d)


class _replaced_everywhere:
    """`tuning.launch_config` under another function, in every module that has imported it."""

    def __init__(self, old: Callable, new: Callable):
        self.old, self.new = old, new

    def __enter__(self) -> None:
        self._swap(self.old, self.new)

    def __exit__(self, *_: object) -> None:
        self._swap(self.new, self.old)

    @staticmethod
    def _swap(old: Callable, new: Callable) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("ccella_fast.kernels") and getattr(module, "launch_config", None) is old:
                module.launch_config = new  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--kernel", choices=sorted(DEFAULT_LAUNCH_CONFIGS), help="only this one")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this long (default 300)")
    parser.add_argument("--dry_run", action="store_true", help="list what would be tried")
    arguments = parser.parse_args()
    kernels = [arguments.kernel] if arguments.kernel else sorted(DEFAULT_LAUNCH_CONFIGS)
    if arguments.dry_run:
        for kernel in kernels:
            for key, shipped in DEFAULT_LAUNCH_CONFIGS[kernel].items():
                print(f"{kernel:18} {key:24} {len(candidates(shipped)):4} candidates")
        return 0
    if not torch.cuda.is_available():
        print(
            "error: there is no GPU here\n  fix:   run this where one is; --dry_run lists the candidates",
            file=sys.stderr,
        )
        return 2
    from triton.testing import do_bench

    device, deadline = torch.device("cuda"), time.monotonic() + arguments.seconds
    groups: dict[tuple[str, str], list[TuningProblem]] = {}
    for batch in (1, 8):
        for problem in problems(device, ModelConfig(), batch):
            if problem.kernel in kernels:
                for key in keys_of(problem):
                    groups.setdefault((problem.kernel, key), []).append(problem)
    for (kernel, key), members in groups.items():
        config, gain = best(kernel, key, members, lambda run: do_bench(run, return_mode="median"), deadline=deadline)
        print(f"{kernel:18} {key:24} {gain:5.2f}x {config}", flush=True)
        if gain > 1.0:
            write(torch.cuda.get_device_name(device), kernel, key, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
