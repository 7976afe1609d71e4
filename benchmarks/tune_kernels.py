"""Choose the launch configurations of the kernels by measurement on this machine's GPU.

    python benchmarks/tune_kernels.py [--kernel attention] [--seconds 300] [--dry_run]

Every shipped configuration is varied by one step in each direction (block sizes halved and doubled, warps, stages). Candidates
that do not compile, or whose result differs from the shipped configuration's, are discarded. The fastest of the others over
all calls that use the configuration is written to kernels/tuned/<chip>.json if its gain exceeds the noise; `kernels/tuning.py`
reads that file from then on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ccella_fast import entrypoint
from ccella_fast.config import ModelConfig
from ccella_fast.errors import ConfigError
from ccella_fast.kernels import tuning
from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.cross_attention import cross_attention
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.residual_shift import residual_shift
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d
from ccella_fast.storage import atomic_path
from script import default_device, make_parser, run_script

LATENT = (64, 64, 32)  # the default model's latent grid, docs/explanation/method.md, section 1
GAIN = 1.03  # a smaller speedup is noise

KernelCall = Callable[[], list[Tensor]]  # forward and backward pass of a kernel: the output and the gradients


def kernel_calls(device: torch.device, config: ModelConfig, batch: int) -> Iterator[tuple[str, KernelCall]]:
    """(kernel, call) for every level of the default model at this batch size."""
    for level, channels in enumerate(config.num_channels):
        grid = [size >> level for size in LATENT]
        volume, weight, bias = _volume(device, batch, channels, grid), _draw(device, channels), _draw(device, channels)

        def norm(x=volume, w=weight, b=bias):
            return group_norm_silu(x, config.norm_num_groups, w, b, backend="triton")

        yield "group_norm_silu", _with_backward(norm, volume, weight, bias)

        def shift(x=volume, b=bias):
            return residual_shift(x, x, b, backend="triton")

        yield "residual_shift", _with_backward(shift, volume, bias)
        if level:  # the upsampler from this level to the next finer one
            kernel = _draw(device, channels, channels, 3, 3, 3)

            def upsample(x=volume, w=kernel, b=bias):
                return upsample_conv3d(x, w, b, backend="triton")

            yield "upsample_conv3d", _with_backward(upsample, volume)
        if config.attention_levels[level]:
            yield from _attention_calls(device, config, batch, level, math.prod(grid))


def _attention_calls(
    device: torch.device, config: ModelConfig, batch: int, level: int, voxels: int
) -> Iterator[tuple[str, KernelCall]]:
    channels, width = config.num_channels[level], config.num_head_channels[level]
    heads = channels // width
    q, k, v = (_draw(device, batch, heads, voxels, width) for _ in range(3))
    yield "attention", _with_backward(lambda: attention(q, k, v, backend="triton"), q, k, v)
    tokens, gated = _draw(device, batch, voxels, channels), _draw(device, batch, voxels, 8 * channels)
    keys, values = (_draw(device, batch, heads, config.num_latents, width) for _ in range(2))
    square, vector = [_draw(device, channels, channels) for _ in range(2)], [_draw(device, channels) for _ in range(3)]

    def cross():
        return cross_attention(
            tokens, keys, values, ln_weight=vector[0], ln_bias=vector[1], w_q=square[0], w_out=square[1],
            b_out=vector[2], num_heads=heads, backend="triton",
        )  # fmt: skip

    yield "cross_attention", _with_backward(cross, tokens)
    yield "geglu", _with_backward(lambda: geglu(gated, backend="triton"), gated)


def candidates(shipped: LaunchConfig) -> list[LaunchConfig]:
    """The neighbors of a configuration, preceded by itself."""
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


def keys_used(kernel: str, call: KernelCall) -> list[str]:
    """The keys of the kernel's configurations that a call reads, in order of use."""
    keys: list[str] = []
    plain = tuning.launch_config

    def recording(asking_kernel: str, key: str, device: torch.device) -> LaunchConfig:
        if asking_kernel == kernel and key not in keys:
            keys.append(key)
        return plain(asking_kernel, key, device)

    with _replaced_launch_config(recording):
        call()
    return keys


