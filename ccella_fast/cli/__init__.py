"""The command `ccella-fast` with its subcommands and their options. `ccella-fast train` is train.py, for one process.

What a subcommand does is in `commands.py`. Nothing slow is imported before the arguments are parsed, so that `--help` is
answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ccella_fast import commands, entrypoint
from ccella_fast.cli import generation, judging, studies, training
from ccella_fast.cli.options import add_command

ORDER = """The order of a project: your studies or phantom, prepare, train-vae, prepare --vae, train, sample, report.
On several GPUs, train with a launcher: deepspeed ccella_fast/train.py --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    entrypoint.adopt_launcher()
    arguments = _parser().parse_args(argv)

    def work() -> int:
        return arguments.run(arguments) or 0

    return entrypoint.run_command(work, debug=arguments.debug, if_out_of_memory=arguments.if_out_of_memory)


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(
        prog="ccella-fast",
        description="Report-conditioned 3D prostate MRI: prepare studies, train, sample, report.",
        epilog=f"{ORDER}\n\n{entrypoint.EXIT_CODES}",
    )
    entrypoint.add_version(parser)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    studies.add_phantom(subparsers)
    studies.add_import(subparsers)
    studies.add_check(subparsers)
    studies.add_prepare(subparsers)
    training.add_train_vae(subparsers)
    training.add_train(subparsers)
    training.add_average(subparsers)
    generation.add_sample(subparsers)
    generation.add_synthesize(subparsers)
    judging.add_sensitivity(subparsers)
    judging.add_evaluate(subparsers)
    judging.add_classify(subparsers)
    judging.add_compare(subparsers)
    judging.add_report(subparsers)
    generation.add_export(subparsers)
    generation.add_push(subparsers)
    _env(subparsers)
    return parser


def _env(subparsers: argparse._SubParsersAction) -> None:
    about = "Print versions, CPU, GPUs, the backend of each kernel with the reason, and known problems of this machine."
    command = add_command(subparsers, "env", commands.run_env, about, "ccella-fast env")
    command.add_argument("--json", action="store_true", help="print JSON, for a bug report")
