"""Checks of texts in users' lists. No message repeats what may be a report in the wrong place."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from ccella_fast.data.manifest import CASE_ID
from ccella_fast.data.readers.pointers import check_is_data
from ccella_fast.errors import DataError

MAX_LIST_BYTES = 256 * 2**20
MAX_REPORT = 2**20  # characters
MAX_STUDIES = 10**6  # of a table or list
_MAX_TAG = 64
_PLACEHOLDERS = {"n/a", "na", "nan", "nil", "none", "null", "<na>", "-"}  # what programs write for a missing report


def check_file_size(path: Path, limit: int = MAX_LIST_BYTES) -> None:
    """Raise DataError for a file of more than `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        why = f"this file has {size} bytes, but at most {limit} are read"
        raise DataError(why, path=path, fix="check that this is the right file")


def read_text(path: Path, *, limit: int = MAX_LIST_BYTES) -> str:
    """Read a UTF-8 file, with or without byte order mark; DataError for other encodings, a pointer, and above `limit` bytes."""
    check_is_data(path)
    if not path.is_file():
        raise DataError("this file does not exist", path=path, fix="check the path")
    check_file_size(path, limit)
    raw = path.read_bytes()
    if raw.startswith(b"PK\x03\x04"):
        raise DataError("this file is a spreadsheet or an archive, not text", path=path, fix="save it as CSV, in UTF-8")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw.count(0) > len(raw) // 3:
        raise DataError("this file is UTF-16 text, UTF-8 is expected", path=path, fix="save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        why = "this file is not UTF-8 text (perhaps Latin-1)"
        raise DataError(why, path=path, field=f"line {line}", fix="save it as UTF-8") from None


def clean_report(report: str, path: Path, field: str) -> str | None:
    """The report with control characters replaced by spaces (line ends are kept), or None if it is blank.

    Raises:
        DataError: If the report is too long, or only a word for a missing value, which would be taken for its text.
    """
    if len(report) > MAX_REPORT:
        why = f"the report has {len(report)} characters, but at most {MAX_REPORT} are allowed"
        raise DataError(why, path=path, field=field, fix="check that this is a report")
    report = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", " ", report.replace("\r\n", "\n")).strip()
    if report.lower() in _PLACEHOLDERS:
        why, fix = f"the report is only '{report}', a word for a missing value", "leave it empty if there is no report"
        raise DataError(why, path=path, field=field, fix=fix)
    return report or None


def check_id(name: str, path: Path, field: str | None = None) -> str:
    """Return `name` if it can be a study's id, which is part of file names; else raise DataError."""
    if not re.fullmatch(CASE_ID, name):
        fix = "use at most 121 letters, digits, spaces and _ . - + @ =, with a letter, digit or _ first"
        raise DataError(f"{quote(name)} cannot be the id of a study", path=path, field=field, fix=fix)
    return name


def check_tag(tag: str | None, path: Path, field: str) -> None:
    """Raise DataError unless the tag of a data set is short: a longer text is a report in the wrong column."""
    if tag and len(tag) > _MAX_TAG:
        why = f"the dataset must be a tag of at most {_MAX_TAG} characters, got {quote(tag)}"
        raise DataError(why, path=path, field=field, fix="check that the columns are in the order of their names")


def check_known(name: str, known: set[str], given: Collection[str], *, path: Path, field: str) -> None:
    """Raise DataError if `name` is a misspelling of a known name; other unknown names are the user's own.

    Args:
        name: The name to check.
        known: The names that have a meaning.
        given: All names of the table or entry.
        path: The file to name in the message.
        field: The place to name in the message.
    """
    meant = misspelling_of(name, known, given)
    if meant:
        raise DataError(f"the name {quote(name)} is not known", path=path, field=field, fix=f"did you mean '{meant}'?")


def misspelling_of(name: str, known: set[str], given: Collection[str]) -> str | None:
    """The known name that `name` is a misspelling of, or None.

    A misspelling has the letters of the known name in another case or with other punctuation, such as `PI-RADS`; or the known
    name is absent and a letter is missing, surplus, exchanged with its neighbor or, in names of five letters or more, another
    one. Names with other words (`report_date`) or other digits (`pirads_2`) are different names.
    """
    letters = _letters(name)
    for each in sorted(known):
        if letters == _letters(each) or (each not in given and _is_typo(letters, _letters(each))):
            return each
    return None


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _is_typo(word: str, target: str) -> bool:
    """Whether one letter was left out, inserted, exchanged with its neighbor or replaced."""
    if abs(len(word) - len(target)) > 1 or re.sub(r"\D", "", word) != re.sub(r"\D", "", target):
        return False
    start = next(
        (at for at, (a, b) in enumerate(zip(word, target, strict=False)) if a != b), min(len(word), len(target))
    )
    word, target = word[start:], target[start:]
    replaced = start + len(target) >= 5 and word[1:] == target[1:]
    return (
        word[1:] == target or word == target[1:] or (word[:2] == target[1::-1] and word[2:] == target[2:]) or replaced
    )


def printable(name: str) -> str:
    """A name for a message: one line of at most 60 characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:60]


def quote(value: object) -> str:
    """A value for a message. Only the length is given if it has several words or is not ASCII: it may be a report."""
    if isinstance(value, str):
        is_word = re.fullmatch(r"[\w.+@=/\\:~-]{0,40}", value, re.ASCII)
        return f"'{value}'" if is_word else f"a text of {len(value)} characters"
    values = value if isinstance(value, list) else [value]
    is_plain = len(values) <= 8 and all(isinstance(each, int | float | None) for each in values)
    return json.dumps(value)[:60] if is_plain else f"a value of type {type(value).__name__}"
