"""The frame of the stand-alone scripts: common options, checks before the work, exit codes.

Used by few_step_quality.py, sampler_optimizations.py and tune_kernels.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ccella_fast import entrypoint
from ccella_fast.storage import check_writable


def make_parser(description: str) -> entrypoint.Parser:
    """A parser with the option that all scripts have."""
    parser = entrypoint.Parser(description=description)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def add_sampling_options(parser: entrypoint.Parser, *, out: str, grid: str) -> None:
    """Add `--out` and `--grid`, for scripts that sample latents; `out` and `grid` complete their help."""
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {out}")
    parser.add_argument("--grid", type=int, nargs=3, metavar="N", help=f"latent grid in voxels (default: {grid})")


def run_script(
    parser: entrypoint.Parser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parse the arguments, check that `--out` is writable, run, and return the exit code."""
    arguments = parser.parse_args(argv)

    def work() -> int:
        if "out" in arguments:
            check_writable(arguments.out, "--out")
        return run(arguments)

    return entrypoint.run_command(work, debug=arguments.debug)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
