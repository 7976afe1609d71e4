"""Errors for users: what is wrong, in which file and field, and how to correct it.

The commands (`cli`, `train.py`) print `str(error)`, at most five lines, and exit with `error.exit_code`. Raise these for a
user's mistake; use `assert` for one of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_CHARACTERS = 1000  # of a line; the longest list of known names has fewer


class CcellaError(Exception):
    """A mistake in the input. It contains plain strings only, so it can be pickled between processes.

    Args:
        why: a sentence that says what is wrong, with the value and the bound.
        path: the file.
        field: the setting, key or option.
        fix: what to do, as an imperative.
    """

    exit_code = 1

    def __init__(self, why: str, *, path: object = None, field: str | None = None, fix: str | None = None):
        super().__init__(why)
        self.why, self.field, self.fix = why, field, fix
        self.path = None if path is None else str(path)

    def __str__(self) -> str:
        lines = [f"error: {_cut(self.why)}"]
        lines += [f"  file:  {self.path}"] if self.path else []
        lines += [f"  field: {_cut(self.field)}"] if self.field else []
        lines += [f"  fix:   {_cut(self.fix)}"] if self.fix else []
        return "\n".join(
            " ".join(line.splitlines()) for line in lines
        )  # names in a user's file may contain line breaks

    def __reduce__(self):
        return _rebuild, (type(self), self.why, self.path, self.field, self.fix)


def _cut(text: str) -> str:
    """The beginning of a text: names in a user's file may be of any length."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _rebuild(cls, why, path, field, fix):
    return cls(why, path=path, field=field, fix=fix)


class ConfigError(CcellaError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(CcellaError):
    """A defect in a study, a report, a manifest or a prepared file."""

    exit_code = 3


class CheckpointError(CcellaError):
    """A missing or damaged checkpoint or weight file."""

    exit_code = 4


class DiskError(CcellaError):
    """A full disk, or a folder without write permission."""

    exit_code = 5


class NonFiniteError(CcellaError):
    """A loss that is not finite in too many consecutive steps."""

    exit_code = 6


class StalledError(CcellaError):
    """A process of a run that the others have waited for in vain."""

    exit_code = 7


class Stopped(KeyboardInterrupt):
    """A signal has ended a command; what is done can be continued.

    Args:
        number: of the signal.
        how: one line for the user.
    """

    def __init__(self, number: int, how: str = "stopped; run the same command again to continue"):
        super().__init__(how)
        self.number, self.exit_code = number, 128 + number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known name as a question, or the list of known names if none is similar."""
    known = sorted(known)
    near = nearest(word, known)
    return f"did you mean '{near}'?" if near else f"use one of: {', '.join(known)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to `word`, or None."""
    by_lower = {name.lower(): name for name in sorted(known)}
    cutoff = 0.6 if len(word) > 3 else 0.5  # two exchanged letters of two
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None
