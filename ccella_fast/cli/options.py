"""What several commands share: how a command is added, options, and the values that options take."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from ccella_fast import entrypoint


def add_command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    about: str,
    example: str,
    *,
    if_out_of_memory: str = entrypoint.LESS_MEMORY,
) -> entrypoint.Parser:
    """Add a command with --debug, an example, and the exit codes.

    Args:
        subparsers: of the parser of `ccella-fast`.
        name: of the command.
        run: does its work; its result is the exit code, None for 0.
        about: what it does; up to a colon, it is the help in the list of commands.
        example: how it is called.
        if_out_of_memory: what a user can do when the memory does not suffice.
    """
    command = subparsers.add_parser(
        name,
        help=about.split(":")[0],
        description=about,
        epilog=f"example: {example}\n\n{entrypoint.EXIT_CODES}",
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, if_out_of_memory=if_out_of_memory)
    return command


def above_zero(text: str) -> float:
    """The type of an option whose value is a number greater than 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number greater than 0")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # is within no bounds


def _b_value(text: str) -> float:
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number of 0 or more, in s/mm2")
    return number


def _device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")
    return text


def add_device(add: Callable[..., argparse.Action]) -> None:
    """Add `--device`. add: the method `add_argument` of a parser or group."""
    about = "auto (a GPU if there is one), cpu, cuda or cuda:N (default auto)"
    add("--device", type=_device_name, default="auto", metavar="DEVICE", help=about)


def add_studies(command: argparse.ArgumentParser, data: str) -> None:
    """Add the options that say where studies are and how they are read; `data` is the help of --data."""
    add = command.add_argument_group("studies").add_argument
    add("--data", type=Path, required=True, metavar="PATH", help=data)
    about = "reports and classes of a study folder (default: studies.csv in it)"
    add("--csv", type=Path, metavar="FILE", help=about)
    add("--test_data", type=Path, metavar="FILE", help="JSON manifest of the test split")
    about = "folder that the image paths of a JSON manifest are relative to"
    add("--data_base_dir", type=Path, metavar="FOLDER", help=about)
    about = "folder of latents and text features that the reference has prepared"
    add("--embedding_base_dir", type=Path, metavar="FOLDER", help=about)
    about = "read series that are links to files or folders outside --data"
    add("--follow_links", action="store_true", help=about)
    about = "which image to read of a diffusion series that holds several (default: the highest b-value)"
    add("--b_value", type=_b_value, metavar="S/MM2", help=about)


def add_config(command: entrypoint.Parser, *sections: str) -> None:
    """Add `--config` and `--set`, which is suggested for an option that is named like a setting in `sections`."""

    def instead(option: str) -> str | None:
        from ccella_fast.config import Config
        from ccella_fast.config_errors import as_set_option

        return as_set_option(option, Config, sections)

    command.instead = instead
    group = command.add_argument_group("configuration")
    about = "our JSON file, or the reference's env, config and def files (default: built-in defaults)"
    group.add_argument("--config", type=Path, nargs="+", metavar="FILE", help=about)
    about = "override a setting, for example data.dim=[96,96,32]; may be repeated"
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=about)
