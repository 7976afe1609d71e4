"""Parsing, logging and exiting, as `cli.py` and `train.py` share them.

A command that fails prints one message and returns an exit code; `--debug` shows the traceback. Under a launcher the process of
local rank 0 prints first: the others usually fail for the same reason, and the launcher stops them before they repeat it.
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

_PATIENCE = (
    2.0  # seconds that other ranks wait: a launcher kills all processes when one ends, and rank 0 prints the error
)


def is_local_rank_zero() -> bool:
    """Whether this process prints messages for its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a usage error as a `ConfigError` and does not accept abbreviated options."""

    def __init__(self, **settings: object):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=raw, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print the message of a usage error and exit."""
        if is_local_rank_zero():
            print(ConfigError(message, fix=f"see {self.prog} --help"), file=sys.stderr)
        else:
            time.sleep(_PATIENCE)
        sys.exit(ConfigError.exit_code)


def log_to_stderr() -> None:
    """Write messages of ccella_fast to stderr without a prefix; ranks other than local rank 0 write errors only."""
    logger = logging.getLogger("ccella_fast")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_local_rank_zero() else logging.ERROR)


def run_command(work: Callable[[], int], *, debug: bool) -> int:
    """Run `work` and return its exit code, or that of the error or signal that ended it."""
    log_to_stderr()
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if is_local_rank_zero():
            print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        message = error if isinstance(error, CcellaError) else _unexpected(error)
        if is_local_rank_zero():
            print(message, file=sys.stderr)
            return message.exit_code
        time.sleep(_PATIENCE)
        # Not killed by the launcher: the error may be of this rank alone, such as a study that only this rank has read.
        print(message, file=sys.stderr)
        return message.exit_code


def _unexpected(error: Exception) -> CcellaError:
    if isinstance(error, OSError) and error.filename is not None:
        why = f"this file cannot be read or written: {os.strerror(error.errno or 0)}"
        return DataError(why, path=error.filename, fix="check that it exists and that you have permission")
    # Only the type: the message of a library may quote its input, for example a report.
    return CcellaError(
        f"internal: {type(error).__name__}", fix="run the command again with --debug and report the traceback"
    )
