"""Parsing, logging and exiting, as `cli` and `train.py` share them.

A command that fails prints one message and returns an exit code; `--debug` shows the traceback. Under a launcher the process of
local rank 0 prints first: the others usually fail for the same reason, and the launcher stops them before they repeat it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import ccella_fast
from ccella_fast import launchers
from ccella_fast.errors import CcellaError, ConfigError, Stopped, did_you_mean, nearest
from ccella_fast.foreign_errors import translate

_PATIENCE = (
    2.0  # seconds that other ranks wait: a launcher kills all processes when one ends, and rank 0 prints the error
)
EXIT_CODES = """exit codes: 0 ok, 1 a bug, 2 usage or configuration, 3 data, 4 checkpoint, 5 disk, 6 non-finite loss,
7 a process did not arrive, 129/130/138/143 stopped by a signal, 141 closed pipe"""
LESS_MEMORY = "end other programs, use a machine with more memory, or process less at a time"


def adopt_launcher() -> None:
    """Set the variables of torchrun from those of another launcher, such as srun; exit if they are not usable.

    Call it first: they decide also which process prints messages.
    """
    try:
        launchers.adopt_launcher()
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def is_local_rank_zero() -> bool:
    """Whether this process prints messages for its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a usage error as a `ConfigError` and does not accept abbreviated options.

    Unknown options are named first, because a misspelled option is often why a required one is missing.

    Attributes:
        instead: returns what a user can give instead of an unknown option, or None.
    """

    instead: Callable[[str], str | None] = staticmethod(lambda option: None)

    def __init__(self, **settings: object):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=raw, **settings)  # type: ignore[arg-type]

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, after a check of the names of the options."""
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            if argument == "--" or (self._subparsers is not None and not argument.startswith("-")):
                break  # what follows are not options, or those of a subcommand
            name = argument.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and name not in self._option_string_actions:
                self.error(f"the option {name} does not exist; {self._suggest(name)}")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        """As in argparse; surplus arguments that may be words of a report are not printed."""
        parsed, surplus = self.parse_known_args(args, namespace)
        if surplus:
            quote = "put quotes around a value that contains spaces"
            if "--report" in (sys.argv if args is None else args):
                self.error(f"{len(surplus)} words belong to no option; {quote}")
            self.error(f"these arguments belong to no option: {' '.join(surplus):.200}; {quote}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the message of a usage error and exit."""
        if is_local_rank_zero():
            print(ConfigError(message, fix=f"see {self.prog} --help"), file=sys.stderr)
        else:
            time.sleep(_PATIENCE)
        sys.exit(ConfigError.exit_code)

    def _suggest(self, name: str) -> str:
        if instead := self.instead(name):
            return f"use {instead}"
        options = [option for option in self._option_string_actions if option.startswith("--")]
        near = nearest(name, options)
        return f"did you mean {near}?" if near else f"there are {', '.join(sorted(options))}"

    def _get_value(self, action: argparse.Action, text: str) -> object:
        if action.type is Path and not text:  # as from an unset variable; Path("") is the working folder
            raise argparse.ArgumentError(action, "the path is empty")
        return super()._get_value(action, text)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = map(str, action.choices)
            raise argparse.ArgumentError(action, f"{value!r:.40} is not known; {did_you_mean(str(value), known)}")


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    version = f"ccella-fast {ccella_fast.__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number of at least `least` that torch's generators and sizes can hold."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number of at least {least}")
        return int(text)

    return number


class _StderrHandler(logging.StreamHandler):
    """Writes to stderr, on separate lines while a progress bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if (tqdm := sys.modules.get("tqdm")) is None:  # not imported here, so that commands without a bar start at once
            super().emit(record)
        else:
            with suppress(OSError), tqdm.tqdm.external_write_mode(sys.stderr):  # the terminal may have been closed
                super().emit(record)


def log_to_stderr() -> None:
    """Write messages of ccella_fast to stderr without a prefix; ranks other than local rank 0 write errors only."""
    logger = logging.getLogger("ccella_fast")
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_local_rank_zero() else logging.ERROR)


def log_next(wrote: object, command: Sequence[object]) -> None:
    """Log what a command has written, and the command that usually comes next."""
    logger = logging.getLogger("ccella_fast")
    logger.info("wrote %s", wrote)
    logger.info("next: %s", shlex.join(map(str, command)))


def sibling(folder: Path, name: str) -> Path:
    """The path `name` in the parent of `folder`, which may be the working folder, `.`."""
    return (folder if folder.name else folder.absolute()).with_name(name)


def run_command(work: Callable[[], int], *, debug: bool, if_out_of_memory: str = LESS_MEMORY) -> int:
    """Run `work` and return its exit code, or that of the error or signal that ended it.

    if_out_of_memory: what a user can do when the memory does not suffice.
    """
    log_to_stderr()
    try:
        with _stop_on_sigterm():
            code = work()
        _flush_output(code)
        return code
    except BrokenPipeError:  # the reader has closed the pipe (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        stop = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        if is_local_rank_zero():
            with suppress(OSError):  # the terminal may have been closed
                print(stop, file=sys.stderr)
        _flush_output(stop.exit_code)
        return stop.exit_code
    except Exception as error:
        if debug:
            raise
        message = _message(error, if_out_of_memory)
        if is_local_rank_zero():
            print(message, file=sys.stderr)
            return message.exit_code
        time.sleep(_PATIENCE)
        # Not killed by the launcher: the error may be of this rank alone, such as a study that only this rank has read.
        print(message, file=sys.stderr)
        return message.exit_code


def _flush_output(code: int) -> None:
    """Flush what was printed. After SIGHUP nobody reads it: where flushing fails, Python would exit with 120 instead of `code`.

    That includes what libraries print when Python ends.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            if code != 128 + signal.SIGHUP:
                raise
        if code == 128 + signal.SIGHUP:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that temporary files are removed; a second one ends the process at once.

    Not under a launcher: a process that waits for others in a library would not notice the signal.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ending_of(error: BaseException) -> tuple[int, str | None]:
    """The exit code with which `run_command` answers an error or a signal, and the reason; None for a signal."""
    if isinstance(error, KeyboardInterrupt):
        return error.exit_code if isinstance(error, Stopped) else 128 + signal.SIGINT, None
    if isinstance(error, BrokenPipeError):
        return 141, "the reader of the output has closed the pipe"
    if isinstance(error, Exception):
        message = _message(error, LESS_MEMORY)
        return message.exit_code, message.why
    return 1, type(error).__name__


def _message(error: Exception, if_out_of_memory: str) -> CcellaError:
    if isinstance(error, CcellaError):
        return error
    # Of a bug only the type: the message of a library may quote its input, for example a report.
    return translate(error, remedies=if_out_of_memory) or CcellaError(
        f"internal: {type(error).__name__}", fix="run the command again with --debug and report the traceback"
    )
