"""Checks of texts in users' lists. No message repeats what may be a report in the wrong place."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from ccella_fast.data.manifest import CASE_ID
from ccella_fast.errors import DataError

MAX_LIST_BYTES = 256 * 2**20
MAX_REPORT = 2**20  # characters


def check_file_size(path: Path, limit: int = MAX_LIST_BYTES) -> None:
    """Raise DataError for a file of more than `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        why = f"this file has {size} bytes, but at most {limit} are read"
        raise DataError(why, path=path, fix="check that this is the right file")


def read_text(path: Path, *, limit: int = MAX_LIST_BYTES) -> str:
    """Read a UTF-8 file, with or without byte order mark; DataError for other encodings and above `limit` bytes."""
    if not path.is_file():
        raise DataError("this file does not exist", path=path, fix="check the path")
    check_file_size(path, limit)
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("this file is UTF-16 text, UTF-8 is expected", path=path, fix="save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        why = "this file is not UTF-8 text (perhaps Latin-1)"
        raise DataError(why, path=path, field=f"line {line}", fix="save it as UTF-8") from None


def clean_report(report: str, path: Path, field: str) -> str | None:
    """The report with control characters replaced by spaces (line ends are kept), or None if it is blank."""
    if len(report) > MAX_REPORT:
        why = f"the report has {len(report)} characters, but at most {MAX_REPORT} are allowed"
        raise DataError(why, path=path, field=field, fix="check that this is a report")
    report = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", " ", report.replace("\r\n", "\n")).strip()
    return report or None


def check_id(name: str, path: Path, field: str | None = None) -> str:
    """Return `name` if it can be a study's id, which is part of file names; else raise DataError."""
    if not re.fullmatch(CASE_ID, name):
        fix = "use at most 121 letters, digits, spaces and _ . - + @ =, with a letter, digit or _ first"
        raise DataError(f"{name!r:.60} cannot be the id of a study", path=path, field=field, fix=fix)
    return name


def check_known(name: str, known: set[str], *, path: Path, field: str) -> None:
    """Raise DataError for an unknown name that is nearly a known one; other unknown names are the user's own."""
    near = difflib.get_close_matches(name.lower().strip(), known, n=1, cutoff=0.75)  # "date" is not near "dataset"
    if near:
        why = f"the name '{printable(name)}' is not known"
        raise DataError(why, path=path, field=field, fix=f"did you mean '{near[0]}'?")


def printable(name: str) -> str:
    """A name for a message: one line of at most 60 characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:60]


def quote(value: object) -> str:
    """A value for a message. More than one word may be a report, so only its length is given."""
    if isinstance(value, str):
        return f"'{value}'" if re.fullmatch(r"[\w.+@=-]{0,40}", value) else f"a text of {len(value)} characters"
    values = value if isinstance(value, list) else [value]
    is_plain = len(values) <= 8 and all(isinstance(each, int | float | None) for each in values)
    return json.dumps(value)[:60] if is_plain else f"a value of type {type(value).__name__}"