def best(
    kernel: str,
    key: str,
    calls: Sequence[KernelCall],
    measure: Callable[[KernelCall], float],
    *,
    deadline: float = math.inf,
) -> tuple[LaunchConfig, float]:
    """The fastest correct candidate for a configuration.

    Args:
        kernel: The kernel.
        key: The key of the configuration.
        calls: The calls that use it.
        measure: Returns the time of a call.
        deadline: On `time.monotonic()`; later no further candidate is tried.

    Returns:
        The candidate, and its speedup over the shipped configuration: the geometric mean over the calls.
    """
    shipped, *others = candidates(DEFAULT_LAUNCH_CONFIGS[kernel][key])
    truth = [call() for call in calls]
    base = [measure(call) for call in calls]
    winner, gain = shipped, 1.0
    for candidate in others:
        if time.monotonic() > deadline:
            break
        with tuning.override_launch_config(kernel, key, candidate):
            try:
                if not all(_agrees(call(), right) for call, right in zip(calls, truth, strict=True)):
                    continue
                times = [measure(call) for call in calls]
            except Exception as error:  # expected: some candidates exceed the registers or the shared memory
                print(f"  {kernel} {key} {candidate}: {type(error).__name__}", file=sys.stderr)
                continue
        ratio = math.exp(sum(math.log(a / b) for a, b in zip(base, times, strict=True)) / len(base))
        if ratio > max(gain, GAIN):
            winner, gain = candidate, ratio
    return winner, gain


def write(chip: str, kernel: str, key: str, config: LaunchConfig) -> Path:
    """Add a configuration to the chip's file, and return the file."""
    file = tuning.tuned_file(chip)
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    table.setdefault(kernel, {})[key] = config._asdict()
    file.parent.mkdir(exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return file


def _agrees(results: list[Tensor], truth: list[Tensor]) -> bool:
    """Whether the results differ only as the order of sums may make them: each tensor by 1 % of its largest element."""
    return all(
        bool((a.float() - b.float()).abs().max() <= 0.01 * b.float().abs().max())
        for a, b in zip(results, truth, strict=True)
    )


def _with_backward(forward: Callable[[], Tensor], *leaves: Tensor) -> KernelCall:
    def run() -> list[Tensor]:
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


@contextmanager
def _replaced_launch_config(new: Callable[..., LaunchConfig]) -> Iterator[None]:
    """Replace `tuning.launch_config` in every module that has imported it."""
    old = tuning.launch_config
    _swap_launch_config(old, new)
    try:
        yield
    finally:
        _swap_launch_config(new, old)


def _swap_launch_config(old: Callable[..., LaunchConfig], new: Callable[..., LaunchConfig]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("ccella_fast.kernels") and getattr(module, "launch_config", None) is old:
            module.launch_config = new  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_script(_parser(), run, argv)


def run(arguments: argparse.Namespace) -> int:
    """Tune the selected kernels, or list their candidates."""
    kernels = [arguments.kernel] if arguments.kernel else sorted(DEFAULT_LAUNCH_CONFIGS)
    if arguments.dry_run:
        for kernel in kernels:
            for key, shipped in DEFAULT_LAUNCH_CONFIGS[kernel].items():
                print(f"{kernel:18} {key:24} {len(candidates(shipped)):4} candidates")
        return 0
    device, deadline = default_device(), time.monotonic() + arguments.seconds
    if device.type != "cuda":
        raise ConfigError(
            "tuning needs a GPU, and there is none on this machine",
            fix="use a GPU, or list the candidates with --dry_run",
        )
    from triton.testing import do_bench

    calls: dict[tuple[str, str], list[KernelCall]] = {}
    for batch in (1, 8):
        for kernel, call in kernel_calls(device, ModelConfig(), batch):
            if kernel in kernels:
                for key in keys_used(kernel, call):
                    calls.setdefault((kernel, key), []).append(call)
    for (kernel, key), users in calls.items():
        config, gain = best(kernel, key, users, lambda call: do_bench(call, return_mode="median"), deadline=deadline)
        print(f"{kernel:18} {key:24} {gain:5.2f}x {config}", flush=True)
        if gain > 1.0:
            write(torch.cuda.get_device_name(device), kernel, key, config)
    return 0


def _parser() -> entrypoint.Parser:
    parser = make_parser(str(__doc__))
    parser.add_argument("--kernel", choices=sorted(DEFAULT_LAUNCH_CONFIGS), help="tune only this kernel")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this time (default 300)")
    parser.add_argument("--dry_run", action="store_true", help="list the candidates and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
