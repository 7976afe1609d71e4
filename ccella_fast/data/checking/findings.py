"""A finding about a data set, the table that shows findings, and the decision whether training may start."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ccella_fast.errors import CcellaError, ConfigError, DataError, did_you_mean
from ccella_fast.quantities import counted

logger = logging.getLogger("ccella_fast")
Severity = Literal["error", "stop", "warning", "info"]
MEANING: dict[Severity, str] = {
    "error": "prepare or training would refuse this",
    "stop": "training does not start, unless --allow names the finding",
    "warning": "look at this before training",
    "info": "for your information",
}
#: What stops training, because the model could not learn what it is for, or could not be judged.
STOPPING = ("leakage", "no_class", "no_reports", "one_class", "too_few_studies")
_SHOWN_IDS = 8
_SHOWN_PER_NAME = 10  # rows of the table in the terminal
_SHOWN_LINES = 12  # in a log


class Finding(NamedTuple):
    """What was found. Nothing in it quotes a report or a cell of a table.

    Attributes:
        name: What kind of finding, one of `STOPPING` if the severity is "stop"; "defect" for what a reader refuses.
        severity: See `MEANING`.
        message: A sentence with the numbers.
        fix: What to do, as an imperative; empty for information.
        studies: Ids of the studies concerned.
        path: The file concerned.
        field: The key, column or header field concerned.
    """

    name: str
    severity: Severity
    message: str
    fix: str = ""
    studies: tuple[str, ...] = ()
    path: str | None = None
    field: str | None = None

    @classmethod
    def of_error(cls, error: CcellaError, study: str | None = None) -> Finding:
        """The finding that an error describes."""
        name = "config" if isinstance(error, ConfigError) else "defect"
        studies = () if study is None else (study,)
        return cls(name, "error", error.why, error.fix or "", studies, error.path, error.field)

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return {**self._asdict(), "studies": list(self.studies)}


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by severity, the worst first; otherwise in their order."""
    return sorted(findings, key=lambda finding: list(MEANING).index(finding.severity))


def check_allowed_names(allow: Sequence[str]) -> None:
    """Raise ConfigError unless each name is that of a finding that stops training."""
    for name in allow:
        if name not in STOPPING:
            why = f"no finding that stops training is called {name!r:.40}"
            raise ConfigError(why, field="--allow", fix=did_you_mean(name, STOPPING))


def stopping(findings: Iterable[Finding], allow: Sequence[str]) -> list[Finding]:
    """The findings that stop training and are not allowed."""
    return [finding for finding in findings if finding.severity == "stop" and finding.name not in allow]


def log_findings(findings: Iterable[Finding]) -> None:
    """Log what should be looked at, at most a few lines; `ccella-fast check` shows everything."""
    lines = [finding for finding in in_order(findings) if finding.severity in ("stop", "warning")]
    for finding in lines[:_SHOWN_LINES]:
        logger.warning("%s: %s%s", finding.name, finding.message, _ids(finding.studies, "; studies: "))
    if len(lines) > _SHOWN_LINES:
        logger.warning("and %s: see `ccella-fast check`", counted(len(lines) - _SHOWN_LINES, "more finding"))


def raise_if_stopped(findings: Iterable[Finding], allow: Sequence[str], path: Path) -> None:
    """Raise DataError, which names all findings that stop training, unless they are allowed.

    Args:
        findings: What was found.
        allow: Names of findings with which training starts nevertheless.
        path: The file to name in the message.
    """
    found = stopping(findings, allow)
    if found:
        names = list(dict.fromkeys(finding.name for finding in found))
        first = found[0]
        others = f" (and: {', '.join(names[1:])})" if len(names) > 1 else ""
        allowed = " ".join(f"--allow {name}" for name in names)
        why = f"training does not start: {first.name}: {first.message}{_ids(first.studies, '; studies: ')}{others}"
        raise DataError(why, path=path, fix=f"{first.fix}; or train nevertheless with {allowed}")


def format_findings(findings: Sequence[Finding], *, width: int = 110) -> str:
    """The findings as a table for a terminal; of each kind at most a few rows."""
    lines, shown = [], dict[tuple[str, str], int]()
    for finding in in_order(findings):
        key = (finding.severity, finding.name)
        shown[key] = shown.get(key, 0) + 1
        if shown[key] <= _SHOWN_PER_NAME:
            lines += _row(finding, width)
    for (severity, name), count in shown.items():
        if count > _SHOWN_PER_NAME:
            lines.append(f"{severity:<8} {name}: {count - _SHOWN_PER_NAME} more, which --out FOLDER lists")
    return "\n".join(lines)


def _row(finding: Finding, width: int) -> list[str]:
    place = "".join(f", {word}" for word in (finding.path, finding.field) if word)
    text = f"{finding.name}: {finding.message}{_ids(finding.studies, '; studies: ')}{place}"
    text = " ".join("".join(letter if letter.isprintable() else "?" for letter in text).split())
    lines = textwrap.wrap(text, width - 9, break_long_words=False, break_on_hyphens=False)
    if finding.fix:
        lines.append(f"-> {finding.fix}")
    return [f"{finding.severity if number == 0 else '':<8} {line}" for number, line in enumerate(lines)]


def _ids(studies: Sequence[str], prefix: str) -> str:
    if not studies:
        return ""
    more = len(studies) - _SHOWN_IDS
    return prefix + ", ".join(studies[:_SHOWN_IDS]) + (f" and {more} more" if more > 0 else "")
