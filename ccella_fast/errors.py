"""The one error that users see: what is wrong, in which file and field, and how to mend it.

The doors (`cli.py`, `train.py`) print `str(error)`, at most five lines, and exit with `error.exit_code`. Raise these for the
user's mistakes; an `assert` is for ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CcellaError(Exception):
    """A mistake in what the user gave. Plain strings only, so that it crosses process borders unharmed."""

    exit_code = 1

    def __init__(self, why: str, *, path: object = None, field: str | None = None, fix: str | None = None):
        super().__init__(why)
        self.why, self.field, self.fix = why, field, fix
        self.path = None if path is None else str(path)

    def __str__(self) -> str:
        lines = [f"error: {self.why}"]
        lines += [f"  file:  {self.path}"] if self.path else []
        lines += [f"  field: {self.field}"] if self.field else []
        lines += [f"  fix:   {self.fix}"] if self.fix else []
        return "\n".join(" ".join(line.splitlines()) for line in lines)  # whatever a name in a user's file holds

    def __reduce__(self):
        return _rebuild, (type(self), self.why, self.path, self.field, self.fix)


def _rebuild(cls, why, path, field, fix):
    return cls(why, path=path, field=field, fix=fix)


class ConfigError(CcellaError):
    """Usage or configuration."""

    exit_code = 2


class DataError(CcellaError):
    """A study, a report, a manifest or a prepared file."""

    exit_code = 3


class CheckpointError(CcellaError):
    """A checkpoint or a weight file."""

    exit_code = 4


class DiskError(CcellaError):
    """No room, or not writable."""

    exit_code = 5


class NonFiniteError(CcellaError):
    """Training diverged."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'spacing'?`, or the list of what is known when nothing is near."""
    known = sorted(known)
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean '{by_lower[near[0]]}'?" if near else f"known: {', '.join(known)}"
