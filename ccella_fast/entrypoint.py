"""What both doors, `cli.py` and `train.py`, do alike: how they parse, log, and end.

Every ending is one message and an exit code; a traceback is for `--debug`. Under a launcher the first process of a machine
speaks first: mostly the others fail for the same reason at the same time, and the launcher ends them before they repeat it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from ccella_fast.errors import CcellaError, ConfigError, DataError

_PATIENCE = 2.0  # seconds; launchers kill all processes when one ends: let the first one say what is wrong


def is_local_rank_zero() -> bool:
    """Does this process speak for its machine?"""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """Answers a usage mistake like any other, in one message. Abbreviated options are refused: they are misspellings."""

    def __init__(self, **settings: object):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=raw, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        if is_local_rank_zero():
            print(ConfigError(message, fix=f"see {self.prog} --help"), file=sys.stderr)
        else:
            time.sleep(_PATIENCE)
        sys.exit(ConfigError.exit_code)


def log_to_stderr() -> None:
    """Show our own messages as they are, and of processes that are not the first only the errors."""
    logger = logging.getLogger("ccella_fast")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_local_rank_zero() else logging.ERROR)


def run_command(work: Callable[[], int], *, debug: bool) -> int:
    """The exit code of `work`, or of what stopped it."""
    log_to_stderr()
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if is_local_rank_zero():
            print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        message = error if isinstance(error, CcellaError) else _unexpected(error)
        if is_local_rank_zero():
            print(message, file=sys.stderr)
            return message.exit_code
        time.sleep(_PATIENCE)
        # Still alive: the others may be well (a study that only this process came to is at fault), and nobody else would tell.
        print(message, file=sys.stderr)
        return message.exit_code


def _unexpected(error: Exception) -> CcellaError:
    if isinstance(error, OSError) and error.filename is not None:
        why = f"cannot be read or written: {os.strerror(error.errno or 0)}"
        return DataError(why, path=error.filename, fix="check that this file is there and that you may use it")
    # The type alone: a library's message may quote what it was working on, a report for instance.
    return CcellaError(f"internal: {type(error).__name__}", fix="run again with --debug and report it")
